"""A store over a small pool and a small disk, both of them simulated, and a life that can end at any moment.

The pool and the disk hold, instead of bytes, the (namespace, key) that was written there: whatever is read must be what
was asked for. Orders are carried out in any order, sometimes wrongly; the daemon dies at any step and the next one
begins with what its journal and its disk say.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kvd.ledger.eviction import EvictionPolicy, LeafLru
from kvd.ledger.shares import SharedPolicy
from kvd.ledger.spilling import Habits
from kvd.memory.slabs import SlabAllocator
from kvd.spill.extents import Extents
from kvd.store import ChunkStore, Disks, Limits
from kvd.types import (
    ROOT,
    Found,
    LookupResult,
    Move,
    Namespace,
    Order,
    Outcome,
    Place,
    Read,
    ReserveStatus,
    Result,
    Seal,
    Share,
    SlotEntry,
    Verify,
    Write,
)
from kvd.wire.identity import Identity
from tests.unit.ledger.harness import GRANULE, Clock, Shown, Table, key

EXTENT_BYTES = 16 * GRANULE
EXTENTS = 8
SLOTS = 16
SLOT = 2 * GRANULE

Content = tuple[bytes, bytes]


class Lru(LeafLru[Any]):
    """Insists that all uses are in when somebody is chosen to go."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self._life = life

    def coldest(self, size_class: int) -> Any:
        uses = self._life.store._uses
        assert not uses._queue or uses._catching_up, "somebody was chosen while uses waited"
        return super().coldest(size_class)


class Journal:
    """A slot table in memory."""

    def __init__(self) -> None:
        self.entries: dict[int, SlotEntry] = {}
        self.namespaces: dict[bytes, Namespace] = {}
        self.life = 1

    def describe(self, namespace: Namespace) -> None:
        self.namespaces[namespace.id] = namespace

    def forget(self, namespace_id: bytes) -> None:
        assert all(entry.namespace_id != namespace_id for entry in self.entries.values())

    def granted(
        self, offset: int, generation: int, namespace_id: bytes, key: bytes, parent: bytes, chunk_bytes: int
    ) -> None:
        assert offset not in self.entries and namespace_id in self.namespaces
        self.entries[offset] = SlotEntry(
            offset, generation, namespace_id, key, parent, chunk_bytes, False, None, 0, 0, self.life
        )

    def ready(self, offset: int, touched: int, uses: int) -> None:
        self.entries[offset] = replace(self.entries[offset], ready=True, touched=touched, uses=uses)

    def sealed(self, offset: int, checksum: int) -> None:
        assert self.entries[offset].ready
        self.entries[offset] = replace(self.entries[offset], checksum=checksum)

    def used(self, offset: int, touched: int, uses: int) -> None:
        assert self.entries[offset].ready
        self.entries[offset] = replace(self.entries[offset], touched=touched, uses=uses)

    def freed(self, offset: int) -> None:
        del self.entries[offset]


class Budget:
    """Sometimes there is nothing left of it."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice

    def take(self, size_bytes: int) -> bool:
        return self._dice.random() < 0.95

    def give(self, size_bytes: int) -> None:
        pass

    def count(self, size_bytes: int) -> None:
        pass


class Life:
    """One machine: pool, disk, clients. ``start`` begins a daemon on whatever is there."""

    def __init__(self, seed: int, *, ttl_s: float = 0.0, shares: Sequence[Share] = ()) -> None:
        """``shares``: of the pool, and the same number of bytes of the disk."""
        self.ttl_s = ttl_s
        self.shares = shares
        self.dice = random.Random(seed)
        self.clock = Clock()
        self.journal = Journal()
        self.pool: dict[int, Content] = {}
        self.disk: dict[tuple[int, int], tuple[Content, bytes, Place]] = {}  # by extent and offset
        self.writers: set[int] = set()  # lives whose writers are not gone
        self.generation = 0
        self.served = self.from_disk = self.deaths = 0
        self.seen: dict[str, int] = {}
        self.start()

    # -- daemons

    def start(self) -> None:
        self.table = Table()
        self.shown = Shown()
        self.extents = Extents(1, first_sequence=self.dice.randrange(1, 5))
        existing = {extent for extent, _ in self.disk}
        self.extents.attach(0, EXTENT_BYTES + GRANULE, EXTENTS, existing)
        disks = Disks(
            self.extents,
            self.policy(lambda record: record.place.record_bytes),
            Budget(self.dice),
            Habits(reused_only=self.dice.random() < 0.2),
        )
        self.store = ChunkStore(
            SlabAllocator(SLOTS * SLOT),
            self.table,
            Limits(max_writing_share=1.0, quarantine_s=1.0),
            self.clock,
            self.policy(lambda chunk: SLOT),
            first_generation=self.generation,
            journal=self.journal,
            disks=disks,
            ttl_s=self.ttl_s,
            presence=self.shown,
        )
        entries = list(self.journal.entries.values())
        self.dice.shuffle(entries)
        self.store.tiers.restore(entries, dict(self.journal.namespaces), lambda life: life not in self.writers)
        for offset in [offset for offset in self.journal.entries if offset not in self.slots_in_books()]:
            del self.journal.entries[offset]
        self.scan = self.store.tiers.scan(lambda: self.journal.namespaces)
        self.unscanned = sorted(existing)
        self.dice.shuffle(self.unscanned)
        self.session = self.dice.randrange(1, 1 << 30)
        self.store.open_session(self.session, "t")
        self.namespace = self.store.open_namespace(self.session, Identity("m", "r"), SLOT)
        self.lease = 0
        self.orders: list[Order] = []
        self.held: list[tuple[int, LookupResult, list[bytes]]] = []
        self.writing: list[tuple[int, dict[bytes, int]]] = []

    def policy(self, size: Callable[[Any], int]) -> EvictionPolicy[Any]:
        return SharedPolicy(self.shares, lambda: Lru(self), size) if self.shares else Lru(self)

    def slots_in_books(self) -> set[int]:
        return set(self.store._books.by_offset)

    def die(self) -> None:
        """SIGKILL; whoever was writing may go on to do so."""
        self.deaths += 1
        for name, count in self.store.stats().counters.items():
            self.seen[name] = self.seen.get(name, 0) + count
        self.generation = self.store._books.last_generation
        if self.writing and self.dice.random() < 0.5:
            self.writers.add(self.journal.life)
        for order in list(self.orders):  # what had begun may or may not have reached the disk
            if self.dice.random() < 0.5:
                self.carry_out(order, answer=False)
        self.journal.life += 1
        self.start()

    # -- what a client does

    def path(self) -> list[bytes]:
        number, path = self.dice.randrange(2, 60), []
        while number > 1:
            path.insert(0, key(number))
            number //= 2
        return path

    def store_path(self) -> None:
        path = self.path()
        self.lease += 1
        items = list(zip(path, [ROOT, *path], strict=False))
        results = self.store.reserve(self.session, self.namespace.id, self.lease, items)
        granted = {
            name: result.location.offset
            for (name, _), result in zip(items, results, strict=True)
            if result.status is ReserveStatus.GRANTED and result.location is not None
        }
        if granted:
            self.writing.append((self.lease, granted))

    def commit(self) -> None:
        if self.writing:
            lease, granted = self.writing.pop(self.dice.randrange(len(self.writing)))
            if self.dice.random() < 0.1:
                self.store.abort(self.session, self.namespace.id, lease, [])
                return
            for name, offset in granted.items():
                self.pool[offset] = (self.namespace.id, name)
            self.store.commit(self.session, self.namespace.id, lease, [(name, ()) for name in granted])

    def look(self, again: bool = False) -> None:
        path = self.path()
        self.lease += 1
        shown = [self.shown.may_hold(self.namespace.id, name) for name in path]
        result = self.store.lookup(self.session, self.namespace.id, self.lease, path, again=again)
        assert result.promoting + len(result.locations) <= len(path)
        assert all(shown[: len(result.locations) + result.promoting]), "a client would not have asked"
        for name, location in zip(path, result.locations, strict=False):
            assert self.pool[location.offset] == (self.namespace.id, name), "wrong bytes"
            assert self.table.words[location.offset] == location.generation
            self.served += 1
        if result.locations:
            self.held.append((self.lease, result, path))

    def release(self) -> None:
        if self.held:
            lease, result, path = self.held.pop(self.dice.randrange(len(self.held)))
            for name, location in zip(path, result.locations, strict=False):
                if self.table.words.get(location.offset) == location.generation:
                    assert self.pool[location.offset] == (self.namespace.id, name), "leased bytes changed"
            self.store.release(self.session, [lease])

    def pass_time(self) -> None:
        if self.dice.random() < 0.3:
            self.writers.clear()
        self.clock.now += self.dice.choice([0.1, 0.6, 2.5, 40.0])
        self.store.tick()

    def catch_up(self) -> None:
        self.store.catch_up(self.dice.choice([1, 3, 100]))

    def drop(self) -> None:
        self.store.drop("t", self.namespace.id)

    def drive(self) -> None:
        self.extents.set_working(0, not self.extents.works(0))
        self.store.tiers.drives_changed()

    # -- what threads do

    def move_bytes(self) -> None:
        self.orders += self.store.tiers.orders.take()
        if self.orders:
            self.carry_out(self.orders.pop(self.dice.randrange(len(self.orders))), answer=True)

    def scan_one(self) -> None:
        if not self.unscanned:
            return
        extent = self.unscanned.pop()
        batch = []
        for (number, _), (content, parent, place) in sorted(self.disk.items()):
            if number == extent and self.dice.random() < 0.97:
                batch.append(Found(content[0], content[1], parent, SLOT, place))
        self.scan.found(batch)
        self.extents.scanned(0, extent)
        if not self.unscanned:
            self.scan.end()
            self.store.tiers.scanned()

    def carry_out(self, order: Order, *, answer: bool) -> None:
        outcome, checksum = Outcome.OK, 0
        if self.dice.random() < 0.03 or not self.extents.works(0):
            outcome = Outcome.FAILED
        elif isinstance(order, Seal):
            checksum = hash(self.pool[order.offset])
        elif isinstance(order, Verify):
            good = hash(self.pool.get(order.offset)) == order.checksum and self.dice.random() < 0.97
            outcome = Outcome.OK if good else Outcome.CORRUPT
        elif isinstance(order, Write):
            assert self.pool[order.offset] == (order.namespace.id, order.key), "the slot changed under a writer"
            self.put(order.place, (order.namespace.id, order.key), order.parent)
        elif isinstance(order, Read):
            content, parent, place = self.disk[order.place.extent, order.place.offset]
            assert (content, parent, place) == ((order.namespace.id, order.key), order.parent, order.place)
            outcome = Outcome.OK if self.dice.random() < 0.95 else Outcome.CORRUPT
            self.pool[order.offset] = content
            checksum = hash(content)
            self.from_disk += 1
        elif isinstance(order, Move):
            content, parent, place = self.disk[order.source.extent, order.source.offset]
            assert (content, place) == ((order.namespace.id, order.key), order.source)
            outcome = Outcome.OK if self.dice.random() < 0.95 else Outcome.CORRUPT
            if outcome is Outcome.OK:
                self.put(order.target, content, parent)
        if answer:
            self.store.tiers.orders.finish(Result(order.ticket, outcome, checksum))

    def put(self, place: Place, content: Content, parent: bytes) -> None:
        """A record is written: a new life of its extent makes an end of what lay there."""
        for where in [where for where, (_, _, old) in self.disk.items() if where[0] == place.extent]:
            if self.disk[where][2].life != place.life:
                del self.disk[where]
        self.disk[place.extent, place.offset] = (content, parent, place)

    # -- a life

    def settle(self) -> None:
        """Until nothing is left to do."""
        while self.unscanned:
            self.scan_one()
        self.extents.set_working(0, True)
        for _ in range(1000):
            self.move_bytes()
            self.orders += self.store.tiers.orders.take()
            if not self.orders:
                break

    def step(self) -> None:
        steps = {
            self.store_path: 6,
            self.commit: 6,
            self.look: 8,
            lambda: self.look(again=True): 1,
            self.release: 4,
            self.move_bytes: 25,
            self.scan_one: 3,
            self.pass_time: 2,
            self.catch_up: 3,
            self.drop: 0.1,
            self.drive: 0.3,
            self.die: 0.5,
        }
        self.dice.choices(list(steps), list(steps.values()))[0]()
        findings = self.store.audit()
        assert findings == [], findings
