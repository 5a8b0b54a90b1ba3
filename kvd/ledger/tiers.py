"""The tiers together: what goes down to the disks, what comes up from them, and what a former daemon left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvd.ledger.books import Books
from kvd.ledger.chunk import Chunk
from kvd.ledger.eviction import EvictionPolicy
from kvd.ledger.index import Space
from kvd.ledger.orders import Orders
from kvd.ledger.promoting import Promoting
from kvd.ledger.reclaiming import Reclaiming
from kvd.ledger.records import Record
from kvd.ledger.restoring import PoolRestorer, RecordRestorer
from kvd.ledger.spilling import Habits, Spilling
from kvd.ledger.terms import Budget, DiskFigures, ExtentSpace
from kvd.types import Namespace, SlotEntry

#: How often it is looked whether the writers of a former daemon have gone.
PROOF_EVERY_S = 0.25
#: Namespaces that were dropped and are remembered, the last ones.
MAX_DROPPED = 4096


def _nobody() -> None:
    """Who hears of drops when they are not remembered."""


@dataclass(frozen=True, slots=True)
class Disks:
    """The disks of a store: their space, which record goes first, and how they are used."""

    extents: ExtentSpace
    policy: EvictionPolicy[Record]
    budget: Budget | None = None
    habits: Habits = field(default_factory=Habits)


class Tiers:
    """What the store asks of the tiers. ``sealing``: chunks get a checksum even when there are no disks."""

    def __init__(
        self, books: Books, disks: Disks | None, *, sealing: bool, clock: Callable[[], float], quarantine_s: float
    ) -> None:
        self._books = books
        self._clock = clock
        self._quarantine_s = quarantine_s
        self.orders = Orders()
        self.orders.before = lambda: books.advance(clock())
        self.records = books.records
        budget, habits = (None, Habits()) if disks is None else (disks.budget, disks.habits)
        reclaiming = None if self.records is None else Reclaiming(self.orders, self.records, books.counters, budget)
        self.spilling = Spilling(books, self.orders, self.records, reclaiming, budget, habits, clock)
        self.promoting = Promoting(books, self.orders, self.records, clock, books.slots.total_bytes)
        self.promoting.on_damaged = self.spilling.forget
        self._reclaiming = reclaiming
        if reclaiming is not None:
            reclaiming.on_room = self.spilling.pump
        #: Whether chunks are kept anywhere but in this daemon's pool.
        self.keeps = sealing or self.records is not None
        if self.keeps:
            books.on_ready = self.spilling.offer
        #: By namespace, the sequence up to which its records were dropped by somebody's wish: they may lie there still.
        self.dropped: dict[bytes, int] = {}
        #: Hears that there is something new in ``dropped``.
        self.on_drop: Callable[[], None] = _nobody
        self._unproven: list[tuple[int, Chunk]] = []
        self._gone: Callable[[int], bool] = bool
        self._next_proof = 0.0
        #: The namespaces of which a scan may find records; none when there is no scan.
        self._described: Callable[[], Mapping[bytes, Namespace]] = dict

    # ------------------------------------------------------------ day by day

    def follow(self, space: Space, keys: Sequence[bytes], previous: Chunk | None, near: int | None = None) -> int:
        """How many of ``keys`` continue the READY prefix that ends in ``previous`` and are on their way up; to the
        memory node ``near`` if that has room."""
        if self.records is None and not self._books.stale:
            return 0
        return self.promoting.follow(space, keys, previous, near)

    def tick(self, now: float) -> None:
        """What is due by now."""
        self.promoting.tick(now)
        if self._unproven and now >= self._next_proof:
            self._next_proof = now + PROOF_EVERY_S
            self._prove(now)
        if self._reclaiming is not None:
            self._reclaiming.work()
            self.spilling.catch_up()
            self.spilling.pump()

    def drives_changed(self) -> None:
        """A drive has begun or ceased to work."""
        if self.records is not None and not self.records.extents.total_bytes:
            self.spilling.withdraw()
        self.spilling.pump()

    def lost(self, drive: int, extents: Iterable[int]) -> None:
        """What lay in these extents of a drive is not there any more."""
        if self.records is not None:
            self._books.counters.dropped_records += self.records.lost(drive, extents)

    def drop(self, space: Space) -> int:
        """Drop the records of a namespace that nobody holds; how many. What is held now does not outlive the daemon."""
        records, dropped = self.records, 0
        if records is None:
            return 0
        self.drop_unfound(space.namespace.id)
        for top in [record for record in space.records.values() if not record.holds]:
            if space.records.get(top.key) is top:  # not gone with its parent yet
                dropped += records.drop(top)
        return dropped

    def unfound(self, tenant: str) -> list[bytes]:
        """Namespaces of ``tenant`` that the books do not have, and of which a scan under way may find records."""
        described = self._described().values()
        return [one.id for one in described if one.tenant == tenant and one.id not in self._books.spaces]

    def drop_unfound(self, namespace_id: bytes) -> None:
        """No record of the namespace that was written until now is taken by a scan, now or after a start."""
        assert self.records is not None
        self.dropped.pop(namespace_id, None)
        self.dropped[namespace_id] = self.records.extents.last_sequence
        if len(self.dropped) > MAX_DROPPED:
            del self.dropped[next(iter(self.dropped))]
        self.on_drop()

    # ------------------------------------------------------------ after a start

    def restore(
        self, entries: Sequence[SlotEntry], namespaces: Mapping[bytes, Namespace], gone: Callable[[int], bool]
    ) -> int:
        """Take over a former daemon's slots; how many were not sound. Before anything else has been done.

        ``gone`` says of the id of a daemon whether every process that it let write has ended, or has let go.
        """
        restorer = PoolRestorer(self._books, namespaces)
        chunks = restorer.restore(entries)
        self._unproven, self._gone = restorer.unproven, gone
        self.spilling.postpone(chunks)
        self.promoting.check(chunks)
        return restorer.skipped

    def scanned(self) -> None:
        """The scan is through: what has no record now has none."""
        self._described = dict
        self.spilling.scanned()

    def scan(self, namespaces: Callable[[], Mapping[bytes, Namespace]]) -> RecordRestorer:
        """Takes what a scan of the disks finds."""
        assert self.records is not None
        self._described = namespaces
        return RecordRestorer(self._books, self.records, namespaces, self.dropped)

    def _prove(self, now: float) -> None:
        """Slots that nobody can be writing any more go into quarantine, like those of any dead writer."""
        gone = {life for life in {life for life, _ in self._unproven} if self._gone(life)}
        for life, chunk in self._unproven:
            if life in gone:
                self._books.quarantine.append((now + self._quarantine_s, chunk))
        self._unproven = [(life, chunk) for life, chunk in self._unproven if life not in gone]

    # ------------------------------------------------------------ figures

    @property
    def unproven(self) -> Iterable[Chunk]:
        """Slots whose writers are not proven gone; for the audit."""
        return (chunk for _, chunk in self._unproven)

    def figures(self) -> DiskFigures:
        """What the disks hold, and what is on its way."""
        records = self.records
        return DiskFigures(
            records=0 if records is None else records.count,
            live_bytes=0 if records is None else records.extents.live_bytes,
            total_bytes=0 if records is None else records.extents.total_bytes,
            queue_chunks=self.spilling.queued_chunks,
            queue_bytes=self.spilling.queued_bytes,
            promoting_chunks=self.promoting.chunks,
        )
