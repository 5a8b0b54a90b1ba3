"""What a former daemon left and never wrote is not evicted before the scan of the disks tells whether it must be."""

from __future__ import annotations

import random

import pytest

from kvd.ledger.spilling import BACKLOG_S
from kvd.types import ROOT, ReserveStatus
from tests.unit.ledger.harness import key
from tests.unit.ledger.tier_life import SLOTS, Life


class Lucky(random.Random):
    """Nothing fails by chance."""

    def random(self) -> float:
        return 0.94


@pytest.fixture
def life() -> Life:
    """A daemon with a pool full of chunks that the one before had not written when it died."""
    return restarted(SLOTS)


def restarted(chunks: int) -> Life:
    """The same with so many chunks, one below the other."""
    life = lucky_life()
    granted = store(life, [key(number) for number in range(1, chunks + 1)])
    assert granted == [ReserveStatus.GRANTED] * chunks
    life.commit()
    life.journal.life += 1
    life.orders.clear()
    life.start()
    life.store.tick()
    life.settle()  # all have their checksums
    return life


def lucky_life() -> Life:
    """A store, its pool and its disk."""
    life = Life(0)
    life.dice = Lucky(0)
    life.start()
    return life


def store(life: Life, keys: list[bytes]) -> list[ReserveStatus]:
    """Reserves a path."""
    life.lease += 1
    items = list(zip(keys, [ROOT, *keys], strict=False))
    results = life.store.reserve(life.session, life.namespace.id, life.lease, items)
    granted = {k: r.location.offset for k, r in zip(keys, results, strict=True) if r.location is not None}
    if granted:
        life.writing.append((life.lease, granted))
    return [result.status for result in results]


def test_nothing_goes_before_the_scan_is_through_and_everything_is_written_then(life: Life) -> None:
    assert store(life, [key(100)]) == [ReserveStatus.NO_ROOM]
    life.store.tiers.scanned()
    assert store(life, [key(100)]) == [ReserveStatus.NO_ROOM]
    life.store.tick()
    life.settle()
    assert life.store.audit() == []
    assert life.store.stats().disk.records == SLOTS
    assert store(life, [key(100)]) == [ReserveStatus.GRANTED]


def test_a_chunk_stored_below_them_meanwhile_is_written_like_them() -> None:
    life = restarted(3)
    assert store(life, [*(key(number) for number in range(1, 4)), key(200)])[-1] is ReserveStatus.GRANTED
    life.commit()
    life.settle()
    assert life.store.stats().disk.records == 0
    life.store.tiers.scanned()
    life.store.tick()
    life.settle()
    assert key(200) in life.store._books.spaces[life.namespace.id].records
    assert life.store.audit() == []


def test_while_a_scan_does_not_end_nothing_is_remembered_for_its_end() -> None:
    life = restarted(3)
    life.clock.now += BACKLOG_S + 0.1
    for number in range(200, 300):
        store(life, [*(key(number) for number in range(1, 4)), key(number)])
        life.commit()
        life.store.tick()
        life.settle()
        assert life.store.audit() == []
    assert life.store.stats().counters["evicted_chunks"] > 0
    assert len(life.store.tiers.spilling._postponed) == 3


def test_a_scan_that_takes_too_long_is_not_waited_for(life: Life) -> None:
    life.clock.now += BACKLOG_S - 0.1
    life.store.tick()
    assert store(life, [key(100)]) == [ReserveStatus.NO_ROOM]
    life.clock.now += 0.2
    life.store.tick()
    assert store(life, [key(100)]) == [ReserveStatus.GRANTED]
    assert life.store.audit() == []


def test_what_is_dropped_meanwhile_is_not_kept(life: Life) -> None:
    assert life.store.drop("t", life.namespace.id) == (SLOTS, 0)
    assert store(life, [key(100)]) == [ReserveStatus.GRANTED]
    assert life.store.audit() == []


def test_what_turns_out_to_be_damaged_goes_with_all_below_it() -> None:
    life = lucky_life()
    store(life, [key(number) for number in range(1, 4)])
    life.commit()
    life.settle()  # sealed, and written
    for offset in list(life.pool):
        life.pool[offset] = (b"spoiled", b"")
    life.journal.life += 1
    life.disk.clear()
    life.start()
    life.settle()
    assert life.store.audit() == []
    assert life.store.stats().counters["condemned_chunks"] == 3
