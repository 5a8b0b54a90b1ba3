"""Leaf-first LRU: the order, and what it costs."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from kvd.ledger.chunk import Chunk, Home
from kvd.ledger.coverage import Grid
from kvd.ledger.eviction import LeafLru
from kvd.ledger.index import Space
from kvd.types import Location, Namespace
from kvd.wire.identity import Identity
from tests.unit.ledger.harness import key


def space(slot_bytes: int = 4096) -> Space:
    return Space(Namespace(b"n", "t", Identity("m", "r"), slot_bytes), slot_bytes, Grid(1, 1))


def chunk(number: int, owner: Space) -> Chunk:
    return Chunk(key(number), owner, Location(0, number * 4096, number), Home(owner.slot_bytes), number, None)


def test_victim_is_the_leaf_used_the_longest_ago_and_stays_known_until_discarded() -> None:
    owner, policy = space(), LeafLru()
    chunks = [chunk(number, owner) for number in (3, 1, 2)]
    for one in chunks:
        policy.add(one)
    assert policy.coldest(4096) is chunks[1]
    assert policy.coldest(4096) is chunks[1]
    chunks[1].touched = 10
    policy.touch(chunks[1])
    assert policy.coldest(4096) is chunks[2]
    policy.discard(chunks[2])
    policy.discard(chunks[2])
    assert (policy.coldest(4096), len(policy), chunks[2] in policy) == (chunks[0], 2, False)


def test_victims_of_another_slot_size_are_no_help() -> None:
    policy = LeafLru()
    policy.add(chunk(1, space(8192)))
    assert policy.coldest(4096) is None
    assert policy.coldest(8192) is not None


def test_leasing_and_releasing_leaves_for_ever_does_not_grow_the_heap() -> None:
    owner, policy, dice = space(), LeafLru(), random.Random(1)
    chunks = [chunk(number, owner) for number in range(200)]
    for one in chunks:
        policy.add(one)
    for stamp in range(1000, 50_000):
        one = dice.choice(chunks)
        one.touched = stamp
        policy.discard(one)
        policy.add(one)
    assert len(policy._queues[4096].heap) == 200


def test_chunks_that_are_gone_do_not_stay_in_the_heap() -> None:
    owner, policy = space(), LeafLru()
    for number in range(10_000):
        one = chunk(number, owner)
        policy.add(one)
        policy.discard(one)
    assert not policy._queues or len(policy._queues[4096].heap) <= 64
    assert len(policy) == 0


@given(st.lists(st.tuples(st.sampled_from(["add", "discard", "touch", "evict"]), st.integers(0, 11)), max_size=120))
def test_order_is_that_of_a_sorted_list(steps: list[tuple[str, int]]) -> None:
    owners = [space(4096), space(8192)]
    policy = LeafLru()
    chunks = [chunk(number, owners[number % 2]) for number in range(12)]
    known: set[Chunk] = set()
    for stamp, (step, number) in enumerate(steps, start=100):
        one = chunks[number]
        if step == "add" and one not in known:
            policy.add(one)
            known.add(one)
        elif step == "discard":
            policy.discard(one)
            known.discard(one)
        elif step == "touch":
            one.touched = stamp
            policy.touch(one)
        for slot_bytes in (4096, 8192):
            mine = [each for each in known if each.space.slot_bytes == slot_bytes]
            expected = min(mine, key=lambda each: each.touched, default=None)
            assert policy.coldest(slot_bytes) is expected
            if step == "evict" and expected is not None:
                policy.discard(expected)
                known.discard(expected)
        assert len(policy) == len(known)
        assert {each for each in chunks if each in policy} == known
