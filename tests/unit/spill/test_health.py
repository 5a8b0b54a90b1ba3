"""When a drive counts as hanging or as too slow."""

from __future__ import annotations

from kvd.spill.health import Health, Patience

PATIENCE = Patience(stall_s=5.0, long_stall_s=60.0, slow_s=1.0)


def run(health: Health, begin: float, took: float, times: int) -> float:
    """So many operations one after the other; the time when they are over."""
    for _ in range(times):
        ticket = health.begin(begin)
        begin += took
        health.end(ticket, begin, counts=True)
    return begin


def test_an_operation_that_does_not_end_is_a_drive_that_hangs() -> None:
    health = Health(PATIENCE)
    first, second = health.begin(100.0), health.begin(103.0)
    assert health.verdict(104.9) is None
    assert health.verdict(105.1) == "an operation has been under way for 5 s"
    health.end(first, 106.0, counts=True)
    assert health.verdict(106.0) is None
    assert health.verdict(110.0) is not None
    health.end(second, 110.0, counts=True)
    assert health.verdict(200.0) is None


def test_what_may_take_long_may_take_long() -> None:
    health = Health(PATIENCE)
    health.begin(0.0, long=True)
    assert health.verdict(59.0) is None and health.hangs(61.0) is not None


def test_operations_far_beyond_their_usual_time_are_a_drive_that_is_too_slow() -> None:
    health = Health(PATIENCE)
    now = run(health, 0.0, 0.002, 1000)
    assert health.verdict(now) is None
    now = run(health, now, 3.0, 16)
    verdict = health.verdict(now)
    assert verdict is not None and "too slow" in verdict
    health.heal()
    assert health.verdict(now) is None


def test_one_slow_operation_is_not_a_slow_drive_and_a_drive_that_always_was_slow_is_not_broken() -> None:
    health = Health(PATIENCE)
    now = run(health, run(health, 0.0, 0.002, 1000), 4.0, 1)
    assert health.verdict(now) is None
    slow = Health(PATIENCE)
    assert slow.verdict(run(slow, 0.0, 0.4, 1000)) is None


def test_a_slow_time_does_not_become_the_usual_one() -> None:
    health = Health(PATIENCE)
    now = run(health, run(health, 0.0, 0.002, 1000), 3.0, 2000)
    assert health.verdict(now) is not None


def test_operations_that_failed_say_nothing_of_the_usual_time() -> None:
    health = Health(PATIENCE)
    now = run(health, 0.0, 0.01, 100)
    for _ in range(100):
        health.end(health.begin(now), now + 4.0, counts=False)
    assert health.verdict(now + 4.0) is None
    now = run(health, now + 4.0, 3.0, 16)
    verdict = health.verdict(now)
    assert verdict is not None and "usually 0.01" in verdict
