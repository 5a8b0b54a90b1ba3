"""Laws 1, 3 and 4: who sees a chunk, who may touch its slot, and when the slot may serve others."""

from __future__ import annotations

from kvd.types import ROOT, CommitStatus, Namespace, ReserveStatus, Stripe
from kvd.wire.frames import ItemStatus, Op
from tests.unit.ledger.harness import GRANULE, Pool, chain, key, keys

GRANTED, PRESENT, BUSY, NO_ROOM = (
    ReserveStatus.GRANTED,
    ReserveStatus.PRESENT,
    ReserveStatus.BUSY,
    ReserveStatus.NO_ROOM,
)
STORED, FAILED = CommitStatus.STORED, CommitStatus.FAILED

# ---------------------------------------------------------------- law 1: invisible until READY, then immutable


def test_no_reader_sees_a_chunk_before_it_is_ready(pool: Pool, session: int, namespace: Namespace) -> None:
    reserved = pool.reserve(session, namespace, *chain(1, 2))
    result = pool.store.lookup(session, namespace.id, 900, keys(1, 2))
    assert (result.locations, result.promoting, result.writing) == ([], 0, 2)
    pool.commit(session, namespace, reserved.lease, key(1))
    result = pool.store.lookup(session, namespace.id, 901, keys(1, 2))
    assert (len(result.locations), result.writing) == (1, 1)


def test_ready_chunk_cannot_be_written_again(pool: Pool, session: int, namespace: Namespace) -> None:
    reserved = pool.write(session, namespace, *chain(1))
    item = pool.item(namespace, reserved.locations[0])
    _, statuses = pool.store.begin_io(session, Op.WRITE, reserved.lease, [item])
    assert statuses == [ItemStatus.GONE]
    assert pool.reserve(session, namespace, *chain(1)).statuses == [PRESENT]


def test_bytes_that_still_arrive_keep_a_chunk_from_becoming_ready(
    pool: Pool, session: int, namespace: Namespace
) -> None:
    reserved = pool.reserve(session, namespace, *chain(1))
    ticket, statuses = pool.store.begin_io(
        session, Op.WRITE, reserved.lease, [pool.item(namespace, reserved.locations[0])]
    )
    assert statuses == [ItemStatus.OK]
    assert pool.commit(session, namespace, reserved.lease, key(1)) == [FAILED]
    assert pool.store.stats().pool.quarantined_bytes == GRANULE
    pool.store.end_io(ticket)
    assert pool.store.stats().pool.free_bytes == 16 * GRANULE


def test_who_reads_a_whole_chunk_is_told_its_checksum_when_that_is_known(
    pool: Pool, session: int, namespace: Namespace
) -> None:
    pool.write(session, namespace, *chain(1, 2))
    lease, _ = pool.lease(session, namespace, *keys(1, 2))
    chunks = [pool.store._books.spaces[namespace.id].chunks[one] for one in keys(1, 2)]
    chunks[0].checksum = 4711
    items = [pool.item(namespace, chunk.location) for chunk in chunks]
    part = items[0]._replace(span=items[0].span._replace(run=10, stride=10))
    ticket, statuses = pool.store.begin_io(session, Op.READ, lease, [*items, part])
    assert statuses == [ItemStatus.OK] * 3
    assert ticket.checksums == (4711, None, None)
    pool.store.end_io(ticket)


# ---------------------------------------------------------------- law 3: leases, generations, proven death


def test_leased_chunk_survives_pressure(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1, 2, 3))
    _, leased = pool.lease(session, namespace, *keys(1, 2, 3))
    pool.fill(session, namespace)
    assert leased == 3
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 3


def test_prefix_of_a_leased_tail_survives_pressure(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1, 2, 3))
    _, leased = pool.lease(session, namespace, *keys(1, 2, 3), skip=2)
    pool.fill(session, namespace)
    assert leased == 1
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 3


def test_slots_of_an_expired_lease_can_be_evicted_again(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(*range(1, 17)))
    pool.lease(session, namespace, *keys(*range(1, 17)))
    assert pool.reserve(session, namespace, (key(50), ROOT)).statuses == [NO_ROOM]
    pool.clock.now += pool.limits.read_lease_s  # nobody calls tick: the request itself must notice
    assert pool.reserve(session, namespace, (key(50), ROOT)).statuses == [GRANTED]
    assert pool.store.counters.expired_leases == 1


def test_renewed_lease_lives_on_and_an_ended_one_says_so(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1))
    first, _ = pool.lease(session, namespace, key(1))
    second, _ = pool.lease(session, namespace, key(1))
    pool.pass_time(20)
    assert pool.store.renew(session, [first]) == [True]
    pool.pass_time(20)
    assert pool.store.renew(session, [first, second, 999]) == [True, False, False]
    assert pool.store.release(session, [first, second]) == 1


def test_generation_is_retracted_before_its_slot_is_used_again(pool: Pool, session: int, namespace: Namespace) -> None:
    old = {location.offset: location for location in pool.write(session, namespace, *chain(*range(16))).locations}
    new = pool.reserve(session, namespace, (key(50), ROOT)).locations[0]
    assert pool.table.log[-2:] == [("retract", old[new.offset]), ("publish", new)]
    assert new.generation > max(location.generation for location in old.values())


def test_generations_are_never_used_twice(pool: Pool, session: int, namespace: Namespace) -> None:
    for number in range(100):
        pool.write(session, namespace, (key(number), ROOT))
    published = [location.generation for what, location in pool.table.log if what == "publish"]
    assert len(published) == len(set(published)) == 100


def test_lease_of_a_dead_session_ends_at_once(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(*range(1, 17)))
    reader = pool.session()
    pool.lease(reader, pool.namespace(reader), *keys(*range(1, 17)))
    pool.store.close_session(reader)
    assert pool.reserve(session, namespace, (key(50), ROOT)).statuses == [GRANTED]


def test_writers_slots_stay_until_its_death_is_proven(pool: Pool, session: int, namespace: Namespace) -> None:
    writer = pool.session()
    pool.reserve(writer, pool.namespace(writer), *chain(*range(1, 17)))
    pool.store.close_session(writer)
    pool.pass_time(1e6)
    assert pool.reserve(session, namespace, (key(1), ROOT), (key(50), ROOT)).statuses == [BUSY, NO_ROOM]
    assert pool.store.stats().pool.writing_bytes == 16 * GRANULE


def test_dead_writers_slots_return_after_the_quarantine(pool: Pool, session: int, namespace: Namespace) -> None:
    writer = pool.session()
    pool.reserve(writer, pool.namespace(writer), *chain(*range(1, 17)))
    pool.store.writers_gone(writer)
    assert pool.store.stats().pool.quarantined_bytes == 16 * GRANULE
    assert pool.table.words == {}
    pool.pass_time(pool.limits.quarantine_s - 0.1)
    assert pool.reserve(session, namespace, (key(1), ROOT)).statuses == [NO_ROOM]
    pool.pass_time(0.1)
    assert pool.store.stats().pool.quarantined_bytes == 0
    assert pool.reserve(session, namespace, (key(1), ROOT)).statuses == [GRANTED]
    assert pool.store.counters.quarantined_chunks == 16


def test_half_written_chunks_of_a_dead_writer_are_never_visible(pool: Pool, session: int, namespace: Namespace) -> None:
    writer = pool.session()
    own = pool.namespace(writer, "two", layers=2)
    reserved = pool.reserve(writer, own, *chain(1))
    pool.store.commit(writer, own.id, reserved.lease, [(key(1), [Stripe(0, 1, 0, 1)])])
    pool.store.writers_gone(writer)
    other = pool.namespace(session, "two", layers=2)
    assert pool.stored(session, other, key(1)) == 0
    pool.pass_time(10)
    assert pool.stored(session, other, key(1)) == 0


def test_quarantine_begins_only_when_the_data_plane_is_done_with_the_slot(pool: Pool, session: int) -> None:
    writer = pool.session()
    own = pool.namespace(writer)
    reserved = pool.reserve(writer, own, *chain(1))
    ticket, _ = pool.store.begin_io(writer, Op.WRITE, reserved.lease, [pool.item(own, reserved.locations[0])])
    pool.store.writers_gone(writer)
    pool.pass_time(100)
    assert pool.store.stats().pool.quarantined_bytes == GRANULE
    pool.store.end_io(ticket)
    pool.pass_time(pool.limits.quarantine_s - 0.1)
    assert pool.store.stats().pool.quarantined_bytes == GRANULE
    pool.pass_time(0.1)
    assert pool.store.stats().pool.free_bytes == 16 * GRANULE


def test_what_a_dead_writer_had_finished_stays(pool: Pool, session: int, namespace: Namespace) -> None:
    writer = pool.session()
    own = pool.namespace(writer)
    reserved = pool.reserve(writer, own, *chain(1, 2))
    pool.commit(writer, own, reserved.lease, key(1))
    pool.store.writers_gone(writer)
    assert pool.stored(session, namespace, *keys(1, 2)) == 1


def test_slot_of_an_aborted_chunk_is_not_given_while_bytes_still_land_in_it(
    pool: Pool, session: int, namespace: Namespace
) -> None:
    reserved = pool.reserve(session, namespace, *chain(*range(1, 17)))
    ticket, _ = pool.store.begin_io(session, Op.WRITE, reserved.lease, [pool.item(namespace, reserved.locations[3])])
    assert pool.store.abort(session, namespace.id, reserved.lease, []) == 16
    again = pool.reserve(session, namespace, *[(key(number), ROOT) for number in range(100, 116)])
    assert again.statuses == [GRANTED] * 15 + [NO_ROOM]
    assert reserved.locations[3].offset not in {location.offset for location in again.locations}
    pool.store.end_io(ticket)
    assert pool.reserve(session, namespace, (key(200), ROOT)).locations[0].offset == reserved.locations[3].offset


def test_slot_under_a_data_plane_read_stays_after_lease_and_session_have_ended(
    pool: Pool, session: int, namespace: Namespace
) -> None:
    pool.write(session, namespace, *chain(1, 2))
    reader = pool.session()
    own = pool.namespace(reader)
    location = pool.store.lookup(reader, own.id, 1, keys(1, 2)).locations[1]
    ticket, statuses = pool.store.begin_io(reader, Op.READ, 1, [pool.item(own, location)])
    assert statuses == [ItemStatus.OK]
    pool.store.writers_gone(reader)
    pool.pass_time(1000)
    pool.fill(session, namespace)
    assert pool.store.drop("default", None)[1] == 2
    assert pool.stored(session, namespace, *keys(1, 2)) == 2
    pool.store.end_io(ticket)
    pool.fill(session, namespace, first=2000)
    assert pool.stored(session, namespace, *keys(1, 2)) == 0


def test_ending_a_transfer_twice_is_ending_it_once(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1))
    location = pool.store.lookup(session, namespace.id, 900, keys(1)).locations[0]
    ticket, _ = pool.store.begin_io(session, Op.READ, 900, [pool.item(namespace, location)])
    pool.store.end_io(ticket)
    pool.store.end_io(ticket)


# ---------------------------------------------------------------- law 4: what did not arrive intact


def test_chunk_whose_bytes_did_not_arrive_intact_is_never_stored(
    pool: Pool, session: int, namespace: Namespace
) -> None:
    reserved = pool.reserve(session, namespace, *chain(1, 2, 3))
    items = [pool.item(namespace, location) for location in reserved.locations]
    ticket, _ = pool.store.begin_io(session, Op.WRITE, reserved.lease, items)
    pool.store.end_io(ticket, failed={1})
    assert pool.commit(session, namespace, reserved.lease, *keys(1, 2, 3)) == [STORED, FAILED, FAILED]
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 1
    assert (pool.store.counters.checksum_failures, pool.store.counters.failed_chunks) == (1, 2)
    assert pool.store.stats().pool.writing_bytes == 0


def test_transfer_needs_the_lease_the_generation_and_a_span_inside_the_chunk(
    pool: Pool, session: int, namespace: Namespace
) -> None:
    pool.write(session, namespace, *chain(1, 2))
    location = pool.store.lookup(session, namespace.id, 900, keys(1)).locations[0]
    item = pool.item(namespace, location)
    late = item._replace(generation=location.generation + 1)
    elsewhere = item._replace(offset=location.offset + 1)
    other_segment = item._replace(segment=1)
    long = item._replace(span=item.span._replace(run=GRANULE + 1, stride=GRANULE + 1))
    ticket, statuses = pool.store.begin_io(session, Op.READ, 900, [item, late, elsewhere, other_segment, long])
    assert statuses == [ItemStatus.OK, *[ItemStatus.GONE] * 3, ItemStatus.BAD_SPAN]
    pool.store.end_io(ticket)
    stranger = pool.session()
    assert pool.store.begin_io(stranger, Op.READ, 900, [item])[1] == [ItemStatus.GONE]
    assert pool.store.begin_io(session, Op.WRITE, 900, [item])[1] == [ItemStatus.GONE]
    pool.clock.now += pool.limits.read_lease_s
    assert pool.store.begin_io(session, Op.READ, 900, [item])[1] == [ItemStatus.GONE]


def test_span_is_measured_against_the_chunk_and_not_against_its_larger_slot(pool: Pool, session: int) -> None:
    odd = pool.store.open_namespace(session, pool.namespace(session).identity.__class__("odd", "r"), 5000)
    reserved = pool.reserve(session, odd, *chain(1))
    item = pool.item(odd, reserved.locations[0])
    wide = item._replace(span=item.span._replace(run=5001, stride=5001))
    ticket, statuses = pool.store.begin_io(session, Op.WRITE, reserved.lease, [item, wide])
    assert statuses == [ItemStatus.OK, ItemStatus.BAD_SPAN]
    pool.store.end_io(ticket)
