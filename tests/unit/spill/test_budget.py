"""How much may be written."""

from __future__ import annotations

import pytest

from kvd.spill.budget import BURST_S, WriteBudget


def test_no_limit_grants_everything() -> None:
    budget = WriteBudget(0, 0, now=0.0, day=1)
    assert all(budget.take(1 << 50, now=0.0, day=1) for _ in range(10))
    assert budget.today_bytes(1) == 10 << 50 and budget.wait_s(now=0.0, day=1) == 0.0


def test_the_rate_is_kept_on_average_and_a_burst_passes() -> None:
    budget = WriteBudget(100, 0, now=0.0, day=1)
    now, granted = 0.0, 0
    for _ in range(1000):
        if budget.take(7, now=now, day=1):
            granted += 7
        now += 0.01
    assert 100 * now <= granted <= 100 * (now + BURST_S) + 7


def test_a_write_larger_than_the_burst_passes_and_is_paid_for_afterwards() -> None:
    budget = WriteBudget(100, 0, now=0.0, day=1)
    assert budget.take(1000, now=0.0, day=1)
    assert not budget.take(1, now=7.9, day=1)
    assert budget.wait_s(now=7.9, day=1) == pytest.approx(0.11, abs=0.01)
    assert budget.take(1, now=8.1, day=1)


def test_the_day_has_its_bytes_and_the_next_has_new_ones() -> None:
    budget = WriteBudget(0, 100, now=0.0, day=5)
    assert budget.take(60, now=0.0, day=5) and budget.take(60, now=0.0, day=5)
    assert budget.spent(5) and not budget.take(1, now=0.0, day=5)
    assert not budget.take(1, now=0.0, day=4), "a clock that goes back gives no new day"
    assert budget.take(1, now=0.0, day=6) and budget.today_bytes(6) == 1


def test_moves_count_and_what_was_not_written_is_given_back() -> None:
    budget = WriteBudget(10, 100, now=0.0, day=1)
    budget.count(100, now=0.0, day=1)
    assert budget.spent(1)
    budget.give(50, day=1)
    assert not budget.spent(1) and budget.today_bytes(1) == 50


def test_a_restart_does_not_begin_the_day_anew() -> None:
    before = WriteBudget(0, 100, now=0.0, day=9)
    before.take(100, now=0.0, day=9)
    after = WriteBudget(0, 100, now=0.0, day=9)
    after.restore(before.save())
    assert after.spent(9)
    tomorrow = WriteBudget(0, 100, now=0.0, day=10)
    tomorrow.restore(before.save())
    assert not tomorrow.spent(10)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"day": 9}', '{"day": 9, "bytes": -5}', '{"day": "9", "bytes": 5}', "[" * 100_000]
)
def test_a_damaged_account_is_ignored(text: str) -> None:
    budget = WriteBudget(0, 100, now=0.0, day=9)
    budget.restore(text)
    assert budget.today_bytes(9) == 0
