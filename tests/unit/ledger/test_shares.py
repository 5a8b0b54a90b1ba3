"""Shares: what is borrowed, what is kept for its owner, what is never exceeded. Each test ends in an audit."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd.ledger.chunk import Chunk
from kvd.ledger.eviction import LeafLru
from kvd.ledger.shares import SharedPolicy
from kvd.types import ROOT, CommitStatus, Namespace, ReserveStatus, Share
from kvd.wire.identity import Identity
from tests.unit.ledger.harness import GRANULE, Pool, chain, key, keys

GRANTED, NO_ROOM = ReserveStatus.GRANTED, ReserveStatus.NO_ROOM


def tenant(name: str, soft: int | None = None, hard: int | None = None) -> Share:
    """A share in granules."""
    return Share(name, None, None if soft is None else soft * GRANULE, None if hard is None else hard * GRANULE)


def part(namespace_id: bytes, soft: int | None = None, hard: int | None = None) -> Share:
    """A namespace's share, in granules."""
    return Share(None, namespace_id, *(None if size is None else size * GRANULE for size in (soft, hard)))


def shared(*shares: Share, granules: int = 16, **limits: float) -> Pool:
    """A pool with shares."""
    policy: SharedPolicy[Chunk] = SharedPolicy(shares, LeafLru, lambda chunk: chunk.space.slot_bytes)
    return Pool(granules, policy=policy, **limits)


class User:
    """One tenant's session and namespace, and the chunks it has stored."""

    def __init__(self, pool: Pool, name: str, model: str = "m", granules: int = 1) -> None:
        self.pool = pool
        self.session = pool.session(name)
        self.namespace = pool.namespace(self.session, model, granules)

    def store(self, *numbers: int) -> list[ReserveStatus]:
        """Single chunks with these numbers."""
        found = []
        for number in numbers:
            reserved = self.pool.reserve(self.session, self.namespace, (key(number), ROOT))
            if reserved.all(GRANTED):
                self.pool.commit(self.session, self.namespace, reserved.lease, key(number))
            found += reserved.statuses
            self.pool.audited()
        return found

    def has(self, numbers: Iterable[int]) -> list[int]:
        """Which of these are there; nothing is touched."""
        space = self.pool.store._books.spaces[self.namespace.id]
        return [number for number in numbers if key(number) in space.chunks]


# ---------------------------------------------------------------- hard and soft


def test_a_tenant_never_exceeds_its_hard_share_even_in_an_empty_pool() -> None:
    pool = shared(tenant("red", hard=4))
    red = User(pool, "red")
    assert set(red.store(*range(10))) == {GRANTED}
    assert red.has(range(10)) == [6, 7, 8, 9]
    assert pool.store.stats().pool.ready_bytes == 4 * GRANULE


def test_slots_that_are_written_or_in_quarantine_count() -> None:
    pool = shared(tenant("red", hard=4))
    red, again = User(pool, "red"), User(pool, "red")
    assert pool.reserve(red.session, red.namespace, *chain(1, 2, 3)).all(GRANTED)
    assert pool.reserve(again.session, again.namespace, *chain(11, 12)).statuses == [GRANTED, NO_ROOM]
    pool.store.writers_gone(red.session)
    assert again.store(20) == [NO_ROOM]
    pool.pass_time(pool.limits.quarantine_s)
    assert set(again.store(20, 21, 22)) == {GRANTED}


def test_what_is_idle_may_be_borrowed_and_is_given_back_when_its_owner_comes() -> None:
    pool = shared(tenant("red", soft=8), tenant("blue", soft=8))
    red, blue = User(pool, "red"), User(pool, "blue")
    red.store(*range(16))
    assert len(red.has(range(16))) == 16
    blue.store(*range(100, 112))
    assert red.has(range(16)) == [*range(8, 16)]
    assert blue.has(range(100, 112)) == [*range(104, 112)]


def test_nobody_gets_what_is_kept_for_another_however_cold_it_is() -> None:
    pool = shared(tenant("red", soft=4))
    red, green = User(pool, "red"), User(pool, "green")
    red.store(*range(6))
    green.store(*range(100, 200))
    assert red.has(range(6)) == [2, 3, 4, 5]
    assert len(green.has(range(100, 200))) == 12


def test_who_has_less_than_its_share_takes_from_those_beyond_theirs_before_it_takes_its_own() -> None:
    pool = shared(tenant("red", soft=8))
    red, green = User(pool, "red"), User(pool, "green")
    red.store(*range(4))
    green.store(*range(100, 112))  # younger than anything of red
    red.store(*range(4, 8))
    assert len(red.has(range(8))) == 8
    red.store(8)
    assert len(red.has(range(9))) == 9
    red.store(9)  # now the coldest goes, whoever has it
    assert red.has(range(10)) == [*range(1, 10)]


def test_no_room_is_the_answer_when_all_else_is_kept_for_others() -> None:
    pool = shared(tenant("red", soft=16))
    red, green = User(pool, "red"), User(pool, "green")
    red.store(*range(16))
    assert green.store(100) == [NO_ROOM]
    assert len(red.has(range(16))) == 16
    assert red.store(16) == [GRANTED]


def test_a_namespace_has_its_share_inside_that_of_its_tenant() -> None:
    inner = Identity(model="inner", weights_revision="r").namespace_id("red")
    pool = shared(tenant("red", soft=8, hard=8), part(inner, soft=2, hard=4))
    small, large, green = User(pool, "red", "inner"), User(pool, "red", "outer"), User(pool, "green")
    assert small.namespace.id == inner
    small.store(*range(6))
    assert small.has(range(6)) == [2, 3, 4, 5]  # its own bound
    large.store(*range(10, 20))
    assert small.has(range(6)) == [4, 5]  # what is beyond its own soft share serves its tenant first
    assert len(large.has(range(10, 20))) == 6
    green.store(*range(100, 120))
    assert len(green.has(range(100, 120))) == 8
    small.store(*range(6, 8))
    assert (small.has(range(8)), len(large.has(range(10, 20)))) == ([5, 6, 7], 5)


def test_figures_tell_the_shares() -> None:
    pool = shared(tenant("red", soft=8), tenant("blue", hard=4))
    User(pool, "red"), User(pool, "blue"), User(pool, "green")
    bounds = {each.tenant: (each.soft_bytes, each.hard_bytes) for each in pool.store.stats().tenants}
    assert bounds == {"red": (8 * GRANULE, None), "blue": (None, 4 * GRANULE), "green": (None, None)}


# ---------------------------------------------------------------- slots of several sizes


def test_a_window_that_holds_what_is_kept_for_others_is_not_emptied() -> None:
    pool = shared(tenant("red", soft=8))
    red, green = User(pool, "red"), User(pool, "green", "large", granules=4)
    red.store(*range(16))
    assert set(green.store(*range(100, 110))) == {GRANTED}
    assert len(red.has(range(16))) == 8
    assert len(green.has(range(100, 110))) == 2


def test_windows_that_may_be_emptied_are_found_behind_any_number_that_may_not() -> None:
    pool = shared(tenant("red", soft=32), granules=64)
    red, green, blue = User(pool, "red"), User(pool, "green"), User(pool, "blue", "large", granules=4)
    red.store(*range(32))  # the coldest half of the pool
    green.store(*range(100, 132))
    assert set(blue.store(*range(200, 208))) == {GRANTED}
    assert (len(red.has(range(32))), green.has(range(100, 132))) == (32, [])


def test_a_hard_share_is_kept_with_chunks_of_any_size_inside() -> None:
    pool = shared(tenant("red", hard=8), granules=64)
    small, large = User(pool, "red"), User(pool, "red", "large", granules=4)
    small.store(*range(8))
    assert large.store(100) == [GRANTED]
    assert small.has(range(8)) == [4, 5, 6, 7]
    assert set(large.store(101, 102)) == {GRANTED}
    assert (small.has(range(8)), large.has(range(100, 103))) == ([], [101, 102])
    assert small.store(9) == [GRANTED]
    assert large.has(range(100, 103)) == [102]


def test_a_chunk_that_is_larger_than_its_hard_share_is_no_reason_to_evict_for_ever() -> None:
    pool = shared(tenant("red", hard=2))
    red = User(pool, "red", "large", granules=4)
    assert red.store(1, 2) == [NO_ROOM, NO_ROOM]


# ---------------------------------------------------------------- namespaces, smaller shares


def test_a_namespace_that_is_kept_does_not_give_way_to_a_new_one() -> None:
    pool = shared(tenant("red", soft=4), max_namespaces=2)
    red, green = User(pool, "red"), User(pool, "green")
    red.store(1)
    green.store(2)
    for user in (red, green):
        pool.store.close_session(user.session)
    User(pool, "blue")
    left = {each.tenant for each in pool.store.stats().namespaces}
    assert left == {"red", "blue"}
    pool.audited()


def test_a_share_that_was_made_smaller_gives_back_what_it_has_too_much_in_the_background() -> None:
    pool = shared(tenant("red", hard=1024), granules=1024)
    red = User(pool, "red")
    pool.write(red.session, red.namespace, *chain(*range(1000)))
    pool.store.tick()
    shares = pool.store._books.shares
    assert shares is not None
    shares.tenants["red"].hard_bytes = 100 * GRANULE
    left = []
    for _ in range(5):
        pool.store.tick()
        left.append(pool.store.stats().tenants[0].chunks)
        pool.audited()
    assert left == [744, 488, 232, 100, 100]
    assert pool.stored(red.session, red.namespace, *keys(*range(1000))) == 100


# ---------------------------------------------------------------- against a naive model

USERS = ("red", "blue", "green")
sizes = st.none() | st.integers(1, 12)


class Naive:
    """Lists, in the order of use. One slot size; single chunks."""

    def __init__(self, shares: dict[str, tuple[int | None, int | None]], capacity: int) -> None:
        self.soft = {name: (shares.get(name) or (None, None))[0] or 0 for name in USERS}
        self.hard = {name: (shares.get(name) or (None, None))[1] or 99 for name in USERS}
        self.capacity = capacity
        self.chunks: list[tuple[str, int]] = []

    def used(self, name: str) -> int:
        return sum(owner == name for owner, _ in self.chunks)

    def store(self, name: str, number: int) -> bool:
        if (name, number) in self.chunks:
            self.use(name, number)
            return True
        own = [chunk for chunk in self.chunks if chunk[0] == name]
        if len(own) >= self.hard[name]:
            self.chunks.remove(own[0])
        elif len(self.chunks) >= self.capacity:
            beyond = [chunk for chunk in self.chunks if self.used(chunk[0]) > self.soft[chunk[0]]]
            if not beyond and not own:
                return False
            self.chunks.remove((beyond or own)[0])
        self.chunks.append((name, number))
        return True

    def use(self, name: str, number: int) -> bool:
        if (name, number) not in self.chunks:
            return False
        self.chunks.remove((name, number))
        self.chunks.append((name, number))
        return True


@settings(deadline=None)
@given(
    bounds=st.dictionaries(
        st.sampled_from(USERS), st.tuples(sizes, sizes).filter(lambda s: s[0] is None or s[1] is None or s[0] <= s[1])
    ),
    steps=st.lists(st.tuples(st.sampled_from(USERS), st.integers(0, 20), st.booleans()), max_size=150),
)
def test_one_after_the_other_goes_as_in_a_naive_model(
    bounds: dict[str, tuple[int | None, int | None]], steps: list[tuple[str, int, bool]]
) -> None:
    pool = shared(*(tenant(name, *both) for name, both in bounds.items() if both != (None, None)))
    users, naive = {name: User(pool, name) for name in USERS}, Naive(bounds, 16)
    for name, number, store in steps:
        if store:
            granted = users[name].store(number)[0] is not NO_ROOM
            assert granted == naive.store(name, number)
        else:
            found = pool.stored(users[name].session, users[name].namespace, key(number))
            assert bool(found) == naive.use(name, number)
        assert {each: users[each].has(range(21)) for each in USERS} == {
            each: sorted(number for owner, number in naive.chunks if owner == each) for each in USERS
        }


@pytest.mark.parametrize("seed", range(6))
def test_random_lives_keep_every_bound_whatever_the_sizes(seed: int) -> None:
    """Prefixes, several sizes, leases, writers that come late: no share is ever exceeded or taken from."""
    dice = random.Random(seed)
    inner = Identity(model="inner", weights_revision="r").namespace_id("red")
    shares = [tenant("red", 8, 20), part(inner, 4, 9), tenant("blue", 10), tenant("green", None, 12)]
    pool = shared(*shares, granules=48)
    users = [
        User(pool, "red", "inner"),
        User(pool, "red", "wide", granules=3),
        User(pool, "blue"),
        User(pool, "blue", "wide", granules=2),
        User(pool, "green", "wide", granules=5),
        User(pool, "grey", granules=2),
    ]
    books = pool.store._books
    assert books.shares is not None
    accounts = [*books.shares.tenants.values(), *books.shares.namespaces.values()]
    leases: list[tuple[int, int]] = []
    refused = 0
    for _ in range(500):
        user = dice.choice(users)
        first = dice.randrange(12)
        path = list(range(first * 10, first * 10 + dice.randrange(1, 6)))
        before = [account.used_bytes for account in accounts]
        if dice.random() < 0.25:
            lease, found = pool.lease(user.session, user.namespace, *keys(*path))
            if found:
                leases.append((user.session, lease))
        elif dice.random() < 0.3 and leases:
            session, lease = leases.pop(dice.randrange(len(leases)))
            pool.store.release(session, [lease])
        elif dice.random() < 0.02:
            pool.store.tick()
        else:
            reserved = pool.reserve(user.session, user.namespace, *chain(*path))
            refused += NO_ROOM in reserved.statuses
            statuses = pool.commit(user.session, user.namespace, reserved.lease, *keys(*path))
            assert all(
                status is CommitStatus.STORED
                for status, result in zip(statuses, reserved.statuses, strict=True)
                if result is GRANTED
            )
            own = books.shares.accounts(user.namespace)
            for account, had in zip(accounts, before, strict=True):
                assert account.used_bytes <= account.hard_bytes
                if account not in own:
                    assert account.used_bytes >= min(had, account.soft_bytes), "taken from what is kept"
            if NO_ROOM in reserved.statuses:
                _there_was_no_room(pool, user.namespace, path)
        pool.audited()
    assert refused > 3 and pool.store.counters.evicted_chunks > 100


def _there_was_no_room(pool: Pool, namespace: Namespace, path: list[int]) -> None:
    """NO_ROOM is the truth: no victim of this size may go, beside those that the request is about."""
    books = pool.store._books
    shares, space = books.shares, books.spaces[namespace.id]
    assert shares is not None
    about = {space.chunks[name] for name in keys(*path) if name in space.chunks}
    for chunk in about:
        books.hold(chunk)
    assert shares.victim(namespace, space.slot_bytes, space.slot_bytes) is None
    own = shares.accounts(namespace)
    full = [account for account in own if account.used_bytes + space.slot_bytes > account.hard_bytes]
    for each in books.spaces.values():
        for chunk in each.chunks.values():
            if chunk.holds or chunk.first_child is not None:
                continue
            theirs = shares.accounts(each.namespace)
            kept = [a for a in theirs if a not in own and a.used_bytes - each.slot_bytes < a.soft_bytes]
            inside = all(account in theirs for account in full)
            right_size = bool(full) or each.slot_bytes == space.slot_bytes
            assert kept or not inside or not right_size, "a victim was overlooked"
    for chunk in about:
        books.unhold(chunk)
