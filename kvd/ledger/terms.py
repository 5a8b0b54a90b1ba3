"""The terms on which the store deals with the rest of the daemon: limits, seams, tickets and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kvd.types import Location, SessionId


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


@dataclass(slots=True)
class Counters:
    """Totals since the start. Only ever rise."""

    lookups: int = 0
    #: Keys of lookups beyond their ``skip``; asked = hit + miss.
    asked_chunks: int = 0
    #: Leased from the host tier.
    hit_chunks: int = 0
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


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """Bytes of the pool by use; all but ``bytes`` add up to it."""

    bytes: int
    free_bytes: int
    ready_bytes: int
    writing_bytes: int
    quarantined_bytes: int
    idle_slot_bytes: int


@dataclass(frozen=True, slots=True)
class TenantFigures:
    """What one tenant has in the pool: READY chunks, bytes of slots in any state, open sessions."""

    tenant: str
    chunks: int
    bytes: int
    sessions: int


@dataclass(frozen=True, slots=True)
class NamespaceFigures:
    """What one namespace has in the pool: READY chunks, bytes of slots in any state."""

    namespace_id: bytes
    tenant: str
    model: str
    chunk_bytes: int
    chunks: int
    bytes: int


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
