"""Laws 8 and 9: how room is made, and in which order. Each test ends in an audit."""

from __future__ import annotations

from kvd.ledger.chunk import Chunk
from kvd.ledger.eviction import LeafLru
from kvd.ledger.index import Space
from kvd.types import ROOT, CommitStatus, Namespace, ReserveStatus
from tests.unit.ledger.harness import GRANULE, Pool, chain, key, keys

GRANTED, NO_ROOM, NO_PARENT = ReserveStatus.GRANTED, ReserveStatus.NO_ROOM, ReserveStatus.NO_PARENT
STORED = CommitStatus.STORED

# ---------------------------------------------------------------- laws 8 and 9: room, and the order of eviction


def test_room_is_made_when_room_is_needed(pool: Pool, session: int, namespace: Namespace) -> None:
    for number in range(100):
        pool.write(session, namespace, (key(number), ROOT))
    assert [number for number in range(100) if pool.stored(session, namespace, key(number))] == [*range(84, 100)]
    assert pool.store.counters.evicted_chunks == 84


def test_leaves_go_first_and_what_stays_can_be_reached(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(*range(16)))
    for number in range(100, 110):
        pool.write(session, namespace, (key(number), ROOT))
    assert pool.stored(session, namespace, *keys(*range(16))) == 6
    assert all(pool.stored(session, namespace, key(number)) for number in range(100, 110))


def test_least_recently_used_prefix_goes_first(pool: Pool, session: int, namespace: Namespace) -> None:
    for root in (10, 20, 30, 40):
        pool.write(session, namespace, *chain(*range(root, root + 4)))
    pool.stored(session, namespace, *keys(10, 11, 12, 13))
    for number in range(100, 104):
        pool.write(session, namespace, (key(number), ROOT))
    found = {root: pool.stored(session, namespace, *keys(*range(root, root + 4))) for root in (10, 20, 30, 40)}
    assert found == {10: 4, 20: 0, 30: 4, 40: 4}


def test_chunk_with_a_child_being_written_is_not_evicted(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1))
    reserved = pool.reserve(session, namespace, *chain(2, parent=key(1)))
    pool.fill(session, namespace)
    assert pool.commit(session, namespace, reserved.lease, key(2)) == [STORED]
    assert pool.stored(session, namespace, *keys(1, 2)) == 2


def test_full_pool_of_leased_chunks_answers_no_room_and_keeps_them(
    pool: Pool, session: int, namespace: Namespace
) -> None:
    pool.write(session, namespace, *chain(*range(16)))
    pool.lease(session, namespace, *keys(*range(16)))
    other = pool.namespace(session, "large", granules=4)
    assert pool.reserve(session, namespace, *chain(50, 51)).statuses == [NO_ROOM, NO_PARENT]
    assert pool.reserve(session, other, *chain(50)).statuses == [NO_ROOM]
    assert pool.store.counters.evicted_chunks == 0


# ---------------------------------------------------------------- slabs: sizes


def test_no_size_mix_fragments_the_pool_for_ever() -> None:
    pool = Pool(64)  # regions of four granules
    session = pool.session()
    spaces = {size: pool.namespace(session, f"s{size}", granules=size) for size in (1, 2, 3, 4, 7, 13, 32)}
    number = 0
    for size in (1, 32, 2, 13, 3, 7, 1, 4, 32, 13, 7, 3, 2, 1):
        for _ in range(200):
            number += 1
            pool.write(session, spaces[size], (key(number), ROOT))
        held = {figures.model: figures.bytes for figures in pool.store.stats().namespaces}
        # The last size has in the end taken over as much of the pool as a pool of its own would give it.
        alone = Pool(64)
        other = alone.session()
        lonely = alone.namespace(other, granules=size)
        for lone in range(200):
            alone.write(other, lonely, (key(lone), ROOT))
        assert held[f"s{size}"] == alone.store.stats().namespaces[0].bytes
        pool.audited()


def test_window_with_anything_held_in_it_is_not_emptied() -> None:
    pool = Pool(16)
    session = pool.session()
    small = pool.namespace(session)
    large = pool.namespace(session, "large", granules=4)
    for number in range(16):
        pool.write(session, small, (key(number), ROOT))
    held = [pool.lease(session, small, key(number))[0] for number in (0, 4, 8)]
    assert pool.reserve(session, large, *chain(50)).all(GRANTED)
    assert [pool.stored(session, small, key(number)) for number in range(16)] == [1] * 12 + [0] * 4
    assert pool.reserve(session, large, (key(51), ROOT)).statuses == [NO_ROOM]
    pool.store.release(session, held[1:2])
    assert pool.reserve(session, large, (key(51), ROOT)).statuses == [GRANTED]
    assert [pool.stored(session, small, key(number)) for number in range(12)] == [1] * 4 + [0] * 4 + [1] * 4
    pool.audited()


def test_window_below_which_something_is_held_elsewhere_is_not_emptied() -> None:
    pool = Pool(16)
    session = pool.session()
    small = pool.namespace(session)
    large = pool.namespace(session, "large", granules=8)
    pool.write(session, small, *chain(*range(16)))  # the first half holds the parents of the second
    pool.lease(session, small, *keys(*range(16)), skip=15)
    assert pool.reserve(session, large, *chain(50)).statuses == [NO_ROOM]
    assert pool.stored(session, small, *keys(*range(16))) == 16
    pool.audited()


def test_whole_subtrees_go_with_a_window() -> None:
    pool = Pool(16)
    session = pool.session()
    small = pool.namespace(session)
    large = pool.namespace(session, "large", granules=8)
    pool.write(session, small, *chain(*range(16)))
    assert pool.reserve(session, large, *chain(50)).statuses == [GRANTED]
    left = pool.store.stats().pool.ready_bytes // GRANULE
    assert left == pool.stored(session, small, *keys(*range(16)))
    pool.audited()


def test_colder_of_own_leaf_and_foreign_window_goes() -> None:
    pool = Pool(16)
    session = pool.session()
    small = pool.namespace(session)
    large = pool.namespace(session, "large", granules=4)
    for number in range(8):
        pool.write(session, small, (key(number), ROOT))
    pool.write(session, large, (key(50), ROOT))
    pool.write(session, large, (key(51), ROOT))
    # The small ones are older: they give way, the large ones stay.
    pool.write(session, large, (key(52), ROOT))
    assert [pool.stored(session, large, key(number)) for number in (50, 51, 52)] == [1, 1, 1]
    # Now the small ones that are left are in use all the time: the oldest large one gives way.
    left = [number for number in range(8) if pool.stored(session, small, key(number))]
    assert len(left) == 4
    pool.write(session, large, (key(53), ROOT))
    assert [number for number in range(8) if pool.stored(session, small, key(number))] == left
    assert [pool.stored(session, large, key(number)) for number in (50, 51, 52, 53)] == [0, 1, 1, 1]
    pool.audited()


def test_window_counts_what_would_go_with_it_elsewhere() -> None:
    pool = Pool(16)
    session = pool.session()
    small = pool.namespace(session)
    large = pool.namespace(session, "large", granules=4)
    for number in (1, 2, 3):
        pool.write(session, small, (key(number), ROOT))
    family = range(10, 19)  # its root shares a window with the three oldest
    pool.write(session, small, *chain(*family))
    for number in (20, 21, 22, 23):
        pool.write(session, small, (key(number), ROOT))
    pool.stored(session, small, *keys(*family))
    assert pool.reserve(session, large, (key(50), ROOT)).all(GRANTED)
    assert pool.stored(session, small, *keys(*family)) == len(family)
    assert [pool.stored(session, small, key(number)) for number in (1, 2, 3, 20, 21, 22, 23)] == [1] * 3 + [0] * 4
    pool.audited()


# ---------------------------------------------------------------- law 8: some is kept free


def evictions(pool: Pool, session: int, namespace: Namespace, first: int, count: int) -> int:
    """How many chunks a Reserve of so many single new ones has to evict before it can answer."""
    before = pool.store.counters.evicted_chunks
    reserved = pool.reserve(session, namespace, *((key(number), ROOT) for number in range(first, first + count)))
    assert reserved.all(GRANTED)
    made = pool.store.counters.evicted_chunks - before
    pool.commit(session, namespace, reserved.lease, *(key(number) for number in range(first, first + count)))
    return made


def test_what_was_asked_for_is_free_ahead_of_the_next_time() -> None:
    pool = Pool(4096)
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *((key(number), ROOT) for number in range(4096)))
    assert evictions(pool, session, namespace, 10_000, 30) == 30
    for round_ in range(1, 5):
        pool.pass_time(0.5)
        pool.audited()
        assert evictions(pool, session, namespace, 10_000 + 100 * round_, 30) == 0
    assert pool.store.counters.evicted_chunks == 5 * 30
    assert pool.stored(session, namespace, key(150)) == 1  # the coldest went, as they would have anyway
    assert pool.stored(session, namespace, key(149)) == 0


def test_a_full_pool_that_nobody_stores_into_stays_full() -> None:
    pool = Pool(4096)
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *((key(number), ROOT) for number in range(4096)))
    for _ in range(5):
        pool.pass_time(0.5)
    # Once, for it has just been stored into; and no more than a hundredth.
    assert pool.store.counters.evicted_chunks == 40
    assert pool.stored(session, namespace, key(39)) == 0
    assert pool.stored(session, namespace, key(40)) == 1


def test_no_more_than_a_hundredth_of_the_pool_is_freed_ahead_however_much_is_asked_for() -> None:
    pool = Pool(4096)
    session = pool.session()
    small, large = pool.namespace(session), pool.namespace(session, "large", granules=8)
    pool.write(session, small, *((key(number), ROOT) for number in range(4096)))
    evictions(pool, session, small, 10_000, 200)
    evictions(pool, session, large, 20_000, 50)
    before = pool.store.stats().pool.ready_bytes
    for _ in range(3):
        pool.pass_time(0.5)
        pool.audited()
        assert before - pool.store.stats().pool.ready_bytes <= 4096 * GRANULE // 100


def test_what_is_leased_or_pinned_is_not_freed_ahead() -> None:
    pool = Pool(4096)
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *((key(number), ROOT) for number in range(4096)))
    pool.store.pin("default", namespace.id, key(0))
    leased = [pool.lease(session, namespace, key(number))[1] for number in range(1, 20)]
    pool.pass_time(0.5)
    assert sum(leased) == 19
    assert pool.store.counters.evicted_chunks == 40
    assert all(pool.stored(session, namespace, key(number)) for number in range(20))
    pool.audited()


# ---------------------------------------------------------------- who is let into a full pool


class Hostile(LeafLru[Chunk]):
    """Lets nobody in for a chunk that takes ``worth`` granules."""

    def __init__(self, *worth: int) -> None:
        super().__init__()
        self.worth = worth

    def admits(self, space: Space, key: bytes, parent: Chunk | None, victim: Chunk) -> bool:
        return victim.space.slot_bytes // GRANULE not in self.worth


def full_of_large_chunks(policy: Hostile) -> tuple[Pool, int, Namespace]:
    """A pool of sixteen chunks of four granules, a session, and a namespace of chunks of one granule."""
    pool = Pool(64, policy=policy)
    session = pool.session()
    large = pool.namespace(session, "large", granules=4)
    for number in range(16):
        pool.write(session, large, (key(number), ROOT))
    return pool, session, pool.namespace(session, "small")


def test_a_size_that_comes_late_is_compared_with_what_the_others_have() -> None:
    pool, session, small = full_of_large_chunks(Hostile(1))  # worth more than who comes: all of its own size
    for number in range(100, 132, 4):
        pool.write(session, small, *chain(*range(number, number + 4)))
    assert pool.store.counters.evicted_chunks <= 9  # one more than they need: a single free slot is not room
    assert all(pool.stored(session, small, *keys(*range(at, at + 4))) == 4 for at in range(100, 132, 4))
    pool.audited()


def test_who_is_worth_less_than_everything_of_every_size_is_not_let_in() -> None:
    pool, session, small = full_of_large_chunks(Hostile(1, 4))
    pool.write(session, small, *chain(*range(100, 104)))  # nothing of its size can go: it needs a place at all
    assert pool.store.counters.evicted_chunks == 1
    assert pool.reserve(session, small, *chain(104, 105)).statuses == [NO_ROOM, NO_PARENT]
    assert pool.store.counters.evicted_chunks == 1
    pool.audited()


def test_free_slots_of_its_own_size_are_room_for_anybody() -> None:
    pool = Pool(64, policy=Hostile(1))
    session = pool.session()
    small = pool.namespace(session)
    pool.write(session, small, *[(key(number), ROOT) for number in range(48)])
    reserved = pool.reserve(session, small, *[(key(number), ROOT) for number in range(48, 64)])
    pool.commit(session, small, reserved.lease, *keys(*range(49, 64, 2)))
    pool.store.abort(session, small.id, reserved.lease, keys(*range(48, 64, 2)))  # free slots in slabs that stay
    assert pool.store.stats().pool.free_bytes == 0
    for number in range(100, 106):
        pool.write(session, small, (key(number), ROOT))
    assert pool.store.counters.evicted_chunks == 0
    pool.audited()
