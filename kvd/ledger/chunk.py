"""The record of one chunk in the books, and of the slab that its slot lies in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from kvd.types import ChunkState, Location

if TYPE_CHECKING:
    from kvd.ledger.index import Space
    from kvd.ledger.leases import SessionBook, WriteLease


class Leaving(Enum):
    """Why a slot that no chunk of the index uses any more is not free yet."""

    IN_FLIGHT = "in flight"  # given up; the data plane still writes into it
    QUARANTINE = "quarantine"  # its writer died: a late copy may still land in it


@dataclass(slots=True, eq=False)
class Home:
    """What the books know of one slab: enough to tell at once whether, and how gladly, it can be emptied."""

    slot_bytes: int
    chunks: int = 0
    #: Chunks that may not be evicted now: ``Chunk.holds`` is not 0.
    held: int = 0
    #: Sum of ``Chunk.touched``: divided by ``chunks``, how recently the slab was used.
    heat: int = 0


@dataclass(slots=True, eq=False)
class Draft:
    """What a chunk carries until it is READY, or until its slot is free again."""

    session: SessionBook
    lease: WriteLease | None  # None once the bytes are complete or the slot was given up
    covered: int = 0  # bits of ``Grid``
    writes: int = 0  # of the data plane, under way
    poisoned: bool = False  # some bytes did not arrive intact
    doomed: bool = False  # its parent is gone: out of the index, the writer does not know yet
    leaving: Leaving | None = None


@dataclass(slots=True, eq=False)
class Chunk:
    """One chunk. Children are a linked list: most chunks have one, so a set each would cost more than the rest."""

    key: bytes
    space: Space
    location: Location
    home: Home
    touched: int  # when it was last used: a stamp that no two chunks share, higher = later
    draft: Draft | None
    parent: Chunk | None = None
    first_child: Chunk | None = None
    next_sibling: Chunk | None = None
    previous_sibling: Chunk | None = None
    state: ChunkState = ChunkState.WRITING
    #: Reasons not to evict it: not READY, leases, transfers, and each child that has a reason itself.
    #: So 0 says that the whole subtree may go.
    holds: int = 0
    #: Two marks of the eviction policy.
    evictable: bool = False
    queued: bool = False

    def children(self) -> Iterator[Chunk]:
        """The children, youngest first. The list must not change meanwhile."""
        child = self.first_child
        while child is not None:
            yield child
            child = child.next_sibling

    def subtree(self) -> list[Chunk]:
        """This chunk and all below it, parents before their children."""
        found = [self]
        for chunk in found:
            found.extend(chunk.children())
        return found

    def adopt(self, child: Chunk) -> None:
        """Put ``child`` at the head of the children."""
        child.parent = self
        child.next_sibling = self.first_child
        if self.first_child is not None:
            self.first_child.previous_sibling = child
        self.first_child = child

    def leave(self) -> None:
        """Leave the parent's children."""
        if self.parent is not None and self.parent.first_child is self:
            self.parent.first_child = self.next_sibling
        if self.previous_sibling is not None:
            self.previous_sibling.next_sibling = self.next_sibling
        if self.next_sibling is not None:
            self.next_sibling.previous_sibling = self.previous_sibling
        self.parent = self.next_sibling = self.previous_sibling = None
