"""Time to live: never early, never much too late, and what has expired goes. Each test ends in an audit."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.ledger.expiry import Expiry
from kvd.types import ROOT, ReserveStatus
from tests.unit.ledger.harness import Pool, chain, key, keys

TTL_S = 100.0
BUCKET_S = 1.0
times = st.sampled_from([0.0, 0.3, 0.9, 1.0, 2.5, 33.0, 99.0, 250.0])


# ---------------------------------------------------------------- the marks


@given(
    ttl_s=st.sampled_from([0.5, 1.0, 30.0, 1000.0]),
    steps=st.lists(st.tuples(times, st.integers(0, 3)), max_size=80),
    ends=st.sets(st.integers(0, 79)),
)
def test_nothing_expires_early_and_nothing_late_by_more_than_a_bucket(
    ttl_s: float, steps: list[tuple[float, int]], ends: set[int]
) -> None:
    """Some of the steps are the end of a life, and the begin of another, whose clock shows something else."""
    expiry, used, now, wall = Expiry(ttl_s), [0.0], 0.0, 5000.0
    for number, (passed, uses) in enumerate(steps):
        if number in ends:
            # Stopped in good order. The next life begins after ``passed``.
            saved = expiry.save(wall, len(used) - 1)
            expiry, now = Expiry(ttl_s), now + passed
            expiry.restore(saved, wall + passed, now, len(used) - 1)
        else:
            now += passed
        wall += passed
        expiry.advance(now, len(used) - 1)
        used += [now] * uses
        late = max(1.0, ttl_s / 100)
        for stamp, at in enumerate(used[1:], start=1):
            assert stamp > expiry.dead or now - at >= ttl_s, "expired early"
            assert stamp <= expiry.dead or now - at < ttl_s + late, "expired late"
        assert len(expiry.save(wall, len(used) - 1)) <= 103
        assert expiry.dead <= expiry.opened <= len(used)


def test_what_was_used_after_the_marks_were_saved_counts_as_used_at_the_restart() -> None:
    expiry = Expiry(TTL_S)
    expiry.advance(0.0, 0)
    saved = expiry.save(1000.0, 10)
    reborn = Expiry(TTL_S)
    reborn.restore(saved, 1090.0, 7.0, 20)
    reborn.advance(7.0 + TTL_S - 90.0, 20)
    assert reborn.dead == 10
    reborn.advance(7.0 + TTL_S - 0.1, 20)
    assert reborn.dead == 10
    reborn.advance(7.0 + TTL_S, 20)
    assert reborn.dead == 20


def test_without_marks_what_is_there_counts_as_used_when_it_is_first_asked() -> None:
    expiry = Expiry(TTL_S)
    expiry.advance(50.0, 1000)
    expiry.advance(50.0 + TTL_S - 0.1, 1000)
    assert expiry.dead == 0
    expiry.advance(50.0 + TTL_S, 1000)
    assert expiry.dead == 1000


@pytest.mark.parametrize(
    "saved",
    [
        None,
        7,
        "x",
        [7],
        [[1.0]],
        [["a", 3]],
        [[float("nan"), 3]],
        [[float("inf"), 3]],
        [[1.0, 2.5]],
        [[900.0, -4]],
        [[900.0, 10], [800.0, 20]],
        [[5000.0, 1 << 60]],
        [[900.0 + n / 1e6, n] for n in range(1, 2000)],
    ],
)
def test_marks_that_make_no_sense_make_nothing_expire_early(saved: object) -> None:
    expiry = Expiry(TTL_S)
    expiry.restore(saved, 950.0, 0.0, 30)  # whatever they say is 50 s old, or is not believed
    expiry.advance(49.0, 30)
    assert expiry.dead == 0
    expiry.advance(TTL_S, 30)
    assert expiry.dead == 30
    assert len(expiry.save(0.0, 30)) <= 250


def test_a_wall_clock_that_was_set_back_makes_nothing_expire_early() -> None:
    expiry = Expiry(TTL_S)
    expiry.restore([[5000.0, 10]], 1000.0, 0.0, 10)
    expiry.advance(TTL_S - 0.1, 10)
    assert expiry.dead == 0


# ---------------------------------------------------------------- the store


def test_without_a_time_to_live_nothing_expires(pool: Pool) -> None:
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *chain(1, 2))
    pool.pass_time(1e9)
    assert pool.stored(session, namespace, *keys(1, 2)) == 2


def test_what_was_not_used_for_the_time_to_live_is_not_found_and_its_slots_are_free() -> None:
    pool = Pool(64, ttl_s=TTL_S)
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *chain(1, 2, 3))
    pool.clock.now += TTL_S - 0.1
    pool.store.tick()
    pool.audited()
    assert pool.store.stats().pool.ready_bytes == 3 * 4096
    pool.clock.now += 0.1 + BUCKET_S
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 0
    pool.audited()
    pool.store.tick()
    assert pool.store.stats().pool.ready_bytes == 0
    assert pool.store.counters.expired_chunks == 3
    pool.audited()


def test_every_use_begins_the_time_anew_for_all_above_it() -> None:
    pool = Pool(64, ttl_s=TTL_S)
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *chain(1, 2, 3))
    for _ in range(5):
        pool.pass_time(TTL_S * 0.9)
        assert pool.stored(session, namespace, *keys(1, 2)) == 2
        pool.audited()
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 2


def test_what_grows_at_its_end_does_not_expire_at_its_root() -> None:
    pool = Pool(64, ttl_s=TTL_S)
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *chain(1))
    for number in range(2, 10):
        pool.pass_time(TTL_S * 0.4)
        pool.write(session, namespace, *chain(number, parent=key(number - 1)))
        pool.audited()
    assert pool.stored(session, namespace, *keys(*range(1, 10))) == 9


def test_storing_again_what_is_there_is_a_use_of_all_above_it() -> None:
    pool = Pool(64, ttl_s=TTL_S)
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *chain(1, 2, 3))
    pool.pass_time(TTL_S * 0.9)
    assert pool.reserve(session, namespace, *chain(3, parent=key(2))).statuses == [ReserveStatus.PRESENT]
    pool.pass_time(TTL_S * 0.9)
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 3
    pool.audited()


def test_storing_below_what_has_expired_makes_it_found_again() -> None:
    """Nothing says "stored" that a lookup would then miss."""
    pool = Pool(64, ttl_s=TTL_S)
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *chain(1, 2))
    pool.clock.now += TTL_S + BUCKET_S
    pool.write(session, namespace, *chain(3, parent=key(2)))
    pool.audited()
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 3


def test_what_is_leased_when_it_expires_goes_when_it_is_released() -> None:
    pool = Pool(64, ttl_s=TTL_S, read_lease_s=1000.0)
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *chain(1, 2, 3))
    lease, _ = pool.lease(session, namespace, *keys(1, 2))
    for _ in range(3):
        pool.pass_time(TTL_S)
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 0
    assert pool.store.stats().pool.ready_bytes == 2 * 4096
    pool.audited()
    pool.store.release(session, [lease])
    pool.pass_time(0.5)
    pool.pass_time(0.5)
    assert pool.store.stats().pool.ready_bytes == 0
    pool.audited()


def test_a_long_chain_that_expires_goes_a_part_at_a_time() -> None:
    pool = Pool(4096, ttl_s=TTL_S)
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *chain(*range(1, 2001)))
    left = [2000]
    pool.clock.now += TTL_S + BUCKET_S
    while left[-1]:
        pool.store.tick()
        left.append(pool.store.stats().tenants[0].chunks)
        assert left[-2] - left[-1] <= 256
    assert len(left) == 1 + 8
    pool.audited()


@pytest.mark.parametrize("seed", range(6))
def test_random_lives_never_find_what_expired_nor_lose_what_did_not(seed: int) -> None:
    dice = random.Random(seed)
    pool = Pool(256, ttl_s=TTL_S, read_lease_s=1000.0)  # room for everything: nothing is evicted
    session = pool.session()
    namespace = pool.namespace(session)
    used: dict[int, float] = {}

    def path_to(number: int) -> list[int]:
        return [number >> shift for shift in reversed(range(number.bit_length()))]

    def use(path: list[int]) -> None:
        used.update(dict.fromkeys(path, pool.clock.now))

    for _ in range(400):
        pool.clock.now += dice.choice([0.0, 0.2, 1.0, 7.0, 30.0])
        path = path_to(dice.randrange(1, 100))
        if dice.random() < 0.3:
            pool.store.tick()
        elif dice.random() < 0.5:
            begin = dice.randrange(len(path))  # sometimes only the end of it
            items = list(zip(keys(*path), [ROOT, *keys(*path)], strict=False))[begin:]
            reserved = pool.reserve(session, namespace, *items)
            if not reserved.all(ReserveStatus.NO_PARENT):
                pool.commit(session, namespace, reserved.lease, *[name for name, _ in items])
                use(path)
        else:
            found = pool.stored(session, namespace, *keys(*path))
            idle = [pool.clock.now - used.get(number, -1e9) for number in path]
            sure = len(list(itertools.takewhile(lambda seconds: seconds < TTL_S, idle)))
            most = len(list(itertools.takewhile(lambda seconds: seconds < TTL_S + BUCKET_S, idle)))
            assert sure <= found <= most
            use(path[:found])
        pool.audited()
    assert pool.store.counters.expired_chunks > 50
    assert pool.store.counters.evicted_chunks == 0
