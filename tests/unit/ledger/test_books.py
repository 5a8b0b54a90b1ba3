"""Tenants, sessions, operators, and the audit. Each test ends in an audit."""

from __future__ import annotations

import pytest

from kvd.types import ChunkState, Location, Namespace
from kvd.wire.errors import InvalidRequest, NamespaceUnknown, SessionUnknown
from kvd.wire.frames import Op
from tests.unit.ledger.harness import GRANULE, Pool, chain, key, keys

# ---------------------------------------------------------------- tenants, sessions, operators


def test_tenants_never_meet_in_one_namespace(pool: Pool) -> None:
    red, blue = pool.session("red"), pool.session("blue")
    pool.write(red, pool.namespace(red), *chain(1))
    own = pool.namespace(blue)
    assert pool.stored(blue, own, key(1)) == 0
    with pytest.raises(NamespaceUnknown):
        pool.store.lookup(blue, pool.namespace(red).id, 900, keys(1))
    figures = {tenant.tenant: tenant for tenant in pool.store.stats().tenants}
    assert (figures["red"].chunks, figures["red"].bytes, figures["red"].sessions) == (1, GRANULE, 1)
    assert (figures["blue"].chunks, figures["blue"].bytes, figures["blue"].sessions) == (0, 0, 1)


def test_namespace_must_be_opened_in_each_session_and_keeps_its_chunk_size(
    pool: Pool, session: int, namespace: Namespace
) -> None:
    other = pool.session()
    with pytest.raises(NamespaceUnknown):
        pool.store.lookup(other, namespace.id, 1, keys(1))
    with pytest.raises(InvalidRequest):
        pool.store.open_namespace(other, namespace.identity, GRANULE + 1)
    assert pool.store.open_namespace(other, namespace.identity, GRANULE) == namespace
    for size in (0, -1, pool.store.max_chunk_bytes + 1):
        with pytest.raises(InvalidRequest):
            pool.store.open_namespace(other, namespace.identity, size)


def test_ended_session_can_ask_for_nothing(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.store.close_session(session)
    for request in (
        lambda: pool.namespace(session),
        lambda: pool.store.lookup(session, namespace.id, 1, keys(1)),
        lambda: pool.store.reserve(session, namespace.id, 1, chain(1)),
        lambda: pool.store.commit(session, namespace.id, 1, [(key(1), ())]),
        lambda: pool.store.abort(session, namespace.id, 1, []),
        lambda: pool.store.release(session, [1]),
        lambda: pool.store.renew(session, [1]),
        lambda: pool.store.begin_io(session, Op.READ, 1, []),
    ):
        with pytest.raises(SessionUnknown):
            request()
    pool.store.close_session(session)
    pool.store.writers_gone(session)
    pool.store.writers_gone(session)


def test_namespace_that_nobody_has_open_keeps_its_chunks(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1, 2))
    pool.store.writers_gone(session)
    later = pool.session()
    assert pool.stored(later, pool.namespace(later), *keys(1, 2)) == 2


def test_drop_leaves_what_is_leased_or_being_written(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1, 2, 3))
    pool.write(session, namespace, *chain(11, 12))
    pool.write(session, namespace, *chain(21, 22))
    lease, _ = pool.lease(session, namespace, *keys(1, 2, 3), skip=1)
    pool.store.release(session, [lease])
    pool.lease(session, namespace, *keys(1, 2))
    pool.reserve(session, namespace, *chain(13, parent=key(12)))
    assert pool.store.drop("default", namespace.id) == (3, 5)
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 2
    assert pool.stored(session, namespace, *keys(11, 12)) == 2
    assert pool.stored(session, namespace, *keys(21, 22)) == 0
    assert pool.store.counters.dropped_chunks == 3


def test_drop_reaches_only_the_tenants_own(pool: Pool) -> None:
    red, blue = pool.session("red"), pool.session("blue")
    theirs = pool.namespace(red)
    pool.write(red, theirs, *chain(1))
    pool.write(blue, pool.namespace(blue), *chain(1))
    with pytest.raises(NamespaceUnknown):
        pool.store.drop("blue", theirs.id)
    assert pool.store.drop("blue", None) == (1, 0)
    assert pool.stored(red, theirs, key(1)) == 1


def test_stats_of_a_session_tell_what_it_holds(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1))
    pool.lease(session, namespace, key(1))
    pool.reserve(session, namespace, *chain(2, 3, parent=key(1)))
    figures = pool.store.stats().sessions[session]
    assert (figures.read_leases, figures.write_leases, figures.writing_bytes) == (1, 2, 2 * GRANULE)
    (named,) = pool.store.stats().namespaces
    assert (named.namespace_id, named.chunks, named.bytes) == (namespace.id, 1, 3 * GRANULE)


# ---------------------------------------------------------------- the audit itself


def test_audit_sees_a_slot_that_two_books_disagree_about(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1, 2))
    pool.lease(session, namespace, *keys(1))
    books = pool.store._books
    chunk = books.by_offset[pool.store.lookup(session, namespace.id, 900, keys(1, 2)).locations[1].offset]

    def seen_and_undone(field: str, value: object, owner: object = chunk) -> None:
        before = getattr(owner, field)
        setattr(owner, field, value)
        assert pool.store.audit(), f"{field} = {value!r} was not noticed"
        setattr(owner, field, before)
        assert pool.store.audit() == []

    space, book = chunk.space, pool.store._sessions.books[session]
    seen_and_undone("holds", chunk.holds + 1)
    seen_and_undone("holds", 0)
    seen_and_undone("touched", chunk.touched + 1)
    seen_and_undone("state", ChunkState.WAITING)
    seen_and_undone("evictable", True)
    seen_and_undone("key", key(7))
    seen_and_undone("location", Location(0, chunk.location.offset, 999))
    seen_and_undone("location", Location(0, chunk.location.offset + GRANULE, chunk.location.generation))
    seen_and_undone("parent", None)
    seen_and_undone("ready", 1, space)
    seen_and_undone("writing", 1, space)
    seen_and_undone("leaving", 1, space)
    seen_and_undone("sessions", 2, space)
    seen_and_undone("slot_bytes", 2 * GRANULE, space)
    seen_and_undone("leased_chunks", 1, book)
    seen_and_undone("writing_bytes", 1, book)
    seen_and_undone("reads", {}, book)
    seen_and_undone("held", 0, chunk.home)
    seen_and_undone("last_generation", 0, books)
    seen_and_undone("by_offset", {}, books)
    seen_and_undone("words", {}, pool.table)
    seen_and_undone("stored_chunks", 1, pool.store.counters)
    seen_and_undone("reserved_chunks", 1, pool.store.counters)
    seen_and_undone("taken_bytes", 1, pool.slabs._parts[0])
    seen_and_undone("_free_regions", 1, pool.slabs)
