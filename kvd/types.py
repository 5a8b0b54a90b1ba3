"""Small types that the daemon's rooms share. No logic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from kvd.wire.chunks import ROOT, CommitStatus, Location, ReserveResult, ReserveStatus, Stripe
from kvd.wire.identity import Identity

__all__ = [
    "ROOT",
    "ChunkState",
    "CommitStatus",
    "DriveFigures",
    "Found",
    "LeaseId",
    "Location",
    "LookupResult",
    "Move",
    "Namespace",
    "Order",
    "Outcome",
    "Pin",
    "Place",
    "Read",
    "Recovery",
    "ReserveResult",
    "ReserveStatus",
    "Result",
    "Seal",
    "SessionId",
    "Share",
    "SlotEntry",
    "Stripe",
    "Verify",
    "Write",
]

#: A session's number inside the daemon. Not the secret token.
SessionId = int
#: Chosen by the client, unique within its session.
LeaseId = int


class ChunkState(Enum):
    """Life of a chunk in the pool's books. Only READY chunks can be seen by readers."""

    WRITING = "writing"  # a write lease holds it
    WAITING = "waiting"  # its bytes are complete, its parent is not READY yet
    READY = "ready"
    STALE = "stale"  # left by a former daemon, and not checked yet


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


@dataclass(frozen=True, slots=True)
class Share:
    """What a tenant or a namespace may have of the pool, and the same part of the disks.

    Either ``tenant`` or ``namespace_id`` is given. What is idle may be borrowed, to ``hard_bytes`` (None: all of it);
    when others need room, they get what is beyond ``soft_bytes`` (None: nothing is kept), and no more.
    """

    tenant: str | None
    namespace_id: bytes | None
    soft_bytes: int | None
    hard_bytes: int | None


class Pin(NamedTuple):
    """The wish that a prefix stays: what is stored up to ``key``, or (empty) all of the namespace."""

    tenant: str
    namespace_id: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class SlotEntry:
    """What the slot table of a pool says of one slot, and so what a new daemon knows of it."""

    offset: int
    generation: int
    namespace_id: bytes
    key: bytes
    parent: bytes  # ROOT for the first chunk of a prefix
    chunk_bytes: int
    ready: bool  # False: it was being written
    checksum: int | None  # of the chunk's bytes, xxh3_64; None: not taken yet
    touched: int
    uses: int
    life: int  # id of the daemon that granted the slot


class Place(NamedTuple):
    """Where a record lies on the disks. ``sequence`` orders all records of the tier by the time they were written."""

    drive: int
    extent: int
    offset: int  # in the extent, bytes, a multiple of 4 KiB
    record_bytes: int  # header, payload and padding, a multiple of 4 KiB
    sequence: int
    life: int = 0  # of the extent: rises with every time that it is filled anew


class Outcome(Enum):
    """How an order ended."""

    OK = "ok"
    CORRUPT = "corrupt"  # the bytes are not those that were stored
    FAILED = "failed"  # the drive did not do it


# Orders of the books to the threads that move bytes. ``offset``: of the slot in the pool. Each is answered by one
# ``Result`` with its ticket; until then its slot, its place and its buffers stay as they are.


class Seal(NamedTuple):
    """Take the checksum of a slot; with ``encode``, try to make its bytes fewer as well."""

    ticket: int
    offset: int
    namespace: Namespace
    encode: bool


class Write(NamedTuple):
    """Write a record at ``place``: from ``encoded`` when the Seal gave that back, else from the slot."""

    ticket: int
    namespace: Namespace
    key: bytes
    parent: bytes
    offset: int
    checksum: int
    encoded: memoryview | None
    place: Place


class Read(NamedTuple):
    """Read the record at ``place`` into a slot and check it: header, key, parent and the bytes' checksum."""

    ticket: int
    namespace: Namespace
    key: bytes
    parent: bytes
    place: Place
    offset: int


class Verify(NamedTuple):
    """Check a slot that a former daemon left against its checksum."""

    ticket: int
    offset: int
    chunk_bytes: int
    checksum: int


class Move(NamedTuple):
    """Copy a record to another place; its sequence there is that of ``target``."""

    ticket: int
    namespace: Namespace
    key: bytes
    parent: bytes
    source: Place
    target: Place


Order = Seal | Write | Read | Verify | Move


class Result(NamedTuple):
    """The end of an order. ``checksum``: after Seal and Read. ``encoded``: after a Seal that made the bytes fewer."""

    ticket: int
    outcome: Outcome
    checksum: int = 0
    encoded: memoryview | None = None


@dataclass(frozen=True, slots=True)
class DriveFigures:
    """One directory of the disk tier as it is now. Sizes in bytes; totals are since the start of the daemon."""

    directory: str
    reason: str  # why it is degraded: not written to, its records not found; "" = it works
    capacity_bytes: int  # what it may fill
    live_bytes: int  # of records that can be found
    dead_bytes: int  # of records that are gone and not reclaimed yet, and what is lost between records
    free_bytes: int  # capacity = live + dead + free
    records: int
    extents: int
    read_bytes: int
    written_bytes: int  # whatever was written: records, moved records, headers of extents
    queue: int  # orders that wait for the drive's threads
    scanned_extents: int  # of the scan at the start; done when it reaches ``found_extents``
    found_extents: int


@dataclass(frozen=True, slots=True)
class Recovery:
    """What became of the pool that a former daemon left."""

    warm: bool  # chunks were taken over
    reason: str  # for people: why the start was cold, or whose pool was taken over
    chunks: int = 0  # taken over
    skipped: Mapping[str, int] = field(default_factory=dict)  # slots that were not, by reason
    seconds: float = 0.0


class Found(NamedTuple):
    """A record whose header a scan has found intact; its payload is checked when it is read."""

    namespace_id: bytes
    key: bytes
    parent: bytes
    chunk_bytes: int
    place: Place
