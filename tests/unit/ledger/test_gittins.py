"""The policy that learns: what it learns, what it makes of that, and that it forgets what it must."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd.ledger.ghosts import MAX_USES, Ghosts
from kvd.ledger.gittins import Gittins
from kvd.ledger.index import Space
from kvd.ledger.node import Node
from kvd.ledger.reuse import _PRIOR, _WIDTHS, BUCKETS, CLASSES, ReuseTimes, _edge, _indices, bucket
from kvd.types import Namespace
from kvd.wire.identity import Identity
from tests.unit.ledger.harness import key
from tests.unit.ledger.test_eviction import SPACE, Tier

NEVER = 1 << 62

# ---------------------------------------------------------------- the time to the next use


def naive_indices(used: list[float], risk: list[float], common: list[float]) -> list[float]:
    """By the definition: of all times to stop, the one with the best rate."""
    found = []
    for start in range(len(common)):
        hits = held = best = 0.0
        alive = 1.0
        for at in range(start, len(common)):
            hazard = min(1.0, (used[at] + _PRIOR * common[at]) / (risk[at] + _PRIOR))
            hits += alive * hazard
            held += alive * (1 - hazard / 2) * _WIDTHS[at]
            alive *= 1 - hazard
            best = max(best, hits / held)
        found.append(best)
    return found


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), min_size=2, max_size=40))
def test_the_index_is_the_best_rate_over_all_times_to_stop(counts: list[tuple[int, int]]) -> None:
    used = [float(one) for one, _ in counts]
    risk = [float(sum(one + other for one, other in counts[at:])) for at in range(len(counts))]
    common = [0.01] * len(counts)
    found = _indices(used, risk, common)
    assert found[: len(counts)] == pytest.approx(naive_indices(used, risk, common), rel=1e-9)
    assert len(found) == BUCKETS


@given(st.integers(1, 1 << 40))
def test_buckets_are_quarters_of_octaves(age: int) -> None:
    assert _edge(bucket(age)) <= age < _edge(bucket(age) + 1)


def taught(rounds: int = 400) -> tuple[ReuseTimes, int]:
    """Class 1 is never used again, class 2 always after 300, class 3 after 20 or 5000."""
    reuse, dice, now = ReuseTimes(), random.Random(1), 1
    due: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for now in range(1, rounds * 10):
        for number, since in due.pop(now, []):
            reuse.used(number, since, now)
        if now % 10 == 0:
            reuse.began(1, now)
            for number, wait in ((2, 300), (3, dice.choice((20, 5000)))):
                reuse.began(number, now)
                due[now + wait].append((number, now))
        if now >= reuse.due:
            reuse.learn(now)
    reuse.learn(now)
    return reuse, now


def test_what_comes_back_is_worth_more_the_nearer_that_is() -> None:
    reuse, _ = taught()
    never, always, either = reuse.worth[1], reuse.worth[2], reuse.worth[3]
    assert reuse.learnt
    for age in (1, 100, 200):
        assert always[bucket(age)] > 3 * never[bucket(age)]
    assert always[bucket(250)] > always[bucket(100)] > always[bucket(1)] > 1 / 400
    assert either[bucket(5)] > always[bucket(5)] > either[bucket(40)]


def test_what_is_still_waited_for_counts_as_having_waited() -> None:
    reuse, now = taught()
    before = reuse.worth[2][bucket(1)]
    for _ in range(5000):  # these do not come back any more
        reuse.began(2, now)
    reuse.learn(now + 4000)
    assert reuse.worth[2][bucket(1)] < before / 2


def test_nothing_is_concluded_from_little() -> None:
    reuse = ReuseTimes()
    for now in range(2, 200):
        reuse.began(1, now)
        reuse.used(1, now, now + 1)
    reuse.learn(5000)
    assert not reuse.learnt
    assert reuse.worth[1] == reuse.worth[2]
    assert list(reuse.worth[1]) == sorted(reuse.worth[1], reverse=True)  # the older, the less


def test_counts_by_time_are_bounded_and_old_ones_fade() -> None:
    reuse = ReuseTimes()
    for now in range(1, 60_000):
        reuse.began(now % 7, now)
        if now > 100:
            reuse.used((now - 100) % 7, now - 100, now)
        if now >= reuse.due:
            reuse.learn(now)
    assert len(reuse._waiting) <= 2048
    assert sum(map(sum, reuse._used)) < 20_000


@pytest.mark.parametrize("seed", range(4))
def test_a_run_of_uses_is_learnt_as_if_they_came_one_by_one(seed: int) -> None:
    dice, now = random.Random(seed), 1
    single, runs = ReuseTimes(), ReuseTimes()
    for _ in range(1500):
        count, number = dice.choice((1, 1, 2, 7, 40, 700)), dice.randrange(1, 11)
        following = min(number + dice.randrange(2), 10)
        since = dice.randint(max(1, now - dice.choice((3, 100, 100_000))), now)
        for step in range(count):
            single.used(number, since + step, now + 1 + step)
            single.began(following, now + 1 + step)
        runs.again(number, following, since, now + 1, count)
        now += count
        assert (runs._waiting, runs._coarse, runs._used) == (single._waiting, single._coarse, single._used)
        if now >= single.due:
            single.learn(now)
            runs.learn(now)
            assert (runs.worth, runs.due) == (single.worth, single.due)


def test_conclusions_are_those_of_the_time_when_they_were_due() -> None:
    (at_once, now), (later, _) = taught(), taught()
    for reuse in (at_once, later):
        reuse.learn(now)
    expected = at_once.worth
    for step in range(1, 2000):
        later.used(1 + step % 3, now - 5, now + step)
        later.again(2, 3, now - 100, now + step, 1)
        later.lost(3, now - 7, now + step)
    assert later.worth == expected
    later.learn(now + 2000)
    assert later.worth != expected


@pytest.mark.parametrize("seed", range(4))
def test_a_prefix_is_used_as_if_its_chunks_were_used_one_by_one(seed: int) -> None:
    dice = random.Random(seed)
    policies: tuple[Gittins[Node], Gittins[Node]] = (Gittins(), Gittins())
    trees: tuple[list[Node], list[Node]] = ([], [])
    for _ in range(60):  # chains that hang on one another
        above = dice.choice([None, *range(len(trees[0]))])
        for _ in range(dice.choice((1, 5, 60))):
            for policy, nodes in zip(policies, trees, strict=True):
                parent = None if above is None else nodes[above]
                nodes.append(Node(key(len(nodes)), SPACE, len(nodes), parent=parent, uses=1))
                policy.enter(nodes[-1])
            above = len(trees[0]) - 1
    for _ in range(400):
        at: Node | None = dice.choice(trees[0])
        prefix: list[int] = []
        while at is not None:
            prefix.insert(0, int.from_bytes(at.key, "big"))
            at = at.parent
        now = policies[0]._now
        policies[0].touch([trees[0][number] for number in prefix])
        assert policies[0]._now == now + len(prefix)
        for number in prefix:
            policies[1].touch([trees[1][number]])
        assert [node.mark for node in trees[0]] == [node.mark for node in trees[1]]
    assert policies[0]._reuse.learnt
    assert policies[0]._reuse.worth == policies[1]._reuse.worth


# ---------------------------------------------------------------- ghosts


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, NEVER), st.integers(1, 2 * MAX_USES)), max_size=60))
def test_ghosts_come_back_as_they_went(steps: list[tuple[int, int, int]]) -> None:
    ghosts, known = Ghosts(), {}
    for number, used_at, uses in steps:
        name = key(number)
        assert ghosts.peek(name) == known.get(number, (0, 0))[1]
        assert ghosts.take(name) == known.pop(number, None)
        assert ghosts.put(name, used_at, uses) is None
        known[number] = (used_at % (1 << 34), min(uses, MAX_USES))
        assert len(ghosts) == len(known)


def test_the_table_of_ghosts_grows_to_its_limit_and_no_further() -> None:
    ghosts = Ghosts()
    ghosts.limit = 30_000
    forgotten = sum(ghosts.put(key(number), number, 1) is not None for number in range(100_000))
    assert len(ghosts) + forgotten == 100_000
    assert 25_000 <= len(ghosts) <= 30_000 + 4096
    assert len(ghosts._segments) * 4096 <= 30_000 + 4096
    kept = [number for number in range(100_000) if ghosts.peek(key(number))]
    assert len(kept) >= len(ghosts)
    assert sum(number >= 70_000 for number in kept) > 0.6 * len(kept)  # it is the older ones that are forgotten


def test_ghosts_are_found_while_the_table_grows() -> None:
    ghosts = Ghosts()
    ghosts.limit = 1 << 17
    for number in range(20_000):
        ghosts.put(key(number), number, 3)
    lost = sum(ghosts.take(key(number)) != (number, 3) for number in range(20_000))
    assert lost < 1500


# ---------------------------------------------------------------- the policy


def dictate(policy: Gittins[Node], worth: list[list[float]]) -> None:
    """Let it believe this, for ever."""
    policy._reuse._worth = worth
    policy._reuse.learnt = True
    policy._reuse.due = NEVER


class Naive:
    """The same policy in plain terms: per class the leaf used the longest ago; of these the one worth least."""

    def __init__(self, worth: list[list[float]]) -> None:
        self.worth = worth
        self.now = 1
        self.uses: dict[int, int] = defaultdict(int)
        self.last: dict[int, int] = {}

    def use(self, number: int) -> None:
        self.now += 1
        self.uses[number] += 1
        self.last[number] = self.now

    def victim(self, may: set[int]) -> int | None:
        by_class: dict[int, list[int]] = defaultdict(list)
        for number in may:
            by_class[self.uses[number].bit_length()].append(number)
        oldest = [min(members, key=self.last.__getitem__) for members in by_class.values()]
        return min(oldest, key=lambda number: (self.value(number), self.last[number]), default=None)

    def value(self, number: int) -> float:
        age = self.now + 1 - self.last[number]
        return self.worth[self.uses[number].bit_length()][bucket(age)]


STEPS = st.sampled_from(["bring", "may", "not", "use", "evict", "miss"])


@settings(max_examples=200)
@given(st.integers(0, 1000), st.lists(st.tuples(STEPS, st.integers(0, 9)), max_size=150))
def test_victim_and_admission_are_those_of_the_naive_policy(seed: int, steps: list[tuple[str, int]]) -> None:
    dice = random.Random(seed)
    worth = [[dice.random() for _ in range(BUCKETS)] for _ in range(CLASSES)]
    policy: Gittins[Node] = Gittins()
    dictate(policy, worth)
    tier, naive, may = Tier(policy), Naive(worth), set()
    for step, number in steps:
        inside = number in tier.inside
        if step == "bring" and not inside:
            tier.bring(number, may_go=False)
            naive.use(number)
        elif step == "may" and inside and number not in may:
            policy.add(tier.inside[number])
            may.add(number)
        elif step == "not" and inside:
            policy.discard(tier.inside[number])
            may.discard(number)
        elif step == "use" and inside:
            tier.use(number)
            naive.use(number)
        elif step == "miss" and not inside:
            policy.missed(SPACE, key(number))
            naive.use(number)
        victim = naive.victim(may)
        assert tier.victim() == victim
        if victim is not None and number not in tier.inside:
            here = worth[(naive.uses[number] + 1).bit_length()][0]
            assert policy.admits(SPACE, key(number), None, tier.inside[victim]) == (here >= naive.value(victim))
        if step == "evict" and victim is not None:
            tier.drop(victim)
            may.discard(victim)


def test_uses_before_an_eviction_count() -> None:
    policy: Gittins[Node] = Gittins()
    tier = Tier(policy)
    dictate(policy, [[float(number)] * BUCKETS for number in range(CLASSES)])  # the more often used, the better
    tier.bring(1)
    tier.use(1, 1, 1, 1)
    tier.drop(1)
    for number in (1, 2, 3):
        tier.bring(number)
    assert [tier.evict(), tier.evict(), tier.evict()] == [2, 3, 1]


def test_ghosts_are_bounded_by_the_tier() -> None:
    policy: Gittins[Node] = Gittins()
    tier = Tier(policy)
    for number in range(100_000):
        tier.bring(number)
        if len(tier.inside) > 100:
            tier.evict()
    assert len(policy._ghosts) <= (1 << 16) + 4096
    assert len(policy._reuse._waiting) <= 2048


def test_what_is_deep_in_a_prompt_is_kept_if_work_counts() -> None:
    def first_to_go(weight: float) -> int | None:
        policy: Gittins[Node] = Gittins(weight)
        tier = Tier(policy)
        dictate(policy, [[1.0] * BUCKETS] * CLASSES)
        identity = Identity("m", "r", block_tokens=16, chunk_blocks=256)
        space = Space(Namespace(b"n", "t", identity, 4096), 4096, SPACE.grid)
        above: Node | None = None
        for number in range(1, 40):  # a chain of 4096 tokens each
            node = Node(key(number), space, number, parent=above, uses=1)
            policy.enter(node)
            above = node
        tier.inside = {39: node}
        policy.add(node)
        shallow = Node(key(50), space, 50, uses=1)
        policy.enter(shallow)
        policy.add(shallow)
        return tier.victim()

    assert first_to_go(0.0) == 39  # of equals the older one
    assert first_to_go(1.0) == 50


def hits_of(tier: Tier, rounds: int, size: int, numbers: Iterator[int]) -> float:
    """Ask for one number after the other; the share of hits in the last quarter."""
    policy, hits = tier.policy, 0
    for turn in range(rounds):
        number = next(numbers)
        victim = policy.coldest(0) if len(tier.inside) >= size else None
        if number in tier.inside:
            tier.lease(number)
            hits += turn >= rounds * 3 // 4
        elif victim is None or policy.admits(SPACE, key(number), None, victim):
            if victim is not None:
                tier.evict()
            tier.bring(number)
        else:
            policy.missed(SPACE, key(number))
    return hits / (rounds - rounds * 3 // 4)


def test_a_loop_larger_than_the_tier_keeps_a_part_of_it() -> None:
    # LRU never hits here; nobody can have more than 64 %.
    assert hits_of(Tier(Gittins()), 20_000, 64, itertools.cycle(range(100))) > 0.5


def test_it_changes_its_mind_when_the_load_changes() -> None:
    tier = Tier(Gittins())
    assert hits_of(tier, 20_000, 64, itertools.cycle(range(100))) > 0.5
    assert hits_of(tier, 20_000, 64, itertools.cycle(range(1000, 1050))) > 0.9
