"""Pins, shares and times to live where there are disks and restarts: random lives, and a sentence for each promise."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from kvd.types import (
    ROOT,
    CommitStatus,
    LookupResult,
    Order,
    Pin,
    Read,
    ReserveResult,
    ReserveStatus,
    Share,
)
from kvd.wire.errors import LimitReached
from tests.unit.ledger import tier_life
from tests.unit.ledger.harness import key, keys
from tests.unit.ledger.tier_life import SLOT, SLOTS, Life

TTL_S = 60.0


class Steady(random.Random):
    """Nothing that may go wrong does."""

    def random(self) -> float:
        return 0.5


class KeptLife(Life):
    """A life with pins, and with what a daemon remembers of them and of the times of use.

    ``used``: the last time at which each chunk can have been used, by a client's request or because it came.
    """

    def __init__(self, seed: int, ttl_s: float = TTL_S, shares: tuple[Share, ...] = (), steady: bool = False) -> None:
        self.steady = steady
        self.saved_pins: list[list[str]] = []
        self.saved_times: list[list[float]] = []
        self.used: dict[bytes, float] = {}
        self.waiting: set[bytes] = set()
        super().__init__(seed, ttl_s=ttl_s, shares=shares)

    def start(self) -> None:
        if self.steady:
            self.dice = Steady(1)
        super().start()
        self.store.load_pins(self.saved_pins)
        self.store.load_times(self.saved_times, self.clock.now)
        self.store.on_pins = self.hear
        self.used = dict.fromkeys(self.used, self.clock.now)  # a restart may count as a use
        self.waiting.clear()
        self._lookup, self._reserve, self._commit = self.store.lookup, self.store.reserve, self.store.commit
        self.store.lookup, self.store.reserve, self.store.commit = self.lookup, self.reserve, self.commit_chunks

    def hear(self, saved: list[list[str]]) -> None:
        self.saved_pins = saved

    def pass_time(self) -> None:
        super().pass_time()
        if self.dice.random() < 0.6:
            self.saved_times = self.store.save_times(self.clock.now)

    def use(self, name: bytes) -> None:
        """A chunk, and so all above it, was used."""
        number = int.from_bytes(name, "big")
        while number > 1:
            self.used[key(number)] = self.clock.now
            number //= 2

    def lookup(self, session: int, space: bytes, lease: int, path: list[bytes], **how: Any) -> LookupResult:
        kept = self.kept()
        result = self._lookup(session, space, lease, path, **how)
        found = path[: len(result.locations)]
        for name in found:
            idle = self.clock.now - self.used[name]
            assert not self.ttl_s or idle < TTL_S + 1.0 or name in kept, "found after it had expired"
        for name in (found if not how.get("again") else [])[-1:] + path[: len(found) + result.promoting][len(found) :]:
            self.use(name)
        return result

    def reserve(self, session: int, space: bytes, lease: int, items: list[tuple[bytes, bytes]]) -> list[ReserveResult]:
        results = self._reserve(session, space, lease, items)
        for (name, _), result in zip(items, results, strict=True):
            if result.status is ReserveStatus.PRESENT:
                self.use(name)
        return results

    def commit_chunks(self, session: int, space: bytes, lease: int, items: list[tuple[bytes, Any]]) -> Any:
        statuses = self._commit(session, space, lease, items)
        self.waiting.update(name for name, _ in items)
        self.look_who_came()
        return statuses

    def carry_out(self, order: Order, *, answer: bool) -> None:
        super().carry_out(order, answer=answer)
        if isinstance(order, Read):
            self.use(order.key)
        self.look_who_came()

    def look_who_came(self) -> None:
        chunks = self.store._books.spaces[self.namespace.id].chunks
        for name in list(self.waiting):
            if name not in chunks or chunks[name].draft is None:
                self.waiting.discard(name)
                if name in chunks:
                    self.use(name)

    def kept(self) -> set[bytes]:
        """Keys that pins keep in the pool."""
        pins = self.store._books.pins
        assert pins is not None
        return {node.key for node in pins.reasons}

    def pin(self) -> None:
        name = self.dice.choice([self.path()[-1], self.path()[-1], b""])
        try:
            self.store.pin("t", self.namespace.id, name)
        except LimitReached:
            pass

    def unpin(self) -> None:
        pins = self.store.pins("t")
        if pins:
            self.store.unpin(*self.dice.choice(pins).pin)

    # -- by hand

    def bring(self, *numbers: int) -> None:
        """Store a prefix, and write it to the disk as far as that goes."""
        path = keys(*numbers)
        self.lease += 1
        items = list(zip(path, [ROOT, *path], strict=False))
        results = self.store.reserve(self.session, self.namespace.id, self.lease, items)
        for name, result in zip(path, results, strict=True):
            if result.location is not None:
                self.pool[result.location.offset] = (self.namespace.id, name)
        statuses = self.store.commit(self.session, self.namespace.id, self.lease, [(name, ()) for name in path])
        assert CommitStatus.WAITING_PARENT not in statuses
        self.settle()

    def on_disk(self, *numbers: int) -> list[int]:
        space = self.store._books.spaces[self.namespace.id]
        return [number for number in numbers if key(number) in space.records]

    def in_pool(self, *numbers: int) -> list[int]:
        space = self.store._books.spaces[self.namespace.id]
        return [number for number in numbers if key(number) in space.chunks]

    def found(self, *numbers: int) -> int:
        """How many a client gets that waits for what is on its way."""
        self.lease += 2
        first = self.store.lookup(self.session, self.namespace.id, self.lease - 1, keys(*numbers))
        self.settle()
        found = self.store.lookup(self.session, self.namespace.id, self.lease, keys(*numbers), again=True)
        self.store.release(self.session, [self.lease - 1, self.lease])
        assert len(first.locations) + first.promoting >= len(found.locations)
        return len(found.locations)

    def flood(self, first: int = 1000, count: int = 250) -> None:
        """Single chunks, unless told otherwise more than pool and disk hold."""
        for number in range(first, first + count):
            self.bring(number)
        assert self.store.audit() == []


@pytest.fixture
def large_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that holds many times what the pool does."""
    monkeypatch.setattr(tier_life, "EXTENTS", 40)


def steady_life(ttl_s: float = TTL_S, *shares: Share) -> KeptLife:
    """A life in which nothing goes wrong by itself."""
    return KeptLife(1, ttl_s, shares, steady=True)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("ttl_s", [0.0, TTL_S])
def test_whatever_happens_the_books_agree_and_nothing_expired_is_found(ttl_s: float, shared: bool) -> None:
    share = Share("t", None, 4 * SLOT, 12 * SLOT)
    seen: Counter[str] = Counter()
    wanted = {"pinned", "promoted_chunks", "spilled_chunks", "recovered_chunks"}
    expired = {"expired_chunks", "expired_records"}
    for seed in range(40):
        if seed >= 4 and all(seen[name] for name in (wanted | expired if ttl_s else wanted)):
            break  # these lives have shown what they are for
        life = KeptLife(seed, ttl_s, (share,) if shared else ())
        for _ in range(600):
            if life.dice.random() < 0.04:
                life.dice.choice([life.pin, life.unpin])()
                assert life.store.audit() == []
            life.step()
            pins = life.store._books.pins
            assert pins is not None and pins.bytes <= SLOTS * SLOT / 2
            if shared and not life.deaths:
                assert life.store.stats().tenants[0].bytes <= 12 * SLOT
            seen["pinned"] += len(life.kept())
        life.die()
        seen.update(life.seen)
    assert all(seen[name] for name in wanted)
    assert all(bool(seen[name]) == bool(ttl_s) for name in expired)


@pytest.mark.usefixtures("large_disk")
def test_a_pinned_prefix_stays_on_the_disk_when_everything_else_goes() -> None:
    life = steady_life(0.0)
    life.bring(2, 4, 8)
    life.bring(3, 6)
    life.store.pin("t", life.namespace.id, key(8))
    life.flood()
    assert life.store.counters.dropped_records > 50
    assert (life.on_disk(2, 4, 8), life.on_disk(3, 6)) == ([2, 4, 8], [])
    assert life.found(2, 4, 8) == 3
    assert life.store.audit() == []


@pytest.mark.usefixtures("large_disk")
def test_a_pin_set_while_it_lies_on_the_disk_only_counts_and_keeps_it_there() -> None:
    life = steady_life(0.0)
    life.bring(2, 4, 8)
    life.flood(count=30)
    assert (life.in_pool(2, 4, 8), life.on_disk(2, 4, 8)) == ([], [2, 4, 8])
    assert life.store.pin("t", life.namespace.id, key(8)) == 3
    assert life.store.pins("t") == [(Pin("t", life.namespace.id, key(8)), 3, 0)]
    life.flood(2000)
    assert life.on_disk(2, 4, 8) == [2, 4, 8]
    assert life.found(2, 4, 8) == 3
    assert life.store.pins("t") == [(Pin("t", life.namespace.id, key(8)), 3, 3 * SLOT)]
    life.flood(3000)
    assert life.in_pool(2, 4, 8) == [2, 4, 8]


def test_drop_leaves_what_is_pinned_in_every_tier() -> None:
    life = steady_life(0.0)
    life.bring(2, 4, 8)
    life.store.pin("t", life.namespace.id, key(4))
    assert life.store.drop("t", None) == (1, 2)
    assert (life.in_pool(2, 4, 8), life.on_disk(2, 4, 8)) == ([2, 4], [2, 4])


@pytest.mark.usefixtures("large_disk")
def test_what_is_pinned_survives_a_restart_and_what_is_found_damaged_does_not() -> None:
    life = steady_life(0.0)
    life.bring(2, 4, 8)
    life.store.pin("t", life.namespace.id, key(8))
    life.die()
    assert len(life.kept()) == 3
    life.settle()
    life.flood()
    assert life.found(2, 4, 8) == 3
    life.die()
    offset = life.store._books.spaces[life.namespace.id].chunks[key(4)].location.offset
    life.pool[offset] = (b"", b"damaged")
    life.settle()
    assert life.store.audit() == []
    assert life.in_pool(2, 4, 8) == [2]
    assert life.found(2, 4, 8) == 3  # from the disk
    assert len(life.kept()) == 3


@pytest.mark.usefixtures("large_disk")
def test_what_nobody_used_expires_on_the_disk_too() -> None:
    life = steady_life()
    life.bring(2, 4, 8)
    life.flood(count=30)
    life.clock.now += TTL_S / 2
    assert life.found(2, 4) == 2
    life.clock.now += TTL_S / 2 + 1.0
    life.bring(9000)
    assert life.store.lookup(life.session, life.namespace.id, 999, keys(2, 4, 8)).promoting == 0
    life.store.release(life.session, [999])
    for _ in range(3):
        life.store.tick()
    assert (life.on_disk(2, 4, 8), life.on_disk(*range(1000, 1030))) == ([2, 4], [])
    assert life.store.counters.expired_records == 31
    assert life.store.audit() == []


def test_times_of_use_survive_a_restart() -> None:
    life = steady_life()
    life.bring(2, 4)
    life.clock.now += 40.0
    life.store.tick()
    life.bring(3)
    life.saved_times = life.store.save_times(life.clock.now)
    life.die()
    life.settle()
    assert life.store.lookup(life.session, life.namespace.id, 999, []).locations == []
    life.clock.now += 25.0
    found = [len(life.store.lookup(life.session, life.namespace.id, 999 + n, keys(n)).locations) for n in (2, 3)]
    assert found == [0, 1]


@pytest.mark.usefixtures("large_disk")
def test_a_hard_share_of_the_disk_is_not_exceeded_and_its_coldest_make_way() -> None:
    life = steady_life(0.0, Share("t", None, None, 24 * SLOT))
    life.flood(count=60)
    record_bytes = life.extents.record_bytes(SLOT)
    most = 24 * SLOT // record_bytes
    assert life.on_disk(*range(1000, 1060)) == [*range(1060 - most, 1060)]


def test_what_its_share_leaves_no_room_for_is_not_written_and_holds_nobody_up() -> None:
    life = steady_life(0.0, Share("t", None, None, 24 * SLOT))
    records = life.store.tiers.records
    assert records is not None and records.shares is not None
    records.shares.tenants["t"].hard_bytes = 1
    life.bring(2)
    assert (life.on_disk(2), life.store.counters.unspilled_share, life.store.tiers.spilling.queued_chunks) == ([], 1, 0)
    records.shares.tenants["t"].hard_bytes = 1 << 30
    life.bring(3)
    assert life.on_disk(3) == [3]
    assert life.store.audit() == []


def test_a_chunk_larger_than_what_may_be_on_its_way_comes_up_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_life, "SLOTS", 2)
    life = steady_life(0.0)
    life.bring(2)
    life.bring(3)
    life.bring(5)
    life.bring(7)
    assert life.in_pool(2) == [] and life.on_disk(2) == [2]
    assert life.found(2) == 1
    assert life.store.audit() == []


def test_what_was_not_written_when_it_came_is_written_when_it_is_used() -> None:
    life = steady_life()
    life.drive()
    life.bring(2, 4)
    life.extents.set_working(0, True)
    life.store.tiers.drives_changed()
    life.settle()
    assert life.on_disk(2, 4) == []
    life.store.lookup(life.session, life.namespace.id, 900, keys(2, 4))
    life.store.settle()
    life.settle()
    assert life.on_disk(2, 4) == [2, 4]
