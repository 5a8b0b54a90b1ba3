"""Law 6: every client a limit, and what is past it is answered at once. Each test ends in an audit."""

from __future__ import annotations

import pytest

from kvd.types import ROOT, CommitStatus, Namespace, ReserveStatus
from kvd.wire.errors import InvalidRequest, LimitReached
from kvd.wire.frames import Op
from tests.unit.ledger.harness import Pool, chain, key, keys

GRANTED, NO_ROOM = ReserveStatus.GRANTED, ReserveStatus.NO_ROOM
WAITING_PARENT = CommitStatus.WAITING_PARENT

# ---------------------------------------------------------------- law 6: bounds


def test_session_cannot_take_more_than_its_share_in_writing() -> None:
    pool = Pool(16, max_writing_share=0.5)
    session = pool.session()
    namespace = pool.namespace(session)
    reserved = pool.reserve(session, namespace, *[(key(number), ROOT) for number in range(10)])
    assert reserved.statuses == [GRANTED] * 8 + [NO_ROOM] * 2
    other = pool.session()
    assert pool.reserve(other, pool.namespace(other), (key(50), ROOT)).statuses == [GRANTED]
    pool.commit(session, namespace, reserved.lease, *keys(*range(8)))
    assert pool.reserve(session, namespace, (key(60), ROOT)).statuses == [GRANTED]
    pool.audited()


def test_what_waits_for_its_parent_counts_as_being_written() -> None:
    pool = Pool(16, max_writing_share=0.5)
    session = pool.session()
    namespace = pool.namespace(session)
    reserved = pool.reserve(session, namespace, *chain(*range(8)))
    assert pool.commit(session, namespace, reserved.lease, *keys(*range(1, 8))) == [WAITING_PARENT] * 7
    assert pool.reserve(session, namespace, (key(60), ROOT)).statuses == [NO_ROOM]
    pool.audited()


def test_leases_of_a_session_are_bounded() -> None:
    pool = Pool(16, max_leases_per_session=3)
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *chain(1))
    pool.reserve(session, namespace, (key(2), ROOT))
    for _ in range(2):
        pool.lease(session, namespace, key(1))
    with pytest.raises(LimitReached):
        pool.lease(session, namespace, key(1))
    with pytest.raises(LimitReached):
        pool.reserve(session, namespace, (key(3), ROOT))
    pool.pass_time(31)
    assert pool.stored(session, namespace, key(1)) == 1
    pool.audited()


def test_leased_chunks_of_a_session_are_bounded() -> None:
    pool = Pool(16, max_leased_chunks_per_session=5)
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *chain(1, 2, 3))
    lease, _ = pool.lease(session, namespace, *keys(1, 2, 3))
    with pytest.raises(LimitReached):
        pool.lease(session, namespace, *keys(1, 2, 3))
    pool.store.release(session, [lease])
    assert pool.lease(session, namespace, *keys(1, 2, 3))[1] == 3
    pool.audited()


def test_requests_are_bounded() -> None:
    pool = Pool(16, max_chunks_per_request=4, max_leases_per_session=4)
    session = pool.session()
    namespace = pool.namespace(session)
    for request in (
        lambda: pool.store.lookup(session, namespace.id, 1, keys(*range(5))),
        lambda: pool.store.reserve(session, namespace.id, 1, chain(*range(5))),
        lambda: pool.store.commit(session, namespace.id, 1, [(name, ()) for name in keys(*range(5))]),
        lambda: pool.store.abort(session, namespace.id, 1, keys(*range(5))),
        lambda: pool.store.release(session, range(5)),
        lambda: pool.store.renew(session, range(5)),
        lambda: pool.store.lookup(session, namespace.id, 1, [b"short"]),
        lambda: pool.store.reserve(session, namespace.id, 1, [(key(1), b"short")]),
        lambda: pool.store.lookup(session, namespace.id, 1, keys(1), skip=2),
        lambda: pool.store.lookup(session, namespace.id, 1, keys(1), skip=-1),
    ):
        with pytest.raises(InvalidRequest):
            request()
    pool.audited()


def test_namespaces_are_bounded_and_the_coldest_unused_one_makes_room() -> None:
    pool = Pool(16, max_namespaces=2)
    first, second = pool.session(), pool.session()
    a = pool.namespace(first, "a")
    b = pool.namespace(second, "b")
    pool.write(first, a, *chain(1, 2))
    pool.write(second, b, *chain(1))
    with pytest.raises(LimitReached):
        pool.namespace(first, "c")
    pool.store.writers_gone(first)
    third = pool.session()
    pool.namespace(third, "c")
    assert {figures.model for figures in pool.store.stats().namespaces} == {"b", "c"}
    assert pool.store.counters.evicted_chunks == 2
    pool.audited()


def test_namespaces_of_a_session_are_bounded() -> None:
    pool = Pool(16, max_namespaces_per_session=2)
    session = pool.session()
    pool.namespace(session, "a")
    pool.namespace(session, "b")
    assert pool.namespace(session, "a").identity.model == "a"
    with pytest.raises(LimitReached):
        pool.namespace(session, "c")
    pool.audited()


def test_lease_id_given_up_before_its_request_arrives_is_refused(
    pool: Pool, session: int, namespace: Namespace
) -> None:
    pool.write(session, namespace, *chain(1))
    pool.store.release(session, [70])
    pool.store.abort(session, namespace.id, 71, [])
    with pytest.raises(InvalidRequest):
        pool.store.lookup(session, namespace.id, 70, keys(1))
    with pytest.raises(InvalidRequest):
        pool.store.reserve(session, namespace.id, 71, chain(2))
    assert pool.store.stats().sessions[session].write_leases == 0


def test_memory_of_given_up_lease_ids_is_bounded() -> None:
    pool = Pool(16, max_leases_per_session=10)
    session = pool.session()
    namespace = pool.namespace(session)
    for lease in range(100, 150):
        pool.store.release(session, [lease])
        pool.store.abort(session, namespace.id, lease, [])
    assert len(pool.store._sessions.books[session].cancelled) == 10
    pool.audited()


def test_lease_id_in_use_is_refused(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1))
    reading, _ = pool.lease(session, namespace, key(1))
    writing = pool.reserve(session, namespace, (key(2), ROOT)).lease
    for lease in (reading, writing):
        with pytest.raises(InvalidRequest):
            pool.store.lookup(session, namespace.id, lease, keys(1))
        with pytest.raises(InvalidRequest):
            pool.store.reserve(session, namespace.id, lease, chain(3))
    assert pool.store.release(session, [writing]) == 0
    assert pool.store.abort(session, namespace.id, reading, []) == 0
    assert pool.store.renew(session, [reading, writing]) == [True, True]


def test_namespace_used_the_longest_ago_is_forgotten_first_and_never_under_a_transfer() -> None:
    pool = Pool(16, max_namespaces=3)
    session = pool.session()
    spaces = [pool.namespace(session, model) for model in "abc"]
    for space in spaces:
        pool.write(session, space, *chain(1))
    location = pool.store.lookup(session, spaces[0].id, 900, keys(1)).locations[0]
    ticket, _ = pool.store.begin_io(session, Op.READ, 900, [pool.item(spaces[0], location)])
    assert pool.stored(session, spaces[1], key(1)) == 1
    pool.store.writers_gone(session)

    def models() -> set[str]:
        return {figures.model for figures in pool.store.stats().namespaces}

    later = pool.session()
    pool.namespace(later, "d")
    assert models() == {"a", "b", "d"}  # c was used before a and b
    pool.namespace(later, "e")
    assert models() == {"a", "d", "e"}
    with pytest.raises(LimitReached):
        pool.namespace(later, "f")
    pool.store.end_io(ticket)
    pool.namespace(later, "f")
    assert models() == {"d", "e", "f"}
    pool.audited()
