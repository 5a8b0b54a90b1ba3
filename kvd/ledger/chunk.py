"""The record of one chunk in the books, and of the slab that its slot lies in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from kvd.ledger.node import Node
from kvd.types import ChunkState, Location

if TYPE_CHECKING:
    from kvd.ledger.leases import SessionBook, WriteLease
    from kvd.ledger.records import Record


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
    written: int = 0  # how many of those there ever were
    poisoned: bool = False  # some bytes did not arrive intact
    promoted: bool = False  # the daemon itself writes it, from a disk
    doomed: bool = False  # its parent is gone: out of the index, the writer does not know yet
    leaving: Leaving | None = None


@dataclass(slots=True, eq=False)
class Chunk(Node):
    """One chunk in the pool. Reasons to hold it: not READY, leases, transfers."""

    location: Location
    home: Home
    draft: Draft | None
    state: ChunkState = ChunkState.WRITING
    checksum: int | None = None  # of its bytes, once it is known
    record: Record | None = None  # the same chunk on a disk
    spilling: bool = False  # queued to be sealed or written, or under way
    to_write: bool = False  # and held until it is written

    @property
    def size_class(self) -> int:
        """Bytes of its slot."""
        return self.space.slot_bytes
