"""Law 7: answers are truthful, also about parents, children and stripes. Each test ends in an audit."""

from __future__ import annotations

import pytest

from kvd.ledger.coverage import Grid
from kvd.types import ROOT, CommitStatus, Namespace, ReserveStatus, Stripe
from kvd.wire.errors import InvalidRequest
from kvd.wire.frames import ItemStatus, Op
from tests.unit.ledger.harness import GRANULE, Pool, chain, key, keys

GRANTED, PRESENT, BUSY, NO_PARENT = (
    ReserveStatus.GRANTED,
    ReserveStatus.PRESENT,
    ReserveStatus.BUSY,
    ReserveStatus.NO_PARENT,
)
STORED, PARTIAL, FAILED, WAITING_PARENT = (
    CommitStatus.STORED,
    CommitStatus.PARTIAL,
    CommitStatus.FAILED,
    CommitStatus.WAITING_PARENT,
)

# ---------------------------------------------------------------- law 7: truthful answers


def test_each_item_of_reserve_is_answered_truthfully(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1))
    pool.reserve(session, namespace, *chain(2, parent=key(1)))
    reserved = pool.reserve(
        session,
        namespace,
        *chain(1, 2, 3),
        (key(3), key(2)),  # twice in one request
        (key(9), key(8)),  # parent unknown
        (key(2), ROOT),  # held, but under another parent
        (key(7), key(7)),  # its own parent
    )
    assert reserved.statuses == [PRESENT, BUSY, GRANTED, BUSY, NO_PARENT, NO_PARENT, NO_PARENT]


def test_what_reserve_calls_present_can_be_looked_up_at_once(pool: Pool, session: int, namespace: Namespace) -> None:
    for number in range(16):
        pool.write(session, namespace, (key(number), ROOT))
    items = [(key(number), ROOT) for number in (0, 50, 51, 1, 2, 52)]
    assert pool.reserve(session, namespace, *items).statuses == [PRESENT, GRANTED, GRANTED, PRESENT, PRESENT, GRANTED]
    assert [pool.stored(session, namespace, key(number)) for number in (0, 1, 2)] == [1, 1, 1]


def test_reserve_never_evicts_the_ancestors_of_what_it_grants(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1, 2))
    for number in range(10, 24):
        pool.write(session, namespace, (key(number), ROOT))
    # Key 2 is the coldest leaf, and named only as a parent.
    reserved = pool.reserve(session, namespace, *chain(3, 4, parent=key(2)))
    assert reserved.all(GRANTED)
    assert pool.commit(session, namespace, reserved.lease, *keys(3, 4)) == [STORED, STORED]
    assert pool.stored(session, namespace, *keys(1, 2, 3, 4)) == 4


def test_commit_under_a_lease_that_does_not_hold_the_key_fails(pool: Pool, session: int, namespace: Namespace) -> None:
    mine = pool.reserve(session, namespace, *chain(1))
    thief = pool.session()
    theirs = pool.namespace(thief)
    assert pool.commit(thief, theirs, mine.lease, key(1)) == [FAILED]
    assert pool.commit(session, namespace, 999, key(1)) == [FAILED]
    assert pool.commit(session, namespace, mine.lease, key(1), key(2), key(1)) == [STORED, FAILED, FAILED]


def test_stored_means_that_a_lookup_finds_it(pool: Pool, session: int, namespace: Namespace) -> None:
    reserved = pool.reserve(session, namespace, *chain(1, 2, 3))
    assert pool.commit(session, namespace, reserved.lease, *keys(3, 2)) == [WAITING_PARENT, WAITING_PARENT]
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 0
    assert pool.commit(session, namespace, reserved.lease, key(1)) == [STORED]
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 3


def test_answers_within_one_commit_say_how_it_ended(pool: Pool, session: int, namespace: Namespace) -> None:
    reserved = pool.reserve(session, namespace, *chain(1, 2, 3))
    assert pool.commit(session, namespace, reserved.lease, *keys(3, 2, 1)) == [STORED, STORED, STORED]
    bad = pool.reserve(session, namespace, *chain(11, 12))
    ticket, _ = pool.store.begin_io(session, Op.WRITE, bad.lease, [pool.item(namespace, bad.locations[0])])
    pool.store.end_io(ticket, failed=[0])
    assert pool.commit(session, namespace, bad.lease, *keys(12, 11)) == [FAILED, FAILED]


def test_lookup_follows_parents_and_not_only_keys(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1, 2), (key(3), ROOT))
    assert pool.stored(session, namespace, *keys(1, 3)) == 1
    assert pool.stored(session, namespace, key(2)) == 0
    assert pool.stored(session, namespace, *keys(1, 1)) == 1


def test_lookup_attributes_every_asked_chunk_once(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1, 2, 3))
    pool.lease(session, namespace, *keys(1, 2, 3, 4, 5), skip=1)
    pool.lease(session, namespace, *keys(1, 7), skip=2)
    counters = pool.store.counters
    assert (counters.lookups, counters.asked_chunks, counters.hit_chunks, counters.miss_chunks) == (2, 4, 2, 2)


# ---------------------------------------------------------------- children, parents, stripes


def test_child_becomes_ready_with_its_parent(pool: Pool, session: int, namespace: Namespace) -> None:
    parent = pool.reserve(session, namespace, *chain(1))
    writer = pool.session()
    own = pool.namespace(writer)
    child = pool.reserve(writer, own, *chain(2, parent=key(1)))
    assert pool.commit(writer, own, child.lease, key(2)) == [WAITING_PARENT]
    assert pool.store.lookup(session, namespace.id, 900, keys(1, 2)).writing == 2
    pool.store.writers_gone(writer)  # its bytes are complete: its death changes nothing
    assert pool.commit(session, namespace, parent.lease, key(1)) == [STORED]
    assert pool.stored(session, namespace, *keys(1, 2)) == 2


def test_what_waits_goes_when_its_parent_fails(pool: Pool, session: int, namespace: Namespace) -> None:
    parent = pool.reserve(session, namespace, *chain(1))
    child = pool.reserve(session, namespace, *chain(2, 3, parent=key(1)))
    assert pool.commit(session, namespace, child.lease, *keys(2, 3)) == [WAITING_PARENT] * 2
    assert pool.store.abort(session, namespace.id, parent.lease, []) == 1
    assert pool.store.stats().pool.free_bytes == 16 * GRANULE
    assert pool.reserve(session, namespace, *chain(2, parent=key(1))).statuses == [NO_PARENT]


def test_slot_of_a_child_being_written_is_kept_for_its_writer_when_the_parent_goes(
    pool: Pool, session: int, namespace: Namespace
) -> None:
    parent = pool.reserve(session, namespace, *chain(1))
    writer = pool.session()
    own = pool.namespace(writer)
    child = pool.reserve(writer, own, *chain(2, 3, parent=key(1)))
    pool.store.abort(session, namespace.id, parent.lease, keys(1))
    assert pool.store.stats().pool.writing_bytes == 2 * GRANULE
    item = pool.item(own, child.locations[0])
    assert pool.store.begin_io(writer, Op.WRITE, child.lease, [item])[1] == [ItemStatus.GONE]
    again = pool.reserve(session, namespace, *chain(1, 2))  # the keys are free again, the slots are not
    assert again.all(GRANTED)
    assert not {one.offset for one in again.locations} & {one.offset for one in child.locations}
    assert pool.commit(writer, own, child.lease, *keys(2, 3)) == [FAILED, FAILED]
    assert pool.store.stats().pool.writing_bytes == 2 * GRANULE
    assert pool.commit(session, namespace, again.lease, *keys(1, 2)) == [STORED, STORED]


def test_chunk_is_ready_when_its_stripes_cover_it(pool: Pool, session: int) -> None:
    grid = pool.namespace(session, "grid", layers=4, heads=4)
    reserved = pool.reserve(session, grid, *chain(1))

    def put(*stripes: Stripe) -> CommitStatus:
        return pool.store.commit(session, grid.id, reserved.lease, [(key(1), stripes)])[0]

    assert put(Stripe(0, 4, 0, 2)) is PARTIAL
    assert put(Stripe(0, 4, 0, 2)) is PARTIAL
    assert put(Stripe(0, 2, 2, 4), Stripe(2, 4, 2, 3)) is PARTIAL
    assert pool.stored(session, grid, key(1)) == 0
    assert put(Stripe(1, 4, 1, 4)) is STORED
    assert pool.stored(session, grid, key(1)) == 1


@pytest.mark.parametrize("stripe", [(0, 3, 0, 1), (0, 2, 0, 3), (1, 1, 0, 1), (0, 1, 2, 1), (-1, 1, 0, 1)])
def test_stripe_outside_the_grid_is_refused_before_anything_happens(
    pool: Pool, session: int, stripe: tuple[int, int, int, int]
) -> None:
    grid = pool.namespace(session, "grid", layers=2, heads=2)
    reserved = pool.reserve(session, grid, *chain(1, 2))
    with pytest.raises(InvalidRequest):
        pool.store.commit(session, grid.id, reserved.lease, [(key(1), ()), (key(2), [Stripe(*stripe)])])
    assert pool.stored(session, grid, key(1)) == 0
    assert pool.commit(session, grid, reserved.lease, *keys(1, 2)) == [STORED, STORED]


def test_slot_of_a_lost_chunk_is_kept_while_other_ranks_may_be_copying_into_it(pool: Pool, session: int) -> None:
    grid = pool.namespace(session, "grid", layers=2)
    reserved = pool.reserve(session, grid, *chain(1))
    ticket, _ = pool.store.begin_io(session, Op.WRITE, reserved.lease, [pool.item(grid, reserved.locations[0])])
    pool.store.end_io(ticket, failed=[0])
    first, second = Stripe(0, 1, 0, 1), Stripe(1, 2, 0, 1)
    assert pool.store.commit(session, grid.id, reserved.lease, [(key(1), [first])]) == [PARTIAL]
    assert pool.store.stats().pool.writing_bytes == GRANULE
    assert pool.store.commit(session, grid.id, reserved.lease, [(key(1), [second])]) == [FAILED]
    assert pool.store.stats().pool.free_bytes == 16 * GRANULE


@pytest.mark.parametrize(("layers", "heads"), [(0, 1), (1, 0), (1 << 10, 1 << 10)])
def test_grid_that_is_not_sound_is_refused(pool: Pool, session: int, layers: int, heads: int) -> None:
    with pytest.raises(InvalidRequest):
        pool.namespace(session, "grid", layers=layers, heads=heads)


def test_stripes_that_many_keys_share_are_looked_at_once(
    pool: Pool, session: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of keys with thousands of stripes each fit in one frame: counted each, they would stop the daemon."""
    striped = pool.namespace(session, "striped", layers=4)
    reserved = pool.reserve(session, striped, *chain(*range(8)))
    looked, bits = [], Grid.bits
    monkeypatch.setattr(Grid, "bits", lambda grid, stripe: looked.append(stripe) or bits(grid, stripe))
    halves = [tuple(Stripe(layer, layer + 1, 0, 1) for layer in layers) for layers in ((0, 1), (2, 3))]
    for half, status in zip(halves, (PARTIAL, STORED), strict=True):
        items = [(key(number), half) for number in range(8)]
        assert pool.store.commit(session, striped.id, reserved.lease, items) == [status] * 8
    assert len(looked) == 4
    assert pool.stored(session, striped, *keys(*range(8))) == 8
