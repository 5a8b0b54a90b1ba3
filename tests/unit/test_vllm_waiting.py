"""Requests whose chunks are on their way from a disk: asked again, for a bounded time, and never in anybody's way."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from kvd_client.adapters.vllm import matching as matching_module
from kvd_client.adapters.vllm import waiting as waiting_module
from kvd_client.adapters.vllm.matching import Grid, Matching
from kvd_client.adapters.vllm.stats import Tally
from kvd_client.adapters.vllm.waiting import PACE, STALL_SHARE, Waits
from tests.unit.vllm_fakes import FakeController, FakeLease, FakeRequest, hashes_of

GRID = Grid(block_tokens=16, chunk_blocks=4)  # chunks of 64 tokens
TIMEOUT_S = 1.0
STEP_S = 0.01


class Clock:
    """Time that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Slow(FakeController):
    """A controller whose lookups take ``lookup_s``."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.lookup_s = 0.0

    def lookup(self, keys: list[bytes], skip: int, *, again: bool) -> FakeLease | None:
        self.clock.now += self.lookup_s
        return super().lookup(keys, skip, again=again)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (matching_module, waiting_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture
def controller(clock: Clock) -> Slow:
    return Slow(clock)


@pytest.fixture
def tally() -> Tally:
    return Tally()


@pytest.fixture
def matching(controller: Slow, tally: Tally) -> Matching:
    return Matching(controller, GRID, 2, Waits(TIMEOUT_S, tally), load_async=True)  # type: ignore[arg-type]


def request(name: str = "a", tokens: int = 300) -> FakeRequest:
    return FakeRequest(f"request-{name}", tokens, hashes_of(name, tokens // 16))


def place(controller: Slow, prompt: FakeRequest, *, stored: int, on_disk: int) -> None:
    """Of the chunks of a prompt so many are in memory, and so many behind them on the disk."""
    keys = [GRID.key(prompt, i) for i in range(prompt.num_tokens // GRID.chunk_tokens)]
    controller.stored = (controller.stored - set(keys)) | set(keys[:stored])
    controller.on_disk = (controller.on_disk - set(keys)) | set(keys[stored : stored + on_disk])


def numbers(tally: Tally) -> dict[str, float]:
    stats = tally.take()
    return stats.data if stats is not None else {}


def test_a_request_waits_until_all_that_is_on_its_way_has_come(
    matching: Matching, controller: Slow, clock: Clock, tally: Tally
) -> None:
    prompt = request()
    place(controller, prompt, stored=1, on_disk=3)
    assert matching.match(prompt, 0) == (None, False, 0)
    for arrived in (2, 3):
        clock.now += 0.1
        place(controller, prompt, stored=arrived, on_disk=4 - arrived)
        assert matching.match(prompt, 0) == (None, False, 0)
    assert matching.waiting
    clock.now += 0.1
    place(controller, prompt, stored=4, on_disk=0)
    assert matching.match(prompt, 0) == (256, True, 4)
    assert not matching.waiting
    said = numbers(tally)
    assert said["promote_seconds"] == pytest.approx(0.3)
    assert said["promoted_chunks"] == 3 and said["promote_waits"] == 1 and "promote_misses" not in said


def test_only_the_first_question_counts_as_a_use(matching: Matching, controller: Slow, clock: Clock) -> None:
    prompt = request()
    place(controller, prompt, stored=1, on_disk=3)
    for _ in range(3):
        matching.match(prompt, 0)
        clock.now += 0.1
    assert controller.again == [False, True, True]


def test_what_has_arrived_is_leased_anew_before_the_former_lease_ends(
    matching: Matching, controller: Slow, clock: Clock
) -> None:
    prompt, held_meanwhile = request(), []
    place(controller, prompt, stored=2, on_disk=2)
    matching.match(prompt, 0)
    look_up = controller.lookup

    def watched(keys: list[bytes], skip: int, *, again: bool) -> FakeLease | None:
        held_meanwhile.append(not controller.leases[-1].released)
        return look_up(keys, skip, again=again)

    controller.lookup = watched  # type: ignore[method-assign]
    clock.now += 0.1
    matching.match(prompt, 0)
    assert held_meanwhile == [True]
    assert [lease.released for lease in controller.leases] == [True, False]


def test_at_its_deadline_a_request_takes_what_is_there_and_does_not_wait_again(
    matching: Matching, controller: Slow, clock: Clock, tally: Tally
) -> None:
    prompt, began, arrived = request(tokens=700), clock.now, 0
    place(controller, prompt, stored=0, on_disk=10)
    while matching.match(prompt, 0)[0] is None:
        assert clock.now <= began + TIMEOUT_S
        clock.now += STEP_S
        if clock.now >= began + 0.15 * (arrived + 1):  # they come all the time, but too slowly
            arrived += 1
            place(controller, prompt, stored=arrived, on_disk=10 - arrived)
    assert clock.now == pytest.approx(began + TIMEOUT_S, abs=STEP_S)
    assert matching.match(prompt, 0) == (6 * 64, True, 6)
    said = numbers(tally)
    assert said["promoted_chunks"] == 6 and said["promote_misses"] == 4
    controller.read_lease_s = 0.0  # so that it is looked up anew
    assert matching.match(prompt, 0) == (6 * 64, True, 6)


def test_a_disk_that_brings_nothing_is_not_waited_for_until_the_deadline(
    matching: Matching, controller: Slow, clock: Clock
) -> None:
    prompt, began = request(), clock.now
    place(controller, prompt, stored=1, on_disk=3)
    while matching.match(prompt, 0)[0] is None:
        clock.now += STEP_S
    assert clock.now - began <= STALL_SHARE * TIMEOUT_S + 0.06
    assert matching.match(prompt, 0) == (64, True, 1)


def test_only_what_is_in_memory_counts_as_stored(matching: Matching, controller: Slow, clock: Clock) -> None:
    prompt = request()
    place(controller, prompt, stored=0, on_disk=4)
    assert matching.match(prompt, 0) == (None, False, 0)
    clock.now += TIMEOUT_S
    assert matching.match(prompt, 0) == (0, False, 0)


def test_a_request_that_may_not_wait_takes_what_is_there(controller: Slow, tally: Tally) -> None:
    matching = Matching(controller, GRID, 2, Waits(0.0, tally), load_async=True)  # type: ignore[arg-type]
    prompt = request()
    place(controller, prompt, stored=2, on_disk=2)
    assert matching.match(prompt, 0) == (128, True, 2)
    assert not matching.waiting


def test_the_daemons_end_ends_the_wait(matching: Matching, controller: Slow, clock: Clock) -> None:
    prompt = request()
    place(controller, prompt, stored=1, on_disk=3)
    assert matching.match(prompt, 0)[0] is None
    controller.epoch, controller.ready = 2, False  # at once, though the next question was not due
    assert matching.match(prompt, 0) == (0, False, 0)
    assert not matching.waiting


def test_a_request_that_is_aborted_while_it_waits_leaves_nothing_behind(matching: Matching, controller: Slow) -> None:
    prompt = request()
    place(controller, prompt, stored=1, on_disk=3)
    matching.match(prompt, 0)
    matching.end(prompt.request_id)
    assert not matching.waiting
    assert all(lease.released for lease in controller.leases)


def test_many_that_wait_leave_the_engine_its_time(matching: Matching, controller: Slow, clock: Clock) -> None:
    prompts = [request(str(i)) for i in range(50)]
    for prompt in prompts:
        place(controller, prompt, stored=1, on_disk=3)
        assert matching.match(prompt, 0)[0] is None
    controller.lookup_s = 0.001
    asked, began = len(controller.lookups), clock.now
    while clock.now < began + 0.2:
        for prompt in prompts:
            assert matching.match(prompt, 0)[0] is None
        clock.now += 0.001
    spent = (len(controller.lookups) - asked) * controller.lookup_s
    assert 0 < spent <= 0.2 / PACE


def test_every_one_of_many_is_answered_at_its_deadline(matching: Matching, controller: Slow, clock: Clock) -> None:
    prompts = [request(str(i)) for i in range(50)]
    for prompt in prompts:
        place(controller, prompt, stored=1, on_disk=3)
        matching.match(prompt, 0)
    controller.lookup_s = 0.001
    clock.now += TIMEOUT_S
    assert [matching.match(prompt, 0) for prompt in prompts] == [(64, True, 1)] * 50
