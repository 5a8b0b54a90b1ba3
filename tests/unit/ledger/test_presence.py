"""What the presence table says of a key from its first chunk to its last record; the audit sees when it is wrong."""

from __future__ import annotations

import pytest

from kvd.types import ROOT, ReserveStatus
from tests.unit.ledger.harness import Pool, chain, key, keys
from tests.unit.ledger.tier_life import Life


def test_a_key_is_shown_from_ready_to_evicted() -> None:
    pool = Pool()
    session = pool.session()
    namespace = pool.namespace(session)
    reserved = pool.reserve(session, namespace, *chain(1, 2))
    assert len(pool.shown) == 0
    pool.commit(session, namespace, reserved.lease, key(2))  # waits for its parent
    assert len(pool.shown) == 0
    pool.commit(session, namespace, reserved.lease, key(1))
    assert pool.shown.keys == {(namespace.id, name) for name in keys(1, 2)}
    pool.fill(session, namespace)
    assert not pool.shown.keys & {(namespace.id, name) for name in keys(1, 2)}
    assert len(pool.shown) == 16
    pool.audited()


def test_equal_keys_of_two_namespaces_are_two() -> None:
    pool = Pool()
    session = pool.session()
    one, other = pool.namespace(session, "m"), pool.namespace(session, "n")
    for namespace in (one, other):
        pool.write(session, namespace, (key(1), ROOT))
    pool.store.drop("default", one.id)
    assert pool.shown.keys == {(other.id, key(1))}
    pool.audited()


def test_the_audit_sees_a_key_that_is_missing_and_one_that_is_too_many() -> None:
    pool = Pool()
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *chain(1, 2))
    shown = set(pool.shown.keys)
    pool.shown.keys.remove((namespace.id, key(2)))
    assert ["presence table" in finding for finding in pool.store.audit()] == [True, True]
    pool.shown.keys = {*shown, (namespace.id, key(9))}
    assert ["presence table" in finding for finding in pool.store.audit()] == [True]
    pool.shown.keys = shown
    pool.audited()


@pytest.mark.parametrize("seed", range(4))
def test_a_scan_shows_what_it_finds_when_it_finds_it(seed: int) -> None:
    life = Life(seed)
    for _ in range(400):
        life.step()
    life.settle()
    life.die()
    left = {content for content, _, _ in life.disk.values()}
    assert left and life.unscanned
    while life.unscanned:
        life.scan_one()
        space = life.store._books.spaces[life.namespace.id]
        shown = {name for _, name in life.shown.keys}
        sound = {name for name, record in space.records.items() if not record.condemned}
        assert shown == sound | {name for name, chunk in space.chunks.items() if chunk.draft is None}
        assert sound <= {name for _, name in left}
    assert life.store.audit() == []


def test_a_key_stays_shown_while_its_record_outlives_its_chunk() -> None:
    for seed in range(40):
        life = Life(seed)
        for _ in range(300):
            life.step()
        space = life.store._books.spaces[life.namespace.id]
        below = {name for name, record in space.records.items() if not record.condemned} - set(space.chunks)
        assert all(life.shown.may_hold(life.namespace.id, name) for name in below)
        if below:
            life.store.drop("t", life.namespace.id)
            assert life.store.audit() == []
            return
    raise AssertionError("nothing was ever on the disk only")


def test_a_chunk_that_is_refused_is_not_shown() -> None:
    pool = Pool()
    session = pool.session()
    namespace = pool.namespace(session)
    assert pool.reserve(session, namespace, (key(2), key(1))).all(ReserveStatus.NO_PARENT)
    lost = pool.reserve(session, namespace, (key(3), ROOT))
    pool.store.abort(session, namespace.id, lost.lease, [])
    assert len(pool.shown) == 0
    pool.audited()
