"""Small types that the daemon's rooms share. No logic."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple

from kvd.wire.identity import Identity

#: A session's number inside the daemon. Not the secret token.
SessionId = int
#: Chosen by the client, unique within its session.
LeaseId = int
#: Parent of the first chunk of a prefix.
ROOT = b""


class ChunkState(Enum):
    """Life of a chunk in the books. Only READY chunks can be seen by readers."""

    WRITING = "writing"  # a write lease holds it
    WAITING = "waiting"  # its bytes are complete, its parent is not READY yet
    READY = "ready"


class ReserveStatus(IntEnum):
    """Answer to one item of Reserve; the numbers are those of the protocol."""

    GRANTED = 1
    PRESENT = 2
    BUSY = 3
    NO_ROOM = 4
    NO_PARENT = 5


class CommitStatus(IntEnum):
    """Answer to one item of Commit; the numbers are those of the protocol."""

    STORED = 1
    PARTIAL = 2
    WAITING_PARENT = 3
    FAILED = 4


class Location(NamedTuple):
    """Where a slot is: segment index, byte offset in it, and the slot's generation."""

    segment: int
    offset: int
    generation: int


class Stripe(NamedTuple):
    """A range of layers x a range of heads of one chunk; ends are exclusive."""

    layer_begin: int
    layer_end: int
    head_begin: int
    head_end: int


class ReserveResult(NamedTuple):
    """Outcome of one item of Reserve; ``location`` is set when GRANTED."""

    status: ReserveStatus
    location: Location | None = None


class LookupResult(NamedTuple):
    """The leased part of the longest READY prefix, and what follows it that is not READY yet."""

    locations: list[Location]
    promoting: int
    writing: int


@dataclass(frozen=True, slots=True)
class Namespace:
    """An opened namespace: identity, owner and geometry."""

    id: bytes
    tenant: str
    identity: Identity
    chunk_bytes: int
