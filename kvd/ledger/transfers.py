"""Transfers of the data plane: what they may touch, and what must stay in place while they run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from kvd.ledger.books import SEGMENT, Books
from kvd.ledger.chunk import Chunk
from kvd.ledger.leases import SessionBook
from kvd.ledger.terms import IoTicket
from kvd.types import LeaseId
from kvd.wire.frames import MAX_RUNS, Item, ItemStatus, Op
from kvd.wire.spans import whole


class Transfer(NamedTuple):
    """A transfer under way: per item the chunk that it pins, None for an item that was refused, and whether it moves
    all of it."""

    op: Op
    chunks: list[Chunk | None]
    whole: list[bool]


class Transfers:
    """The transfers under way. Each pins its chunks whatever becomes of the lease and of the session meanwhile."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._last_id = 0
        self.under_way: dict[int, Transfer] = {}

    def begin(
        self, book: SessionBook, op: Op, lease_id: LeaseId, items: Sequence[Item]
    ) -> tuple[IoTicket, list[ItemStatus]]:
        """Pin what the lease allows to be moved; one status per item."""
        chunks: list[Chunk | None] = []
        statuses = []
        checksums = []
        wholes = []
        for item in items:
            chunk = self._leased(book, op, lease_id, item)
            if chunk is None:
                statuses.append(ItemStatus.GONE)
            elif item.span.count > MAX_RUNS or not item.span.fits(chunk.space.namespace.chunk_bytes):
                statuses.append(ItemStatus.BAD_SPAN)
                chunk = None
            else:
                statuses.append(ItemStatus.OK)
                if chunk.draft is None:
                    self._books.hold(chunk)
                else:
                    chunk.draft.writes += 1
                    chunk.draft.written += 1
                    chunk.checksum = None
            chunks.append(chunk)
            wholes.append(chunk is not None and item.span == whole(chunk.space.namespace.chunk_bytes))
            checksums.append(chunk.checksum if chunk is not None and wholes[-1] else None)
        self._last_id += 1
        self.under_way[self._last_id] = Transfer(op, chunks, wholes)
        return IoTicket(self._last_id, book.id, tuple(checksums)), statuses

    def end(
        self, ticket: IoTicket, failed: Collection[int], checksums: Mapping[int, int], quarantine_until: float
    ) -> None:
        """Let go of what the transfer pinned. Items of a write in ``failed`` poison their chunks. Twice is once.

        ``checksums``: by item, of the bytes that were moved. That of a whole chunk is the chunk's from now on, so that
        nobody reads its bytes for it again.
        """
        transfer = self.under_way.pop(ticket.id, None)
        if transfer is None:
            return
        for index, chunk in enumerate(transfer.chunks):
            if chunk is None:
                continue
            checksum = checksums.get(index) if transfer.whole[index] else None
            if transfer.op is Op.READ:
                if chunk.checksum is None and checksum is not None:
                    chunk.checksum = checksum
                    self._books.journal.sealed(chunk.location.offset, checksum)
                self._books.unhold(chunk)
            elif chunk.draft is not None:
                if index in failed:
                    chunk.draft.poisoned = True
                    self._books.counters.checksum_failures += 1
                elif chunk.draft.written == 1:  # nobody else has written into it, before or meanwhile
                    chunk.checksum = checksum
                self._books.end_write(chunk, chunk.draft, quarantine_until)

    def _leased(self, book: SessionBook, op: Op, lease_id: LeaseId, item: Item) -> Chunk | None:
        """The chunk that ``item`` names, if the session's lease gives it the right to ``op``."""
        chunk = self._books.by_offset.get(item.offset) if item.segment == SEGMENT else None
        if chunk is None or chunk.location.generation != item.generation:
            return None
        draft = chunk.draft
        if op is Op.READ:
            read = book.reads.get(lease_id)
            return chunk if draft is None and read is not None and read.covers(item.generation) else None
        write = book.writes.get(lease_id)
        return chunk if draft is not None and write is not None and draft.lease is write and not draft.doomed else None
