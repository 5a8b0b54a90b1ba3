"""The rounds that the daemon makes: when the books are audited, and that a failure does not end the rounds."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import cast

import pytest

from kvd import upkeep
from kvd.metrics import Metrics
from kvd.session import Sessions
from kvd.store import ChunkStore
from kvd.upkeep import AUDIT_EVERY_S, QUIET_S, Upkeep
from tests.wait import wait_until


class FakeStore:
    def __init__(self) -> None:
        self.ticks = 0
        self.audits = 0
        self.findings: list[str] = []
        self.broken = False
        self.waiting = 0
        self.parts: list[int] = []
        self.behind: Callable[[], None] = list

    def on_behind(self, called: Callable[[], None]) -> None:
        self.behind = called

    def catch_up(self, most: int) -> bool:
        part = min(most, self.waiting)
        self.parts.append(part)
        self.waiting -= part
        if self.broken:
            raise RuntimeError("broken")
        return not self.waiting

    def tick(self) -> None:
        self.ticks += 1
        if self.broken:
            raise RuntimeError("broken")

    def audit(self) -> list[str]:
        self.audits += 1
        return self.findings


class House:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.busy_at = 0.0
        self.store = FakeStore()
        self.metrics = Metrics()
        store = cast(ChunkStore, self.store)
        monkeypatch.setattr(upkeep.time, "monotonic", lambda: self.now)
        self.upkeep = Upkeep(store, Sessions(store), self.metrics, lambda: self.busy_at)

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.upkeep.tick(self.now)

    def metric(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(name)


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> House:
    return House(monkeypatch)


def test_the_books_are_audited_when_all_is_quiet_and_not_too_often(house: House) -> None:
    house.later(1)
    assert house.store.audits == 0
    house.later(AUDIT_EVERY_S)
    house.later(1)
    assert house.store.audits == 1
    house.later(AUDIT_EVERY_S)
    assert house.store.audits == 2
    assert house.store.ticks == 4
    assert house.metric("kvd_audits_total") == 2


def test_the_audit_waits_while_sessions_ask(house: House) -> None:
    house.busy_at = house.now + AUDIT_EVERY_S
    house.later(AUDIT_EVERY_S + QUIET_S / 2)
    assert house.store.audits == 0
    house.later(QUIET_S)
    assert house.store.audits == 1


def test_what_an_audit_finds_is_logged_and_counted(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.store.findings = ["a slot is lost"]
    with caplog.at_level(logging.ERROR):
        house.later(AUDIT_EVERY_S)
    assert "a slot is lost" in caplog.text
    assert house.metric("kvd_audit_findings_total") == 1


def test_whatever_holds_the_loop_up_is_measured_at_whatever_moment_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "LAG_TICK_S", 0.01)
    metrics, store = Metrics(), cast(ChunkStore, FakeStore())

    def lag_s() -> float:
        return metrics.registry.get_sample_value("kvd_event_loop_lag_seconds_sum") or 0.0

    async def run() -> None:
        rounds = Upkeep(store, Sessions(store), metrics, lambda: 0.0)
        rounds.start()
        await asyncio.sleep(0)  # it begins to measure
        time.sleep(0.1)
        await asyncio.to_thread(wait_until, lambda: lag_s() >= 0.09, what="the lag")
        await rounds.stop()

    asyncio.run(run())


def test_a_round_that_fails_does_not_end_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "TICK_S", 0.001)
    store = FakeStore()
    store.broken = True

    async def run() -> None:
        rounds = Upkeep(cast(ChunkStore, store), Sessions(cast(ChunkStore, store)), Metrics(), lambda: 0.0)
        rounds.start()
        await asyncio.to_thread(wait_until, lambda: store.ticks >= 3, what="three rounds")
        await rounds.stop()

    asyncio.run(run())


@pytest.mark.parametrize("broken", [False, True])
def test_uses_that_wait_are_put_in_between_whatever_else_the_loop_does(house: House, broken: bool) -> None:
    house.store.broken = broken
    turns: list[int] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def turn() -> None:
            turns.append(len(house.store.parts))
            if house.store.waiting:
                loop.call_soon(turn)

        house.store.waiting = 2000
        house.store.behind()
        house.store.behind()
        loop.call_soon(turn)
        while house.store.waiting:
            await asyncio.sleep(0)

    asyncio.run(run())
    assert sum(house.store.parts) == 2000
    assert len(house.store.parts) >= 3
    assert turns[:3] == [1, 2, 3], "more than one part in a turn"
