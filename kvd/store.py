"""The chunk store: what clients may ask of the books, and the checks before it is done.

Owned by the event loop: synchronous, no I/O, no locks. The books themselves are in ``kvd.ledger``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence

from kvd.ledger.audit import audit
from kvd.ledger.books import Books, Slots
from kvd.ledger.chunk import Chunk
from kvd.ledger.eviction import EvictionPolicy, LeafLru
from kvd.ledger.expiry import Expiry
from kvd.ledger.figures import figures
from kvd.ledger.index import Space
from kvd.ledger.leases import ReadLease, ReadLeases, SessionBook, WriteLease
from kvd.ledger.pins import PinFigures, pins_of
from kvd.ledger.records import Records
from kvd.ledger.room import keep_free
from kvd.ledger.sessions import Sessions
from kvd.ledger.sweeping import Sweeper
from kvd.ledger.terms import (
    Counters,
    Generations,
    IoTicket,
    Limits,
    NamespaceFigures,
    PoolFigures,
    Presence,
    ReadableGenerations,
    SessionFigures,
    SlotJournal,
    StoreStats,
    TenantFigures,
)
from kvd.ledger.tiers import Disks, Tiers
from kvd.ledger.transfers import Transfers
from kvd.ledger.uses import Uses
from kvd.ledger.writing import Writing
from kvd.types import ROOT, CommitStatus, LeaseId, LookupResult, Namespace, Pin, ReserveResult, SessionId, Stripe
from kvd.wire.calls import MAX_STRIPES
from kvd.wire.errors import InvalidRequest, LimitReached, NamespaceUnknown
from kvd.wire.frames import MAX_ITEMS, Item, ItemStatus, Op
from kvd.wire.identity import KEY_BYTES, Identity
from kvd.wire.lifeline import GRANULE_BYTES

__all__ = [
    "ChunkStore",
    "Counters",
    "Disks",
    "Generations",
    "IoTicket",
    "Limits",
    "NamespaceFigures",
    "PinFigures",
    "PoolFigures",
    "ReadableGenerations",
    "SessionFigures",
    "StoreStats",
    "TenantFigures",
]

#: Most lookups that a client says at a time to have known to be misses: a million in the two seconds of a heartbeat.
MAX_MISSED_LOOKUPS = 1 << 20


def _nobody(saved: object) -> None:
    """Who hears of pins when they are not kept."""


class ChunkStore:
    """Lookup, reserve, commit, release.

    A method that takes a session raises ``SessionUnknown`` when it is not open, one that takes a namespace id raises
    ``NamespaceUnknown`` when the session has not opened it. These, ``InvalidRequest`` and ``LimitReached`` are raised
    before anything has changed.
    """

    def __init__(
        self,
        allocator: Slots,
        generations: Generations,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        policy: EvictionPolicy[Chunk] | None = None,
        first_generation: int = 0,
        journal: SlotJournal | None = None,
        disks: Disks | None = None,
        ttl_s: float = 0.0,
        presence: Presence | None = None,
    ) -> None:
        """``first_generation``: all generations are higher. A daemon that begins elsewhere than the one before it gives
        no slot a generation that an earlier life gave. ``journal``: of a pool that outlives the daemon.
        ``ttl_s``: what was not used for so long is not found any more, and goes; 0 = never. ``presence``: of a store
        whose clients look before they ask."""
        self.counters = Counters()
        self._limits = limits
        self._clock = clock
        records = None if disks is None else Records(disks.extents, disks.policy)
        if policy is None:
            policy = LeafLru()
        self._books = Books(allocator, generations, policy, self.counters, first_generation, journal, records, presence)
        for tree in (self._books, records):
            if tree is not None:
                tree.expiry = Expiry(ttl_s)
        self._pins = pins_of(self._books)
        #: Hears what is to be loaded by the next daemon (``load_pins``) whenever that has changed.
        self.on_pins: Callable[[list[list[str]]], None] = _nobody
        self._sweeper = Sweeper(self._books)
        #: Everything about disks and restarts; its orders are carried out by somebody else.
        self.tiers = Tiers(
            self._books, disks, sealing=journal is not None, clock=clock, quarantine_s=limits.quarantine_s
        )
        self._uses = Uses(self._books, offering=self.tiers.keeps)
        self._reads = ReadLeases(limits.read_lease_s)
        self._transfers = Transfers(self._books)
        max_writing_bytes = int(allocator.total_bytes * limits.max_writing_share)
        self._writing = Writing(self._books, max_writing_bytes)
        #: Larger chunks cannot be stored: no session could ever reserve one.
        self.max_chunk_bytes = max_writing_bytes // GRANULE_BYTES * GRANULE_BYTES
        self._sessions = Sessions(self._books, limits, self.max_chunk_bytes)

    # ------------------------------------------------------------ sessions and namespaces

    def open_session(self, session: SessionId, tenant: str, node: int | None = None) -> None:
        """A client of ``tenant`` has come, near memory ``node``. ``InvalidRequest`` when the number is taken."""
        self._sessions.open(session, tenant, node)

    def close_session(self, session: SessionId) -> None:
        """The session's stream has ended: so do its read leases. What it writes stays until ``writers_gone``."""
        book = self._sessions.books.get(session)
        if book is not None and not book.closed:
            for lease in list(book.reads.values()):
                self._end_read(lease)
            self._sessions.close(book)

    def writers_gone(self, session: SessionId) -> None:
        """It is proven that nobody of the session can copy any more: its unfinished chunks go, their slots later."""
        self.close_session(session)
        book = self._sessions.books.pop(session, None)
        if book is not None:
            self._writing.bury(book, self._clock() + self._limits.quarantine_s)

    def open_namespace(self, session: SessionId, identity: Identity, chunk_bytes: int) -> Namespace:
        """The namespace of ``identity`` for the session's tenant, made if new.

        ``InvalidRequest`` when the chunks would be too large for the pool, or differ in size from what the namespace
        was opened with, or the grid of layers and heads is not sound; ``LimitReached`` when there are too many.
        """
        return self._sessions.open_namespace(self._sessions.get(session), identity, chunk_bytes)

    # ------------------------------------------------------------ reading

    def lookup(
        self,
        session: SessionId,
        namespace_id: bytes,
        lease_id: LeaseId,
        keys: Sequence[bytes],
        skip: int = 0,
        again: bool = False,
    ) -> LookupResult:
        """Match the longest READY prefix of ``keys`` and lease it from its chunk ``skip`` on.

        What follows it on a disk sets out for the pool. ``again``: for the same request as before, which only waits
        for that; it is not counted as another use. A use has its place and time now, and is put in by ``catch_up``.
        """
        book, space = self._sessions.get_open(session, namespace_id)
        self._check_keys(keys)
        if not 0 <= skip <= len(keys):
            raise InvalidRequest(f"skip {skip} of {len(keys)} keys")
        now = self._advance()
        book.check_new(lease_id, self._limits.max_leases_per_session)
        books, tiers, counters = self._books, self.tiers, self.counters
        found = space.ready_prefix(keys)
        while found and books.expired(found[-1]):
            found.pop()
        leased = found[skip:] if skip else found
        if book.leased_chunks + len(leased) > self._limits.max_leased_chunks_per_session:
            raise LimitReached(f"the session has {book.leased_chunks} chunks leased: release some")
        if not again:
            if found:
                self._uses.add(found)
            space.touched = books.last_stamp
        if leased:
            self._reads.make(lease_id, book, leased, now)
            books.hold(leased[-1])
            if tiers.promoting.keeps:
                for chunk in leased:
                    tiers.promoting.leased(chunk)
        rest, last = keys[len(found) :], found[-1] if found else None
        coming = tiers.follow(space, rest, last, book.node)
        writing = 0 if coming else space.being_written(rest, last)
        if not again:
            counters.lookups += 1
            counters.asked_chunks += len(keys) - skip
            counters.hit_chunks += len(leased)
            counters.disk_hit_chunks += coming
            counters.miss_chunks += len(keys) - skip - len(leased) - coming
        return LookupResult([chunk.location for chunk in leased], coming, writing)

    def release(self, session: SessionId, lease_ids: Sequence[LeaseId]) -> int:
        """End read leases; how many there were. Unknown ids are remembered: a late Lookup with one is refused."""
        book = self._sessions.get(session)
        self._check_count(lease_ids, self._limits.max_leases_per_session)
        self._advance()
        released = 0
        for lease_id in lease_ids:
            lease = book.reads.get(lease_id)
            if lease is not None:
                self._end_read(lease)
                released += 1
            elif lease_id not in book.writes:
                book.cancel(lease_id, self._limits.max_leases_per_session)
        return released

    def renew(self, session: SessionId, lease_ids: Sequence[LeaseId]) -> list[bool]:
        """Extend read leases; whether each lease is alive. A write lease has no end by time and needs no renewal."""
        book = self._sessions.get(session)
        self._check_count(lease_ids, self._limits.max_leases_per_session)
        now = self._advance()
        alive = []
        for lease_id in lease_ids:
            lease = book.reads.get(lease_id)
            if lease is not None:
                self._reads.renew(lease, now)
            alive.append(lease is not None or lease_id in book.writes)
        return alive

    # ------------------------------------------------------------ writing

    def reserve(
        self, session: SessionId, namespace_id: bytes, lease_id: LeaseId, items: Sequence[tuple[bytes, bytes]]
    ) -> list[ReserveResult]:
        """Slots to write chunks into; ``items`` are (key, parent), parents before their children."""
        book, space = self._sessions.get_open(session, namespace_id)
        self._check_keys([key for key, _ in items])
        self._check_keys([parent for _, parent in items if parent != ROOT])
        self._advance()
        book.check_new(lease_id, self._limits.max_leases_per_session)
        results = self._writing.reserve(book, space, lease_id, items)
        space.touched = self._books.last_stamp
        return results

    def commit(
        self,
        session: SessionId,
        namespace_id: bytes,
        lease_id: LeaseId,
        items: Sequence[tuple[bytes, Sequence[Stripe]]],
    ) -> list[CommitStatus]:
        """Bytes are in place; ``items`` are (key, stripes), no stripes meaning the whole chunk.

        PARTIAL as long as stripes are missing, even when the chunk is lost already: somebody may still be copying
        into its slot. ``InvalidRequest`` when a stripe is not inside the namespace's grid.
        """
        book, space = self._sessions.get_open(session, namespace_id)
        self._check_keys([key for key, _ in items])
        cells: list[tuple[bytes, int]] = []
        counted: Sequence[Stripe] | None = None
        mask = 0
        for key, stripes in items:
            if stripes is not counted:  # one list for all of thousands of keys is looked at once
                counted, mask = stripes, self._cells(space, stripes)
            cells.append((key, mask))
        self._advance()
        return self._writing.commit(space, self._write_lease(book, space, lease_id), cells)

    def abort(self, session: SessionId, namespace_id: bytes, lease_id: LeaseId, keys: Sequence[bytes]) -> int:
        """Give up reserved chunks, all of the lease when ``keys`` is empty; how many there were.

        An unknown lease id is remembered: a late Reserve with it is refused.
        """
        book, space = self._sessions.get_open(session, namespace_id)
        self._check_keys(keys)
        self._advance()
        lease = self._write_lease(book, space, lease_id)
        if lease is not None:
            return self._writing.abort(lease, keys)
        if lease_id not in book.reads:
            book.cancel(lease_id, self._limits.max_leases_per_session)
        return 0

    # ------------------------------------------------------------ the data plane

    def begin_io(
        self, session: SessionId, op: Op, lease_id: LeaseId, items: Sequence[Item]
    ) -> tuple[IoTicket, list[ItemStatus]]:
        """Ask to move bytes. Items that are OK stay in place until ``end_io``, whatever happens to lease or session."""
        book = self._sessions.get(session)
        self._check_count(items, MAX_ITEMS)
        self._advance()
        return self._transfers.begin(book, op, lease_id, items)

    def end_io(self, ticket: IoTicket, failed: Collection[int] = (), checksums: Mapping[int, int] = {}) -> None:
        """The transfer is over, before the client is told so. ``failed``: indices whose bytes did not arrive intact;
        ``checksums``: by index, XXH3-64 of those that were moved, where somebody has computed it."""
        self._transfers.end(ticket, failed, checksums, self._advance() + self._limits.quarantine_s)

    # ------------------------------------------------------------ pins and times of use

    def pin(self, tenant: str, namespace_id: bytes, key: bytes) -> int:
        """Keep the chunk with this key and all before it, or with an empty key all of the namespace, in the pool and on
        the disks; what is not there yet, from when it is stored. Idempotent. How many chunks are covered now.

        ``InvalidRequest`` when id or key have the wrong length, ``LimitReached`` when there are too many pins or more
        than half of a tier would be pinned. What a pin comes to cover later is left out where it would be more.
        """
        self._advance()
        covered = self._pins.pin(Pin(tenant, namespace_id, key))
        self.on_pins(self._pins.save())
        return covered

    def unpin(self, tenant: str, namespace_id: bytes, key: bytes) -> int:
        """Take a pin back; how many chunks it covered, 0 when there was none."""
        self._advance()
        covered = self._pins.unpin(Pin(tenant, namespace_id, key))
        self.on_pins(self._pins.save())
        return covered

    def pins(self, tenant: str) -> list[PinFigures]:
        """The pins of a tenant, and what they cover."""
        return self._pins.of(tenant)

    def load_pins(self, saved: object) -> None:
        """Pins of the daemon before, as ``on_pins`` heard them. Before or after what they cover is there again."""
        self._pins.load(saved)

    def save_times(self, wall: float) -> list[list[float]]:
        """When what is in the pool was used, as plain data; ``wall`` is the wall clock's time."""
        return self._books.expiry.save(wall, self._books.last_stamp)

    def load_times(self, saved: object, wall: float) -> None:
        """What ``save_times`` gave a former daemon. After the pool is restored, before anything else uses it."""
        self._books.expiry.restore(saved, wall, self._clock(), self._books.last_stamp)

    # ------------------------------------------------------------ keeping house

    def catch_up(self, most: int) -> bool:
        """Put the oldest uses that wait into the books, at most so many; whether no others wait.

        What depends on them does it by itself. A daemon that is killed has lost those that waited.
        """
        return self._uses.catch_up(most)

    def settle(self) -> None:
        """Put all uses that wait into the books: before the daemon ends, and what outlives it is closed."""
        self._books.settle()

    def on_behind(self, called: Callable[[], None]) -> None:
        """``called`` whenever uses wait and none did before; not called again while they do."""
        self._uses.on_behind = called

    def tick(self) -> None:
        """End what ends by time: read leases, quarantines. Every request does as much; this is for when none comes.

        And a part of what is done in the background: let go of what has expired, and keep some of the pool free.
        """
        self._advance()
        self._sweeper.step()
        keep_free(self._books)

    def drop(self, tenant: str, namespace_id: bytes | None) -> tuple[int, int]:
        """Drop what nobody holds of one namespace or of all of ``tenant``, from every tier.

        How many chunks are gone, and how many were kept.

        ``NamespaceUnknown`` when the tenant has no such namespace.
        """
        self._advance()
        spaces = [space for space in self._books.spaces.values() if space.namespace.tenant == tenant]
        unfound = self.tiers.unfound(tenant)
        if namespace_id is not None:
            spaces = [space for space in spaces if space.namespace.id == namespace_id]
            unfound = [one for one in unfound if one == namespace_id]
            if not spaces and not unfound:
                raise NamespaceUnknown("the tenant has nothing in this namespace")
        for one in unfound:
            self.tiers.drop_unfound(one)
        gone = kept = 0
        for space in spaces:
            known = len({*space.chunks, *space.records})
            self.tiers.spilling.withdraw(space)
            for top in [chunk for chunk in space.chunks.values() if not chunk.holds]:
                if space.chunks.get(top.key) is top:  # not gone with its parent yet
                    self.counters.dropped_chunks += self._books.evict(top)
            self.counters.dropped_records += self.tiers.drop(space)
            left = len({*space.chunks, *space.records})
            gone += known - left
            kept += left
            self._books.forget_if_empty(space)
        return gone, kept

    def audit(self) -> list[str]:
        """What does not agree between any two books; empty = clean. O(chunks), a few microseconds each."""
        return audit(self._books, self._sessions.books, self._reads, self._transfers, self.tiers)

    def stats(self) -> StoreStats:
        """A snapshot, read from the books. O(namespaces + sessions + leases)."""
        return figures(self._books, self._sessions.books.values(), self.tiers)

    # ------------------------------------------------------------ checks and steps

    def _check_count(self, things: Sequence[object], most: int) -> None:
        if len(things) > most:
            raise InvalidRequest(f"{len(things)} items in one request, at most {most}")

    def _check_keys(self, keys: Sequence[bytes]) -> None:
        self._check_count(keys, self._limits.max_chunks_per_request)
        if keys and set(map(len, keys)) != {KEY_BYTES}:
            raise InvalidRequest(f"a key is not {KEY_BYTES} bytes long")

    def _cells(self, space: Space, stripes: Sequence[Stripe]) -> int:
        self._check_count(stripes, MAX_STRIPES)
        cells = 0 if stripes else space.grid.whole
        for stripe in stripes:
            cells |= space.grid.bits(stripe)
        return cells

    def _write_lease(self, book: SessionBook, space: Space, lease_id: LeaseId) -> WriteLease | None:
        lease = book.writes.get(lease_id)
        if lease is not None and lease.space is not space:
            raise InvalidRequest(f"lease {lease_id} is of another namespace")
        return lease

    def _end_read(self, lease: ReadLease) -> None:
        self._reads.end(lease)
        self._books.unhold(lease.chunks[-1])

    def _advance(self) -> float:
        """End what has ended by now, so that no request sees it alive; the time that the request is judged by."""
        now = self._clock()
        while (lease := self._reads.expired(now)) is not None:
            self._end_read(lease)
            self.counters.expired_leases += 1
        self._books.end_quarantines(now)
        self._books.advance(now)
        self.tiers.tick(now)
        return now

    def missed(self, lookups: int, chunks: int) -> None:
        """A client has known so many lookups, of so many chunks, to be misses and has not asked. What no client can
        have known since its last report is not believed."""
        lookups = min(lookups, MAX_MISSED_LOOKUPS)
        chunks = min(chunks, lookups * self._limits.max_chunks_per_request)
        self.counters.lookups += lookups
        self.counters.asked_chunks += chunks
        self.counters.miss_chunks += chunks
