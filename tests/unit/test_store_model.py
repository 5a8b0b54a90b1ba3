"""Random lives of the store, compared step by step with a naive model; every step ends in a clean audit."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from kvd.wire.frames import Op
from tests.unit.ledger.machine import StoreMachine
from tests.unit.ledger.machine_state import KEYS, NAMESPACES, TENANTS

TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)

#: How often each step comes in a long life.
STEPS = {
    "store_prefix": 8,
    "reserve": 4,
    "commit": 5,
    "lookup": 8,
    "release": 2,
    "renew": 1,
    "begin_io": 6,
    "end_io": 5,
}
STEPS |= {"abort": 2, "pass_time": 4, "drop": 1, "come": 2, "end_session": 1, "prove_writers_gone": 1}
STEPS |= {"catch_up": 3}
STEPS |= {"use_a_lease_that_was_given_up": 1, "pin": 2, "unpin": 1}

#: What happens in lives with disks, restarts or a time to live only: see ``tests.unit.ledger.test_keeping``.
ELSEWHERE = {"again", "condemned", "corrupt", "disk", "dropped_records", "expired_chunks", "expired_records", "moved"}
ELSEWHERE |= {"promote", "promoted", "recovered", "spilled", "unpromoted", "unspilled", "unverified"}


def arguments(name: str, dice: random.Random) -> dict[str, Any]:
    """Arguments for one step, as its rule would draw them."""
    some = {
        "which": dice.randrange(1 << 16),
        "other": dice.randrange(1 << 16),
        "index": dice.randrange(KEYS),
        "ends": [dice.randrange(KEYS) for _ in range(dice.randint(1, 3))],
        "cut": dice.choice([0, 0, 0, 1]),
        "wrong": dice.random() < 0.1,
        "spoil": dice.random() < 0.1,
        "skip": dice.choice([0, 0, 1, 3]),
        "part": dice.choice([0, 0, 1, 2, 3]),
        "backwards": dice.random() < 0.5,
        "stripes": dice.choice([0, 0, 1, 2]),
        "op": dice.choice(list(Op)),
        "count": dice.randint(1, 3),
        "fits": dice.random() < 0.8,
        "failed": {dice.randrange(3)} if dice.random() < 0.4 else set(),
        "seconds": dice.choice([0.5, 0.5, 4.0, 5.0, 20.0, 31.0]),
        "tenant": dice.choice(TENANTS),
        "everything": dice.random() < 0.2,
        "whole": dice.random() < 0.6,
        "most": dice.choice([1, 2, 5, 100]),
    }
    if name == "come":
        some["which"] = dice.sample(NAMESPACES, dice.randint(1, 3))
    wanted = {
        "store_prefix": "which ends",
        "reserve": "which ends cut wrong",
        "commit": "which part backwards stripes",
        "lookup": "which index skip spoil",
        "release": "which other",
        "renew": "which",
        "begin_io": "which op other count fits",
        "end_io": "which failed",
        "abort": "which part",
        "pass_time": "seconds",
        "catch_up": "most",
        "drop": "tenant which everything",
        "come": "tenant which",
        "end_session": "which",
        "prove_writers_gone": "which",
        "use_a_lease_that_was_given_up": "which other",
        "pin": "which index whole",
        "unpin": "which",
    }[name]
    return {argument: some[argument] for argument in wanted.split()}


def possible(machine: StoreMachine, name: str) -> bool:
    """What the rules' preconditions say."""
    if name in ("end_io",):
        return bool(machine.tickets)
    if name == "end_session":
        return len(machine.sessions) > 2
    if name == "prove_writers_gone":
        return bool(machine.ended)
    if name in ("commit", "abort"):
        return bool(machine.write_leases)
    if name in ("come", "pass_time", "drop", "catch_up"):
        return True
    if name in ("pin", "unpin"):
        return bool(machine.spaces if name == "pin" else machine.model.wishes)
    return machine.any_space()


@functools.cache
def long_life(seed: int) -> dict[str, int]:
    """What the counters say after a life of some hundred steps."""
    dice = random.Random(seed)
    machine = StoreMachine()
    machine.start(dice.choice([16, 24, 40]), dice.choice([0.5, 0.8, 1.0]))
    names = list(STEPS)
    for _ in range(400):
        name = dice.choices(names, [STEPS[each] for each in names])[0]
        if possible(machine, name):
            getattr(machine, name)(**arguments(name, dice))
            machine.what_is_pinned_is_what_is_wished()
            machine.books_agree_with_each_other_and_with_the_model()
            machine.figures_agree_with_the_model()
            machine.uses_are_counted_in_the_order_of_the_requests()
    counters = dict(machine.store.stats().counters)
    machine.teardown()
    return counters


SEEDS = range(25)


@pytest.mark.parametrize("seed", SEEDS)
def test_long_lives_agree_with_the_model(seed: int) -> None:
    assert long_life(seed)["stored_chunks"]


def test_the_long_lives_have_seen_everything() -> None:
    counters = [long_life(seed) for seed in SEEDS]
    names = [name for name in counters[0] if not {name, name.split("_")[0]} & ELSEWHERE]
    seldom = {name for name in names if sum(life[name] > 0 for life in counters) < len(counters) / 4}
    assert not seldom, "these lives are too quiet to show anything"
