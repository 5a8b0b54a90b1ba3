"""Leases and the sessions that hold them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvd.ledger.chunk import Chunk
from kvd.ledger.index import Space
from kvd.types import LeaseId, SessionId
from kvd.wire.errors import InvalidRequest, LimitReached


@dataclass(slots=True, eq=False)
class ReadLease:
    """A right to read some chunks of one prefix, the deepest last, until ``expires_at`` (of the store's clock).

    The deepest is held, and so are the others.
    """

    id: LeaseId
    session: SessionBook
    chunks: list[Chunk]
    expires_at: float
    _generations: frozenset[int] | None = None

    def covers(self, generation: int) -> bool:
        """Whether the slot of this generation is under the lease. The set is made on first use: few leases need it."""
        if self._generations is None:
            self._generations = frozenset(chunk.location.generation for chunk in self.chunks)
        return generation in self._generations


@dataclass(slots=True, eq=False)
class WriteLease:
    """A right to write some chunks. It has no end by time: Commit, Abort or the proven death of its session end it."""

    id: LeaseId
    space: Space
    chunks: dict[bytes, Chunk] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class SessionBook:
    """What one session has opened and holds."""

    id: SessionId
    tenant: str
    node: int | None = None  # the memory node that it is near
    closed: bool = False
    spaces: dict[bytes, Space] = field(default_factory=dict)
    reads: dict[LeaseId, ReadLease] = field(default_factory=dict)
    writes: dict[LeaseId, WriteLease] = field(default_factory=dict)
    #: Lease ids that were given up before they were made: the request that makes them may still be on its way.
    cancelled: OrderedDict[LeaseId, None] = field(default_factory=OrderedDict)
    leased_chunks: int = 0  # over all read leases
    writing_bytes: int = 0  # of slots reserved and not READY

    def check_new(self, lease_id: LeaseId, max_leases: int) -> None:
        """Raise ``InvalidRequest`` if the id is in use or was cancelled, ``LimitReached`` if there are too many."""
        if lease_id in self.reads or lease_id in self.writes:
            raise InvalidRequest(f"lease {lease_id} exists already")
        if lease_id in self.cancelled:
            raise InvalidRequest(f"lease {lease_id} was given up before this request arrived")
        if len(self.reads) + len(self.writes) >= max_leases:
            raise LimitReached(f"the session has {max_leases} leases: try later")

    def cancel(self, lease_id: LeaseId, max_remembered: int) -> None:
        """Remember an id that is not known, so that a late request with it is refused."""
        self.cancelled[lease_id] = None
        self.cancelled.move_to_end(lease_id)
        if len(self.cancelled) > max_remembered:
            self.cancelled.popitem(last=False)


class ReadLeases:
    """All read leases in the order in which they end. All live equally long, so a renewed one goes to the back."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._order: OrderedDict[ReadLease, None] = OrderedDict()

    def make(self, lease_id: LeaseId, session: SessionBook, chunks: list[Chunk], now: float) -> None:
        """A new lease of ``session``, which does not have the id yet."""
        lease = ReadLease(lease_id, session, chunks, now + self._lease_s)
        session.reads[lease_id] = lease
        session.leased_chunks += len(chunks)
        self._order[lease] = None

    def renew(self, lease: ReadLease, now: float) -> None:
        """Let ``lease`` live as long as a new one."""
        lease.expires_at = now + self._lease_s
        self._order.move_to_end(lease)

    def end(self, lease: ReadLease) -> None:
        """Take ``lease`` out. The chunks are the caller's to let go of."""
        del self._order[lease]
        del lease.session.reads[lease.id]
        lease.session.leased_chunks -= len(lease.chunks)

    def expired(self, now: float) -> ReadLease | None:
        """A lease whose time is over, if there is one."""
        lease = next(iter(self._order), None)
        return lease if lease is not None and lease.expires_at <= now else None

    def __iter__(self) -> Iterator[ReadLease]:
        """The leases, the first to end first."""
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
