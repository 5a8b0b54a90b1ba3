"""Uses that wait: they have their place and time at once, and whatever is chosen by them is chosen after them."""

from __future__ import annotations

import random

import pytest

from kvd.ledger.chunk import Chunk
from kvd.ledger.eviction import LeafLru
from kvd.ledger.gittins import Gittins
from kvd.ledger.shares import SharedPolicy
from kvd.types import ROOT, ChunkState, Namespace, Share
from tests.unit.ledger.harness import GRANULE, Pool, chain, key, keys
from tests.unit.ledger.tier_life import Life

EVERYTHING = 1 << 30


def chunk_of(pool: Pool, namespace: Namespace, number: int) -> Chunk:
    return pool.store._books.spaces[namespace.id].chunks[key(number)]


def waiting(pool: Pool) -> int:
    return sum(len(prefix) for prefix, _ in pool.store._uses._queue)


def test_uses_are_put_in_a_few_at_a_time_in_the_order_of_the_requests(
    pool: Pool, session: int, namespace: Namespace
) -> None:
    pool.write(session, namespace, *chain(1, 2, 3))
    pool.write(session, namespace, *chain(11, 12))
    calls: list[int] = []
    pool.store.on_behind(lambda: calls.append(waiting(pool)))
    assert pool.stored(session, namespace, *keys(11, 12)) == 2
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 3
    assert pool.stored(session, namespace, *keys(11)) == 1
    assert calls == [2], "called once, until nothing waits any more"
    uses = []
    while True:
        done = pool.store.catch_up(2)
        uses.append([chunk_of(pool, namespace, number).uses for number in (11, 12, 1, 2, 3)])
        pool.audited()
        if done:
            break
    assert uses == [[2, 2, 1, 1, 1], [2, 2, 2, 2, 1], [3, 2, 2, 2, 2]]
    stamps = [chunk_of(pool, namespace, number).touched for number in (12, 1, 2, 3, 11)]
    assert stamps == sorted(stamps)
    pool.stored(session, namespace, *keys(1))
    assert calls == [2, 1]


def test_who_is_evicted_is_chosen_after_all_uses(pool: Pool, session: int, namespace: Namespace) -> None:
    for number in range(1, 17):
        pool.write(session, namespace, (key(number), ROOT))
    assert pool.stored(session, namespace, key(1)) == 1
    assert waiting(pool)
    pool.write(session, namespace, (key(20), ROOT))
    found = [number for number in (1, 2, 3) if key(number) in pool.store._books.spaces[namespace.id].chunks]
    assert found == [1, 3]


def test_a_share_that_is_too_large_gives_back_what_was_used_the_longest_ago() -> None:
    policy: SharedPolicy[Chunk] = SharedPolicy(
        [Share("default", None, None, 16 * GRANULE)], LeafLru, lambda chunk: chunk.space.slot_bytes
    )
    pool = Pool(policy=policy)
    session = pool.session()
    namespace = pool.namespace(session)
    for number in (1, 2, 3):
        pool.write(session, namespace, (key(number), ROOT))
    assert pool.stored(session, namespace, key(1)) == 1
    policy.tenants["default"].hard_bytes = 2 * GRANULE
    pool.store.tick()
    assert set(pool.store._books.spaces[namespace.id].chunks) == {*keys(1, 3)}


def test_no_more_than_a_bounded_number_waits(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(*range(1, 17)))
    for _ in range(1000):
        pool.stored(session, namespace, *keys(*range(1, 17)))
        assert waiting(pool) <= 2048
    pool.store.settle()
    assert waiting(pool) == 0
    assert chunk_of(pool, namespace, 16).uses == 1001


def test_what_has_gone_meanwhile_is_left_out_and_so_is_who_came_in_its_place() -> None:
    pool = Pool(policy=Gittins())
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *chain(1, 2, 3))
    pool.lease(session, namespace, *keys(1))
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 3
    assert pool.store.drop("default", namespace.id) == (2, 1)
    queue = pool.store._uses._queue.copy()
    pool.write(session, namespace, *chain(2, 3, parent=key(1)))
    assert [chunk_of(pool, namespace, number).uses for number in (1, 2, 3)] == [3, 1, 1]
    pool.store._uses._queue.extend(queue)  # as if they waited still
    pool.store.catch_up(EVERYTHING)
    assert [chunk_of(pool, namespace, number).uses for number in (2, 3)] == [1, 1]
    pool.audited()


def test_a_use_counts_from_when_it_happened() -> None:
    pool = Pool(ttl_s=100.0)
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *chain(1, 2))
    pool.write(session, namespace, *chain(11))
    pool.pass_time(90.0)
    assert pool.stored(session, namespace, *keys(1, 2)) == 2
    assert waiting(pool)
    pool.clock.now += 60.0
    assert pool.stored(session, namespace, *keys(11)) == 0
    assert pool.lease(session, namespace, *keys(1, 2))[1] == 2
    pool.store.lookup(session, namespace.id, 900, keys(1, 2), 0, True)
    pool.clock.now += 99.0
    assert pool.store.lookup(session, namespace.id, 901, keys(1, 2), 0, True).locations
    pool.clock.now += 3.0
    assert not pool.store.lookup(session, namespace.id, 902, keys(1, 2), 0, True).locations
    pool.audited()


def test_a_use_that_waits_while_a_bucket_ends_is_one_of_that_bucket() -> None:
    pool = Pool(ttl_s=100.0)
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *chain(1, 2))
    pool.pass_time(50.0)
    assert pool.stored(session, namespace, *keys(1, 2)) == 2
    pool.pass_time(50.0)
    pool.store.catch_up(EVERYTHING)
    pool.pass_time(49.0)
    assert pool.store.lookup(session, namespace.id, 901, keys(1, 2), 0, True).locations
    pool.pass_time(3.0)
    assert not pool.store.lookup(session, namespace.id, 902, keys(1, 2), 0, True).locations


def test_what_grows_below_a_use_that_waits_is_stamped_after_it() -> None:
    pool = Pool(ttl_s=100.0)
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *chain(1, 2))
    lease = pool.reserve(session, namespace, *chain(3, parent=key(2))).lease
    pool.pass_time(50.0)
    assert pool.stored(session, namespace, *keys(1, 2)) == 2
    pool.commit(session, namespace, lease, key(3))
    pool.store.settle()
    assert [chunk_of(pool, namespace, number).uses for number in (1, 2, 3)] == [2, 2, 1]
    stamps = [chunk_of(pool, namespace, number).touched for number in (1, 2, 3)]
    assert stamps == sorted(stamps)


def test_a_lease_holds_its_deepest_chunk_and_so_all_above_it(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1, 2, 3, 4))
    first, _ = pool.lease(session, namespace, *keys(1, 2, 3, 4))
    second, _ = pool.lease(session, namespace, *keys(1, 2), skip=1)
    assert [chunk_of(pool, namespace, number).holds for number in (1, 2, 3, 4)] == [1, 2, 1, 1]
    pool.store.release(session, [first])
    assert [chunk_of(pool, namespace, number).holds for number in (1, 2, 3, 4)] == [1, 1, 0, 0]
    pool.audited()
    pool.fill(session, namespace)
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 2
    pool.store.release(session, [second])
    pool.audited()


def test_what_a_daemon_leaves_has_the_uses_that_waited(pool: Pool) -> None:
    life = Life(1)
    while life.unscanned:
        life.scan_one()
    life.store.reserve(life.session, life.namespace.id, 1, chain(1, 2))
    life.store.commit(life.session, life.namespace.id, 1, [(name, ()) for name in keys(1, 2)])
    life.store.lookup(life.session, life.namespace.id, 2, keys(1, 2))
    assert {entry.uses for entry in life.journal.entries.values()} == {1}
    life.store.settle()
    assert {entry.uses for entry in life.journal.entries.values()} == {2}
    by_key = {entry.key: entry.touched for entry in life.journal.entries.values()}
    assert by_key[key(2)] == by_key[key(1)] + 1 == life.store._books.last_stamp


@pytest.mark.parametrize("seed", range(8))
def test_whatever_keys_are_asked_for_the_longest_prefix_is_found(seed: int) -> None:
    dice = random.Random(seed)
    pool = Pool(64)
    session = pool.session()
    namespace = pool.namespace(session)
    parents: dict[int, int] = {}
    for number in range(1, 41):
        parents[number] = dice.choice([0, *range(max(1, number - 4), number)])
        above = key(parents[number]) if parents[number] else ROOT
        lease = pool.reserve(session, namespace, (key(number), above)).lease
        if dice.random() < 0.9:
            pool.commit(session, namespace, lease, key(number))
    space = pool.store._books.spaces[namespace.id]
    for _ in range(400):
        path = [dice.randrange(1, 41)]
        while parents[path[0]]:
            path.insert(0, parents[path[0]])
        for _ in range(dice.choice([0, 0, 1, 2])):
            path[dice.randrange(len(path))] = dice.randrange(1, 50)
        path += [dice.randrange(1, 50) for _ in range(dice.randrange(3))]
        path = path[dice.choice([0, 0, 0, 1]) :]
        longest: list[int] = []
        for number in path:
            chunk = space.chunks.get(key(number))
            above = key(longest[-1]) if longest else ROOT
            if chunk is None or chunk.state is not ChunkState.READY:
                break
            if (ROOT if chunk.parent is None else chunk.parent.key) != above:
                break
            longest.append(number)
        assert [chunk.key for chunk in space.ready_prefix(keys(*path))] == keys(*longest)
    assert pool.slabs.taken_bytes == 40 * GRANULE
