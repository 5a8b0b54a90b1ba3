"""Random lives of a store with a disk below it and restarts in between: every step ends in a clean audit."""

from __future__ import annotations

import pytest

from tests.unit.ledger.tier_life import Life


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_nobody_reads_what_he_did_not_ask_for_and_nothing_leaks(seed: int) -> None:
    life = Life(seed)
    for _ in range(1200):
        life.step()
    for _ in range(20_000):  # a drive may have been away most of the time: then the life goes on until it has shown all
        if life.served and life.from_disk and life.deaths:
            return
        life.step()
    raise AssertionError("too quiet a life to show anything")
