"""Letting go of what has expired: a few nodes at a time, in the background."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from kvd.ledger.books import Books
from kvd.ledger.chunk import Chunk
from kvd.ledger.node import Node
from kvd.ledger.records import Record, Records

N = TypeVar("N", bound=Node)

#: Nodes looked at, and nodes let go, in one step of a sweep.
_LOOKED_AT = 4096
_LET_GO = 256


class Sweep(Generic[N]):
    """Goes round one tier.

    ``nodes`` goes through the tier, which changes meanwhile. ``expired`` says whether a node is still there and has
    expired. ``let_go`` takes one that has and a number, and lets go of so many of it and what is below it, leaves
    first; it answers how many it did: none when the node is held.
    """

    def __init__(
        self, nodes: Callable[[], Iterator[N]], expired: Callable[[N], bool], let_go: Callable[[N, int], int]
    ) -> None:
        self._nodes = nodes
        self._expired = expired
        self._let_go = let_go
        self._round: Iterator[N] | None = None
        self._unfinished: N | None = None
        self._done = 0

    def step(self, dead: int) -> None:
        """A bounded part of a round. ``dead``: of the tier's ``Expiry``; O(1) when it is as in the round before."""
        if self._round is None:
            if dead == self._done:
                return
            self._done = dead
            self._round = self._nodes()
        left = _LET_GO
        for _ in range(_LOOKED_AT):
            node, self._unfinished = self._unfinished or next(self._round, None), None
            if node is None:
                self._round = None
                return
            if self._expired(node):
                gone = self._let_go(node, left)
                left -= gone
                if not gone:
                    self._done = 0  # held: there is to be another round, whatever else expires
                if left <= 0:
                    self._unfinished = node
                    return


def _pool_sweep(books: Books) -> Sweep[Chunk]:
    """Of the chunks."""

    def chunks() -> Iterator[Chunk]:
        for slab in list(books.homes):
            if slab in books.homes:
                for offset in books.slots.used_slots(slab):
                    chunk = books.by_offset.get(offset)
                    if chunk is not None:
                        yield chunk

    def expired(chunk: Chunk) -> bool:
        there = books.by_offset.get(chunk.location.offset) is chunk
        return there and chunk.draft is None and books.expired(chunk)

    def let_go(top: Chunk, most: int) -> int:
        going = [] if top.holds else top.subtree()[-most:]
        for chunk in reversed(going):
            books.evict(chunk)
        books.counters.expired_chunks += len(going)
        return len(going)

    return Sweep(chunks, expired, let_go)


def _disk_sweep(books: Books, records: Records) -> Sweep[Record]:
    """Of the records."""

    def inside() -> Iterator[Record]:
        for where in list(records.by_extent):
            yield from list(records.by_extent.get(where, ()))

    def expired(record: Record) -> bool:
        return record.space.records.get(record.key) is record and records.expired(record)

    def let_go(top: Record, most: int) -> int:
        going = [] if top.holds else top.subtree()[-most:]
        for record in reversed(going):
            records.drop(record)
        books.counters.expired_records += len(going)
        books.forget_if_empty(top.space)
        return len(going)

    return Sweep(inside, expired, let_go)


class Sweeper:
    """Goes round all tiers."""

    def __init__(self, books: Books) -> None:
        self._pool, self._books = _pool_sweep(books), books
        self._disks, self._records = None, books.records
        if self._records is not None:
            self._disks = _disk_sweep(books, self._records)

    def step(self) -> None:
        """A bounded part of a round in each."""
        self._pool.step(self._books.expiry.dead)
        if self._disks is not None and self._records is not None:
            self._disks.step(self._records.expiry.dead)
