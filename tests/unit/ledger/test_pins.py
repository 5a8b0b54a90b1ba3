"""Pins: what is pinned stays, whenever it comes, within a bound. Each test ends in an audit."""

from __future__ import annotations

import random

import pytest

from kvd.ledger import pins
from kvd.types import ROOT, CommitStatus, Namespace, Pin, ReserveStatus
from kvd.wire.errors import InvalidRequest, LimitReached
from kvd.wire.identity import Identity
from tests.unit.ledger.harness import GRANULE, Pool, chain, key, keys

NO_ROOM = ReserveStatus.NO_ROOM


@pytest.fixture
def saved(pool: Pool) -> list[list[list[str]]]:
    """What was to be kept, each time."""
    heard: list[list[list[str]]] = []
    pool.store.on_pins = heard.append
    return heard


def pinned(pool: Pool) -> int:
    """How many chunks are pinned, by the figures."""
    return sum(each.pinned_chunks for each in pool.store.stats().namespaces)


# ---------------------------------------------------------------- prefixes


def test_a_pinned_prefix_stays_when_everything_else_goes(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1, 2, 3, 4))
    assert pool.store.pin("default", namespace.id, key(3)) == 3
    pool.fill(session, namespace)
    assert pool.stored(session, namespace, *keys(1, 2, 3, 4)) == 3
    assert pinned(pool) == 3


def test_what_is_unpinned_may_go(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1, 2, 3))
    pool.store.pin("default", namespace.id, key(3))
    assert pool.store.unpin("default", namespace.id, key(3)) == 3
    assert pool.store.unpin("default", namespace.id, key(3)) == 0
    pool.fill(session, namespace)
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 0
    assert pinned(pool) == 0


def test_pins_that_overlap_end_one_by_one(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1, 2, 3))
    pool.write(session, namespace, *chain(4, parent=key(2)))
    for name, covered in ((3, 3), (4, 3), (1, 1)):
        assert pool.store.pin("default", namespace.id, key(name)) == covered
    assert pinned(pool) == 4
    pool.store.unpin("default", namespace.id, key(3))
    pool.fill(session, namespace)
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 2
    pool.store.unpin("default", namespace.id, key(4))
    pool.fill(session, namespace, 2000)
    assert pool.stored(session, namespace, *keys(1, 2, 4)) == 1


def test_a_pin_on_what_is_not_there_yet_takes_effect_when_it_is_stored(
    pool: Pool, session: int, namespace: Namespace
) -> None:
    assert pool.store.pin("default", namespace.id, key(3)) == 0
    pool.write(session, namespace, *chain(1, 2))
    pool.fill(session, namespace)
    assert pool.stored(session, namespace, *keys(1, 2)) == 0
    reserved = pool.reserve(session, namespace, *chain(1, 2, 3))
    assert pool.commit(session, namespace, reserved.lease, *keys(3, 2)) == [CommitStatus.WAITING_PARENT] * 2
    assert pinned(pool) == 0
    assert pool.commit(session, namespace, reserved.lease, key(1)) == [CommitStatus.STORED]
    assert pinned(pool) == 3
    pool.fill(session, namespace, 2000)
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 3


def test_a_pin_may_name_a_namespace_that_nobody_has_opened_yet(pool: Pool, session: int) -> None:
    identity = Identity(model="later", weights_revision="r")
    pool.store.pin("default", identity.namespace_id("default"), b"")
    namespace = pool.namespace(session, "later")
    pool.write(session, namespace, *chain(1, 2))
    assert pinned(pool) == 2


def test_a_tenant_cannot_pin_what_is_anothers(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1, 2))
    assert pool.store.pin("other", namespace.id, key(2)) == 0
    assert pool.store.pin("other", namespace.id, b"") == 0
    pool.write(session, namespace, *chain(3, parent=key(2)))
    pool.fill(session, namespace)
    assert pool.stored(session, namespace, *keys(1, 2)) == 0


# ---------------------------------------------------------------- namespaces


def test_a_pinned_namespace_keeps_what_is_there_and_what_comes(pool: Pool, session: int, namespace: Namespace) -> None:
    other = pool.namespace(session, "other")
    pool.write(session, namespace, *chain(1, 2))
    assert pool.store.pin("default", namespace.id, b"") == 2
    pool.write(session, namespace, *chain(3, parent=key(2)))
    pool.write(session, namespace, *chain(11, 12))
    pool.fill(session, other)
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 3
    assert pool.stored(session, namespace, *keys(11, 12)) == 2
    [figures] = pool.store.pins("default")
    assert figures == (Pin("default", namespace.id, b""), 5, 5 * GRANULE)


def test_a_pinned_namespace_that_outgrows_the_bound_stops_pinning_and_is_counted(
    pool: Pool, session: int, namespace: Namespace
) -> None:
    pool.store.pin("default", namespace.id, b"")
    for number in range(12):
        pool.write(session, namespace, (key(number), ROOT))
    assert pinned(pool) == 8
    assert pool.store.stats().counters["unpinned_chunks"] == 4
    pool.fill(session, namespace)
    assert [number for number in range(12) if pool.stored(session, namespace, key(number))] == [*range(8)]


def test_a_pinned_namespace_does_not_give_way_to_a_new_one() -> None:
    pool = Pool(16, max_namespaces=2)
    first, second = pool.session("a"), pool.session("b")
    for session in (first, second):
        namespace = pool.namespace(session)
        pool.write(session, namespace, *chain(1))
        if session == first:
            pool.store.pin("a", namespace.id, key(1))
        pool.store.close_session(session)
    pool.namespace(pool.session("c"))
    assert {each.tenant for each in pool.store.stats().namespaces} == {"a", "c"}
    pool.audited()


# ---------------------------------------------------------------- bounds


def test_more_than_half_of_the_pool_cannot_be_pinned(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(*range(9)))
    for name in (key(8), b""):
        with pytest.raises(LimitReached):
            pool.store.pin("default", namespace.id, name)
        pool.audited()
    assert (pinned(pool), pool.store.pins("default")) == (0, [])
    assert pool.store.pin("default", namespace.id, key(7)) == 8
    assert pool.store.pin("default", namespace.id, key(6)) == 7  # nothing more than is pinned already
    with pytest.raises(LimitReached):
        pool.store.pin("default", namespace.id, key(8))
    assert len(pool.store.pins("default")) == 2


def test_half_of_the_pool_is_left_for_those_who_pin_nothing(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.store.pin("default", namespace.id, b"")
    pool.fill(session, namespace)
    pool.fill(session, namespace, 2000)
    assert pool.reserve(session, namespace, (key(1), ROOT)).all(ReserveStatus.GRANTED)


def test_the_number_of_pins_is_bounded(pool: Pool, namespace: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "MAX_PINS_PER_TENANT", 3)
    monkeypatch.setattr(pins, "MAX_PINS", 5)
    for number in range(3):
        pool.store.pin("default", namespace.id, key(number))
    with pytest.raises(LimitReached):
        pool.store.pin("default", namespace.id, key(3))
    assert pool.store.pin("default", namespace.id, key(2)) == 0  # there already
    for number in range(2):
        pool.store.pin("other", namespace.id, key(number))
    with pytest.raises(LimitReached):
        pool.store.pin("other", namespace.id, key(2))


@pytest.mark.parametrize(("namespace_id", "name"), [(b"", b""), (b"n" * 31, b""), (b"n" * 32, b"k" * 31), (b"n", b"k")])
def test_names_of_the_wrong_length_are_refused(pool: Pool, namespace_id: bytes, name: bytes) -> None:
    with pytest.raises(InvalidRequest):
        pool.store.pin("default", namespace_id, name)
    assert pool.store.unpin("default", namespace_id, name) == 0


# ---------------------------------------------------------------- drop, time to live, windows


def test_drop_leaves_what_is_pinned_and_counts_it_as_kept(pool: Pool, session: int, namespace: Namespace) -> None:
    pool.write(session, namespace, *chain(1, 2, 3, 4))
    pool.store.pin("default", namespace.id, key(2))
    assert pool.store.drop("default", None) == (2, 2)
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 2


def test_what_is_pinned_does_not_expire_and_what_is_unpinned_does() -> None:
    pool = Pool(16, ttl_s=100.0)
    session = pool.session()
    namespace = pool.namespace(session)
    pool.write(session, namespace, *chain(1, 2, 3))
    pool.store.pin("default", namespace.id, key(2))
    pool.pass_time(500.0)
    pool.pass_time(1.0)
    assert pool.stored(session, namespace, *keys(1, 2, 3)) == 2
    pool.audited()
    pool.pass_time(500.0)
    pool.store.unpin("default", namespace.id, key(2))
    assert pool.stored(session, namespace, *keys(1, 2)) == 0
    pool.audited()


def test_slabs_with_something_pinned_in_them_are_not_emptied(pool: Pool, session: int, namespace: Namespace) -> None:
    large = pool.namespace(session, "large", granules=8)
    for number in range(16):
        pool.write(session, namespace, (key(number), ROOT))
    for number in (0, 8):
        pool.store.pin("default", namespace.id, key(number))
    assert pool.reserve(session, large, (key(50), ROOT)).statuses == [NO_ROOM]
    pool.store.unpin("default", namespace.id, key(0))
    assert pool.reserve(session, large, (key(50), ROOT)).all(ReserveStatus.GRANTED)


# ---------------------------------------------------------------- from one daemon to the next


def test_pins_are_told_to_be_kept_and_can_be_loaded_again(
    pool: Pool, session: int, namespace: Namespace, saved: list[list[list[str]]]
) -> None:
    pool.store.pin("default", namespace.id, key(2))
    pool.store.pin("other", namespace.id, b"")
    pool.store.unpin("other", namespace.id, b"")
    assert saved[-1] == [["default", namespace.id.hex(), key(2).hex()]]
    assert len(saved) == 3
    for before in (True, False):  # what they cover is there
        reborn = Pool(16)
        again = reborn.session()
        assert reborn.namespace(again).id == namespace.id
        if not before:
            reborn.store.load_pins(saved[-1])
        reborn.write(again, namespace, *chain(1, 2, 3))
        if before:
            reborn.store.load_pins(saved[-1])
        assert [(each.pin, each.chunks) for each in reborn.store.pins("default")] == [
            (Pin("default", namespace.id, key(2)), 2)
        ]
        reborn.fill(again, namespace)
        assert reborn.stored(again, namespace, *keys(1, 2, 3)) == 2
        reborn.audited()


def test_what_no_store_has_saved_is_not_loaded(pool: Pool) -> None:
    good = ["t", "ab" * 32, ""]
    odd = [None, 7, "x", [], ["t"], ["t", 1, 2], ["t", "zz", ""], ["t", "ab", ""], ["t", "ab" * 32, "cd"]]
    for saved in (None, 7, {"a": 1}, [*odd, good, good]):
        pool.store.load_pins(saved)
    assert [each.pin for each in pool.store.pins("t")] == [Pin("t", b"\xab" * 32, b"")]


def test_more_than_the_bound_is_not_loaded(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "MAX_PINS_PER_TENANT", 2)
    pool.store.load_pins([["t", "ab" * 32, key(number).hex()] for number in range(5)])
    assert len(pool.store.pins("t")) == 2


# ---------------------------------------------------------------- random lives


@pytest.mark.parametrize("seed", range(8))
def test_random_lives_keep_exactly_what_is_wished_as_long_as_it_may_be(seed: int) -> None:
    """A naive model: what is pinned is what is stored and wished, while that is little."""
    dice = random.Random(seed)
    pool = Pool(48)
    session = pool.session()
    spaces = [pool.namespace(session, "a"), pool.namespace(session, "b", granules=2)]
    wishes: set[tuple[int, bytes]] = set()
    leases: list[int] = []

    def path_to(number: int) -> list[bytes]:
        return keys(*(number >> shift for shift in reversed(range(number.bit_length()))))

    def there() -> dict[tuple[int, bytes], bytes | None]:
        """What is READY, and its parent."""
        return {
            (which, chunk.key): None if chunk.parent is None else chunk.parent.key
            for which, namespace in enumerate(spaces)
            for chunk in pool.store._books.spaces[namespace.id].chunks.values()
            if chunk.draft is None
        }

    def wished(stored: dict[tuple[int, bytes], bytes | None], wishes: set[tuple[int, bytes]]) -> set[tuple[int, bytes]]:
        found = set()
        for which, name in stored:
            if (which, name) in wishes or (which, b"") in wishes:
                at: bytes | None = name
                while at is not None:
                    found.add((which, at))
                    at = stored[which, at]
        return found

    def size(found: set[tuple[int, bytes]]) -> int:
        return sum((1, 2)[which] for which, _ in found)

    def kept_by_the_store() -> set[tuple[int, bytes]]:
        kept = pool.store._books.pins
        assert kept is not None
        ids = [namespace.id for namespace in spaces]
        return {(ids.index(node.space.namespace.id), node.key) for node in kept.reasons}

    complete = True  # nothing was left out since all was unpinned
    full = 0
    for _ in range(600):
        which = dice.randrange(2)
        path = path_to(dice.randrange(1, 40))
        before = there()
        kept = wished(before, wishes) if complete else set()
        act = dice.random()
        if act < 0.35:
            reserved = pool.reserve(session, spaces[which], *zip(path, [ROOT, *path], strict=False))
            pool.commit(session, spaces[which], reserved.lease, *path)
        elif act < 0.55:
            lease, found = pool.lease(session, spaces[which], *path)
            leases += [lease] * bool(found)
        elif act < 0.7 and leases:
            pool.store.release(session, [leases.pop(dice.randrange(len(leases)))])
        elif act < 0.8:
            name = dice.choice([path[-1], path[-1], b""])
            try:
                covered = pool.store.pin("default", spaces[which].id, name)
            except LimitReached:
                full += 1
            else:
                wishes.add((which, name))
                if complete:
                    assert covered == len(wished(before, {(which, name)}))
        elif act < 0.97:
            if wishes:
                which, name = dice.choice(sorted(wishes))
                pool.store.unpin("default", spaces[which].id, name)
                wishes.discard((which, name))
        else:
            pool.store.drop("default", dice.choice([None, spaces[which].id]))
        pool.audited()
        now = there()
        assert kept <= now.keys()
        held = kept_by_the_store()
        assert held <= wished(now, wishes)
        assert size(held) <= 24
        complete = (complete and size(wished(now, wishes)) <= 24) or not wishes
        if complete:
            assert held == wished(now, wishes)
    assert full and pool.store.counters.evicted_chunks > 20
