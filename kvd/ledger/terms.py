"""The terms on which the store deals with the rest of the daemon: limits, seams, tickets and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kvd.types import Location, Namespace, Place, SessionId


class Generations(Protocol):
    """The published generation table of the pool: what lets a reader see that its slot was reused."""

    def publish(self, location: Location) -> None:
        """Write ``location.generation`` into the word of the slot: its bytes may be used from now on."""

    def retract(self, location: Location) -> None:
        """Write 0 into the word of the slot. Visible to readers before this returns."""


@runtime_checkable
class ReadableGenerations(Protocol):
    """A generation table that can be read back; the audit then compares it with the books."""

    def word(self, segment: int, offset: int) -> int:
        """The word of the slot that begins at ``offset`` bytes of ``segment``; 0 = none published."""


class SlotJournal(Protocol):
    """What outlives the daemon: the pool's slot table, written step by step as the books change.

    A daemon that ends between any two calls leaves a table from which the next one can tell every slot that holds a
    READY chunk from every slot that somebody may still be writing.
    """

    def describe(self, namespace: Namespace) -> None:
        """Slots of ``namespace`` are going to be granted."""

    def forget(self, namespace_id: bytes) -> None:
        """Nothing of the namespace is in the pool any more."""

    def granted(
        self, offset: int, generation: int, namespace_id: bytes, key: bytes, parent: bytes, chunk_bytes: int
    ) -> None:
        """The slot at ``offset`` is going to be written. Called before its generation is published."""

    def ready(self, offset: int, touched: int, uses: int) -> None:
        """The chunk is complete and its parent READY. Called before any reader can see it."""

    def sealed(self, offset: int, checksum: int) -> None:
        """The checksum of the READY chunk at ``offset``."""

    def used(self, offset: int, touched: int, uses: int) -> None:
        """The READY chunk at ``offset`` was used."""

    def freed(self, offset: int) -> None:
        """The slot is free. Called after its generation was retracted and before anybody else can get it."""


class Unwritten:
    """The journal of a pool that nobody can find again: a ``SlotJournal`` that keeps nothing."""

    def describe(self, namespace: Namespace) -> None:
        """Nothing."""

    def forget(self, namespace_id: bytes) -> None:
        """Nothing."""

    def granted(
        self, offset: int, generation: int, namespace_id: bytes, key: bytes, parent: bytes, chunk_bytes: int
    ) -> None:
        """Nothing."""

    def ready(self, offset: int, touched: int, uses: int) -> None:
        """Nothing."""

    def sealed(self, offset: int, checksum: int) -> None:
        """Nothing."""

    def used(self, offset: int, touched: int, uses: int) -> None:
        """Nothing."""

    def freed(self, offset: int) -> None:
        """Nothing."""


class Presence(Protocol):
    """The published table of what can be found: clients look there before they ask.

    A key can be found while it has a READY or STALE chunk in the pool, or a record on a disk that is not known to be
    damaged. It is added when the first of them comes, and removed when the last has gone.
    """

    def add(self, namespace_id: bytes, key: bytes) -> None:
        """The key can be found from now on."""

    def remove(self, namespace_id: bytes, key: bytes) -> None:
        """The key, which was added, can not be found any more."""


@runtime_checkable
class ReadablePresence(Protocol):
    """A presence table that can be read back; the audit then compares it with the books."""

    def __len__(self) -> int:
        """Keys that were added and not removed."""

    def may_hold(self, namespace_id: bytes, key: bytes) -> bool:
        """Whether a client that looks for the key will ask."""


class Unpublished:
    """The ``Presence`` of a store whose clients always ask."""

    def add(self, namespace_id: bytes, key: bytes) -> None:
        """Nothing."""

    def remove(self, namespace_id: bytes, key: bytes) -> None:
        """Nothing."""


class Budget(Protocol):
    """How much may be written to the disks (``kvd.spill.budget``)."""

    def take(self, size_bytes: int) -> bool:
        """Whether so much may be written now; then it counts as written."""

    def give(self, size_bytes: int) -> None:
        """What was taken and not written after all."""

    def count(self, size_bytes: int) -> None:
        """So much is written whatever the budget says."""


class ExtentSpace(Protocol):
    """What the books need of the space on the disks (``kvd.spill.extents.Extents``): pure arithmetic."""

    @property
    def total_bytes(self) -> int:
        """Bytes that may be used: of extents on drives that work."""

    @property
    def live_bytes(self) -> int:
        """Bytes of records that are not dead."""

    @property
    def last_sequence(self) -> int:
        """Of the youngest place that was given out or adopted."""

    @property
    def free_extents(self) -> int:
        """Extents with nothing in them that can be opened now."""

    @property
    def kept_extents(self) -> int:
        """So many of the free extents are not given out but to records that are moved."""

    def record_bytes(self, payload_bytes: int) -> int:
        """Size on disk of a record with this much payload."""

    def fits(self, payload_bytes: int) -> bool:
        """Whether an empty extent could hold a record with this much payload."""

    def allocate(self, payload_bytes: int, *, moving: bool = False) -> Place | None:
        """A place for a new record; None when there is none now. The last free extent is kept for ``moving``."""

    def release(self, place: Place) -> None:
        """The record at ``place`` is dead, or was never written."""

    def adopt(self, place: Place) -> None:
        """A scan has found the record at ``place``."""

    def emptiest(self) -> tuple[int, int] | None:
        """The full extent (drive, number) that has the least live bytes; None when there is none."""

    def live_in(self, drive: int, extent: int) -> int:
        """Live bytes of an extent."""

    def dead_in(self, drive: int, extent: int) -> int:
        """Bytes of an extent that emptying it would gain."""

    def works(self, drive: int) -> bool:
        """Whether the drive answers: what lies on it can be had."""

    def audit(self) -> list[str]:
        """What does not agree inside."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds and times of the store. Every client is held to them."""

    read_lease_s: float = 30.0
    #: How long the slots of a dead writer stay unused after its death is proven.
    quarantine_s: float = 5.0
    #: Read and write leases together; as many cancelled lease ids are remembered.
    max_leases_per_session: int = 4096
    #: Chunks under all read leases of a session together, one counted once per lease.
    max_leased_chunks_per_session: int = 1 << 18
    max_chunks_per_request: int = 4096
    #: Share of the pool's bytes that one session may have reserved and not READY.
    max_writing_share: float = 0.5
    max_namespaces: int = 1024
    max_namespaces_per_session: int = 128


@dataclass(frozen=True, slots=True)
class IoTicket:
    """Receipt of ``begin_io``, to be handed to ``end_io`` exactly once."""

    id: int
    session: SessionId
    #: Of a READ, per item: the XXH3-64 of its bytes, where it is known without reading them.
    checksums: tuple[int | None, ...] = ()


@dataclass(slots=True)
class Counters:
    """Totals since the start. Only ever rise."""

    lookups: int = 0
    #: Keys of lookups beyond their ``skip``; asked = hit + disk hit + miss. A lookup that is asked ``again`` counts in
    #: none of them: what it waits for was counted as a disk hit the first time.
    asked_chunks: int = 0
    #: Leased from the host tier.
    hit_chunks: int = 0
    #: Found on disk behind what was leased: their promotion began, or was under way.
    disk_hit_chunks: int = 0
    miss_chunks: int = 0
    #: Answers to the items of Reserve.
    reserved_chunks: int = 0
    present_chunks: int = 0
    busy_chunks: int = 0
    no_room_chunks: int = 0
    no_parent_chunks: int = 0
    #: What became of reserved chunks: reserved = stored + failed + aborted + quarantined + those being written.
    stored_chunks: int = 0
    failed_chunks: int = 0
    aborted_chunks: int = 0
    quarantined_chunks: int = 0
    #: How stored chunks left: for room, or because somebody asked.
    evicted_chunks: int = 0
    dropped_chunks: int = 0
    expired_leases: int = 0
    #: Items of data-plane writes whose bytes did not arrive intact.
    checksum_failures: int = 0
    #: Records that became READY chunks, and promotions that ended otherwise: the drive failed, or there was no slot.
    promoted_chunks: int = 0
    promote_failures: int = 0
    unpromoted_no_room: int = 0
    #: Records, and chunks that a former daemon left, whose bytes were not those that were stored.
    corrupt_chunks: int = 0
    #: Chunks of a former daemon that went because they, or what they hang on, were not what had been stored.
    condemned_chunks: int = 0
    #: READY chunks written to disk, and the size of their records; moved records count in ``moved_bytes`` only.
    spilled_chunks: int = 0
    spilled_bytes: int = 0
    #: READY chunks that were not written: over the budget, too many waiting, seen only once, larger than an extent,
    #: because their drive failed, or because shares keep the room for others.
    unspilled_budget: int = 0
    unspilled_backlog: int = 0
    unspilled_admission: int = 0
    unspilled_large: int = 0
    unspilled_degraded: int = 0
    unspilled_share: int = 0
    #: Live records copied out of extents that were reclaimed, and records dropped to make room on the disks.
    moved_bytes: int = 0
    dropped_records: int = 0
    #: Chunks and records that went because nobody had used them for ``ttl``.
    expired_chunks: int = 0
    expired_records: int = 0
    #: Chunks and records that pins cover and that are not pinned: too much was already when they came.
    unpinned_chunks: int = 0
    #: READY chunks that a former daemon left in the pool and this one took over.
    recovered_chunks: int = 0


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """Bytes of the pool by use; all but ``bytes`` add up to it."""

    bytes: int
    free_bytes: int
    ready_bytes: int
    writing_bytes: int
    quarantined_bytes: int
    idle_slot_bytes: int
    #: READY chunks of a former daemon that have a checksum and were not checked against it yet: nobody gets them.
    unverified_chunks: int = 0


@dataclass(frozen=True, slots=True)
class DiskFigures:
    """What the books have on the disks, and what is on its way there (queue) and back (promoting)."""

    records: int = 0
    live_bytes: int = 0
    total_bytes: int = 0
    queue_chunks: int = 0
    queue_bytes: int = 0
    promoting_chunks: int = 0


@dataclass(frozen=True, slots=True)
class TenantFigures:
    """What one tenant has in the pool: READY chunks, bytes of slots in any state, open sessions; and on the disks.

    ``soft_bytes`` and ``hard_bytes`` are its share of the pool; None = without that bound.
    """

    tenant: str
    chunks: int
    bytes: int
    sessions: int
    disk_chunks: int = 0
    disk_bytes: int = 0
    pinned_chunks: int = 0
    soft_bytes: int | None = None
    hard_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class NamespaceFigures:
    """What one namespace has in the pool: READY chunks, bytes of slots in any state; and on the disks.

    ``soft_bytes`` and ``hard_bytes`` are its share of the pool; None = without that bound.
    """

    namespace_id: bytes
    tenant: str
    model: str
    chunk_bytes: int
    chunks: int
    bytes: int
    disk_chunks: int = 0
    disk_bytes: int = 0
    pinned_chunks: int = 0
    soft_bytes: int | None = None
    hard_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class SessionFigures:
    """What one session holds: read leases, and chunks that it is writing."""

    session: SessionId
    tenant: str
    read_leases: int
    write_leases: int
    writing_bytes: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A snapshot of the books."""

    pool: PoolFigures
    tenants: tuple[TenantFigures, ...]
    namespaces: tuple[NamespaceFigures, ...]
    sessions: Mapping[SessionId, SessionFigures]
    counters: Mapping[str, int]
    disk: DiskFigures = DiskFigures()
