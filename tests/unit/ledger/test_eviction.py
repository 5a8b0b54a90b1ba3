"""Eviction policies as such: the order of leaf-first LRU and of S3-FIFO, and what every policy promises."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.ledger import policies
from kvd.ledger.coverage import Grid
from kvd.ledger.eviction import EvictionPolicy, LeafLru
from kvd.ledger.index import Space
from kvd.ledger.node import Node
from kvd.ledger.s3fifo import S3Fifo
from kvd.types import Namespace
from kvd.wire.identity import Identity
from tests.unit.ledger.harness import key

SPACE = Space(Namespace(b"n", "t", Identity("m", "r"), 4096), 4096, Grid(1, 1))

everywhere = pytest.mark.parametrize("name", policies.NAMES)


class Sized(Node):
    """A node of one of two size classes, by its number."""

    @property
    def size_class(self) -> int:
        return int.from_bytes(self.key, "big") % 2


class Tier:
    """Tells a policy what a tier tells it, of nodes without children."""

    def __init__(self, policy: EvictionPolicy[Node]) -> None:
        self.policy = policy
        self.stamp = 0
        self.inside: dict[int, Node] = {}

    def bring(self, number: int, *, may_go: bool = True, kind: type[Node] = Node) -> Node:
        self.stamp += 1
        node = self.inside[number] = kind(key(number), SPACE, self.stamp, uses=1)
        self.policy.enter(node)
        if may_go:
            self.policy.add(node)
        return node

    def use(self, *numbers: int) -> None:
        for number in numbers:
            node = self.inside[number]
            self.stamp += 1
            node.touched = self.stamp
            node.uses += 1
            self.policy.touch((node,))

    def lease(self, number: int) -> None:
        """What a lookup and a release do."""
        self.use(number)
        self.policy.discard(self.inside[number])
        self.policy.add(self.inside[number])

    def drop(self, number: int) -> None:
        node = self.inside.pop(number)
        self.policy.discard(node)
        self.policy.leave(node)

    def victim(self, size_class: int = 0) -> int | None:
        node = self.policy.coldest(size_class)
        return None if node is None else int.from_bytes(node.key, "big")

    def evict(self) -> int | None:
        number = self.victim()
        if number is not None:
            self.drop(number)
        return number


def entries(policy: Any) -> int:
    """How many entries the heaps of a policy have."""
    if isinstance(policy, LeafLru):
        return sum(len(queue.heap) for queue in policy._queues.values())
    if isinstance(policy, S3Fifo):
        return sum(len(heap) for queues in policy._queues.values() for heap in queues.heaps)
    return sum(len(heap) for shelf in policy._shelves.values() for heap in shelf.heaps.values())


# ---------------------------------------------------------------- all of them


@everywhere
def test_victim_stays_known_until_it_is_discarded(name: str) -> None:
    tier = Tier(policies.make(name))
    for number in (1, 2, 3):
        tier.bring(number)
    assert [tier.victim(), tier.victim()] == [1, 1]
    node = tier.inside[1]
    tier.policy.discard(node)
    tier.policy.discard(node)
    assert (tier.victim(), len(tier.policy), node in tier.policy) == (2, 2, False)


@everywhere
def test_victims_of_another_size_class_are_no_help(name: str) -> None:
    tier = Tier(policies.make(name))
    tier.bring(1, kind=Sized)
    assert (tier.victim(0), tier.victim(1)) == (None, 1)


@everywhere
def test_nobody_is_a_victim_who_may_not_go(name: str) -> None:
    tier = Tier(policies.make(name))
    tier.bring(1, may_go=False)
    tier.bring(2)
    assert tier.evict() == 2
    assert tier.victim() is None
    tier.policy.add(tier.inside[1])
    assert tier.victim() == 1


@everywhere
def test_leasing_and_releasing_leaves_for_ever_does_not_make_the_heaps_grow(name: str) -> None:
    tier, dice = Tier(policies.make(name)), random.Random(1)
    for number in range(200):
        tier.bring(number)
    for _ in range(30_000):
        tier.lease(dice.randrange(200))
    assert entries(tier.policy) <= 2 * 200 + 64


@everywhere
def test_nodes_that_are_gone_do_not_stay_in_the_heaps(name: str) -> None:
    tier = Tier(policies.make(name))
    for number in range(10_000):
        tier.bring(number)
        tier.drop(number)
    assert (len(tier.policy), entries(tier.policy) <= 64) == (0, True)


@everywhere
def test_a_victim_costs_as_little_among_many_as_among_few(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            return step(*arguments)

        return count

    for step in ("heappop", "heappush", "heapreplace"):
        monkeypatch.setattr(heapq, step, counted(getattr(heapq, step)))

    def steps_per_eviction(nodes: int, rounds: int = 3000) -> float:
        nonlocal steps
        tier, dice = Tier(policies.make(name)), random.Random(2)
        for number in range(nodes):
            tier.bring(number)
        steps = 0
        for number in range(nodes, nodes + rounds):
            used = dice.randrange(number - nodes, number)
            if used in tier.inside:
                tier.lease(used)
            tier.evict()
            tier.bring(number)
        return steps / rounds

    assert steps_per_eviction(20_000) <= 2 * steps_per_eviction(500) + 2


@everywhere
@given(steps=st.lists(st.tuples(st.sampled_from(["bring", "may", "not", "use", "evict", "drop"]), st.integers(0, 11))))
def test_policies_know_exactly_who_may_go(name: str, steps: list[tuple[str, int]]) -> None:
    tier, may = Tier(policies.make(name)), set()
    for step, number in steps:
        inside = number in tier.inside
        if step == "bring" and not inside:
            tier.bring(number, may_go=False)
        elif step == "may" and inside and number not in may:
            tier.policy.add(tier.inside[number])
            may.add(number)
        elif step == "not" and inside:
            tier.policy.discard(tier.inside[number])
            may.discard(number)
        elif step == "use" and inside:
            tier.use(number)
        elif step == "drop" and inside:
            tier.drop(number)
            may.discard(number)
        elif step == "evict":
            gone = tier.evict()
            assert (gone in may) if may else gone is None
            may.discard(gone)
        assert len(tier.policy) == len(may)
        assert {number for number, node in tier.inside.items() if node in tier.policy} == may


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'clock'"):
        policies.make("clock")


# ---------------------------------------------------------------- LRU, and what has learnt nothing yet


@pytest.mark.parametrize("name", [policies.LRU, policies.DEFAULT])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["bring", "may", "not", "use", "evict"]), st.integers(0, 11)), max_size=120
    )
)
def test_the_order_is_that_of_a_sorted_list(name: str, steps: list[tuple[str, int]]) -> None:
    tier, may = Tier(policies.make(name)), set()
    for step, number in steps:
        inside = number in tier.inside
        if step == "bring" and not inside:
            tier.bring(number, kind=Sized, may_go=False)
        elif step == "may" and inside and number not in may:
            tier.policy.add(tier.inside[number])
            may.add(number)
        elif step == "not" and inside:
            tier.policy.discard(tier.inside[number])
            may.discard(number)
        elif step == "use" and inside:
            tier.use(number)
        for size_class in (0, 1):
            mine = [number for number in may if number % 2 == size_class]
            expected = min(mine, key=lambda number: tier.inside[number].touched, default=None)
            assert tier.victim(size_class) == expected
            if step == "evict" and expected is not None:
                tier.drop(expected)
                may.discard(expected)


# ---------------------------------------------------------------- S3-FIFO


def test_s3fifo_lets_go_first_of_what_came_and_was_not_used_again() -> None:
    tier = Tier(S3Fifo())
    for number in range(20):
        tier.bring(number)
    tier.use(0, 0, 1, 1, 2)
    assert [tier.evict() for _ in range(4)] == [2, 3, 4, 5]  # 0 and 1 went over to the main queue, once is not enough
    tier.bring(3)  # it was evicted not long ago: straight to the main queue
    for number in range(30, 60):
        tier.bring(number)
    gone = [tier.evict() for _ in range(30)]
    assert not {0, 1, 3} & set(gone)


def test_s3fifo_gives_a_leaf_its_old_place_back() -> None:
    tier = Tier(S3Fifo())
    for number in range(10):
        tier.bring(number)
    tier.policy.discard(tier.inside[0])
    assert tier.victim() == 1
    tier.policy.add(tier.inside[0])
    assert tier.victim() == 0
