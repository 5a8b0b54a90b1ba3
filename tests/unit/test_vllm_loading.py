"""Loads that the forward pass waits for layer by layer: their order, what it waits for, and how they fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("torch")

from vllm.config import CUDAGraphMode

from kvd_client import layout
from kvd_client.adapters.vllm import worker as worker_module
from kvd_client.adapters.vllm.connector import _waits_for_layers
from kvd_client.adapters.vllm.loading import Progress
from kvd_client.adapters.vllm.meta import KvdMetadata, LoadJob, LoadReport
from kvd_client.adapters.vllm.options import Options
from kvd_client.adapters.vllm.worker import Worker
from kvd_client.layout import Shard
from tests.unit.vllm_rig import CHUNKS, LAYERS, PLACES, Rig
from tests.wait import wait_until

ALL = [block for chunk in CHUNKS for block in chunk]
#: Two requests: the first has one chunk, the second the others.
JOBS = [
    LoadJob("first", 1, 1, PLACES[:1], CHUNKS[:1], True),
    LoadJob("second", 2, 1, PLACES[1:], CHUNKS[1:], True),
]


def soon() -> float:
    return time.monotonic() + 10


@pytest.fixture(params=["shm", "tcp"])
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Everything is stored, the pages are empty, and every layer is a band."""
    monkeypatch.setattr(layout, "MIN_BAND_BYTES", 1)
    rig = Rig(request.param, monkeypatch, Shard(0, LAYERS), load_timeout_s=10)
    rig.attached()
    assert rig.store() == set()
    rig.wipe()
    yield rig
    rig.before_copy = lambda layers: None
    rig.path.gate.set()
    rig.transfers.close()


class Gate:
    """Holds the load before it copies ``layer``."""

    def __init__(self, rig: Rig, layer: int, then: Callable[[], None] = lambda: None) -> None:
        self.reached, self.open, self._layer, self._then = threading.Event(), threading.Event(), layer, then
        rig.before_copy = self

    def __call__(self, layers: range | None) -> None:
        if layers is not None and self._layer in layers and not self.reached.is_set():
            self.reached.set()
            assert self.open.wait(10)
            self._then()


def refuse() -> None:
    raise RuntimeError("the device refuses")


def outcome(rig: Rig) -> tuple[dict[str, int | None], set[int]]:
    """Where each request's load broke off, and the blocks that were not filled."""
    news, arrived, lost = rig.transfers.collect()
    assert not arrived
    return {request: report.failed_from for request, report in news.loaded.items()}, lost


def test_a_layer_of_every_chunk_and_request_comes_before_the_next_layer_of_any(rig: Rig) -> None:
    gate = Gate(rig, 1)
    progress = rig.transfers.start_loads(JOBS, by_layer=True)
    assert progress.wait(soon(), 1)
    assert gate.reached.wait(10)
    assert rig.same(ALL, layer=0)
    assert not any(rig.same([block], layer=1) for block in ALL)
    gate.open.set()
    assert progress.wait(soon())
    assert rig.same(ALL) and not rig.same([7])
    assert outcome(rig) == ({"first": None, "second": None}, set())


def test_a_layer_is_waited_for_up_to_a_deadline_and_not_for_the_layers_after_it(rig: Rig) -> None:
    gate = Gate(rig, 1)
    progress = rig.transfers.start_loads(JOBS, by_layer=True)
    assert progress.wait(soon(), 1)
    assert not progress.wait(time.monotonic() + 0.01, 2)
    assert not progress.wait(time.monotonic() + 0.01)
    assert outcome(rig) == ({}, set()), "nothing is reported before the last byte has been checked"
    gate.open.set()
    assert progress.wait(soon(), 2)


def test_a_chunk_lost_after_its_first_layer_makes_the_prefix_shorter(rig: Rig) -> None:
    copied = []

    def lose(layers: range | None) -> None:
        copied.append(layers)
        if len(copied) == 2:  # the first layer of the second request
            rig.path.lost.add(PLACES[2])

    rig.before_copy = lose
    progress = rig.transfers.start_loads(JOBS, by_layer=True)
    assert progress.wait(soon())
    assert outcome(rig) == ({"first": None, "second": 1}, {5, 6})
    assert rig.same([1, 2, 3, 4])


def test_a_copy_that_raises_in_a_late_layer_loses_its_own_request_only(rig: Rig) -> None:
    copied = []

    def refuse_the_fourth(layers: range | None) -> None:
        copied.append(layers)
        if len(copied) == 2 * LAYERS:
            refuse()

    rig.before_copy = refuse_the_fourth
    progress = rig.transfers.start_loads(JOBS, by_layer=True)
    assert progress.wait(soon())
    assert outcome(rig) == ({"first": None, "second": 0}, {3, 4, 5, 6})
    assert rig.same([1, 2])


def test_a_load_of_another_session_fails_and_the_others_do_not(rig: Rig) -> None:
    stale = LoadJob("stale", 9, 77, PLACES[:1], [[8, 9]], True)
    progress = rig.transfers.start_loads([stale, *JOBS], by_layer=True)
    assert progress.wait(soon())
    assert outcome(rig) == ({"stale": 0, "first": None, "second": None}, {8, 9})


@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_layers_that_are_late_lose_every_chunk(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MIN_BAND_BYTES", 1)
    rig = Rig(kind, monkeypatch, Shard(0, LAYERS), load_timeout_s=0.3)
    try:
        rig.attached()
        rig.store()
        began = time.monotonic()
        gate = Gate(rig, 1, then=lambda: wait_until(lambda: time.monotonic() > began + 1, what="the deadline"))
        gate.open.set()
        progress = rig.transfers.start_loads(JOBS, by_layer=True)
        assert progress.wait(soon())
        assert outcome(rig) == ({"first": 0, "second": 0}, set(ALL))
    finally:
        rig.transfers.close()


def test_progress_only_grows_and_its_end_ends_every_wait() -> None:
    progress = Progress()
    progress.reach(2)
    assert progress.wait(time.monotonic(), 2) and not progress.wait(time.monotonic(), 3)
    progress.end()
    assert progress.wait(time.monotonic(), 3) and progress.wait(time.monotonic())


# ---------------------------------------------------------------- the worker


@pytest.fixture
def worker(rig: Rig) -> Worker:
    """A worker whose pages and transfers are the rig's."""
    nothing: Any = SimpleNamespace()
    worker = Worker(nothing, nothing, Options(load_timeout_s=10))
    worker._transfers, worker._layers = rig.transfers, {"a": 0, "b": 1}
    return worker


ORDERS = KvdMetadata(loads=list(JOBS))


def collected(worker: Worker, orders: KvdMetadata = ORDERS) -> tuple[dict[str, LoadReport], set[int]]:
    """What the worker says when the step is over."""
    worker.finished(orders)
    news = worker.take_news()
    return (news.loaded if news else {}), worker.take_lost_blocks()


def test_the_forward_pass_waits_for_the_layer_that_it_is_about_to_use(worker: Worker, rig: Rig) -> None:
    gate = Gate(rig, 1)
    worker.load(ORDERS, by_layer=True)
    worker.await_layer("a")
    assert rig.same(ALL, layer=0)
    opener = threading.Timer(0.05, gate.open.set)
    assert gate.reached.wait(10)
    opener.start()
    worker.await_layer("b")
    assert rig.same(ALL, layer=1), "the hook returned before its layer was there"
    loaded, lost = collected(worker)
    assert set(loaded) == {"first", "second"} and not lost
    opener.join()


def test_a_layer_without_pages_of_its_own_waits_for_all_of_them(worker: Worker, rig: Rig) -> None:
    gate = Gate(rig, 1)
    worker.load(ORDERS, by_layer=True)
    assert gate.reached.wait(10)
    opener = threading.Timer(0.05, gate.open.set)
    opener.start()
    worker.await_layer("shares the pages of another")
    assert rig.same(ALL)
    opener.join()


def test_a_load_that_fails_after_its_first_layer_was_used_is_reported_with_the_same_step(
    worker: Worker, rig: Rig
) -> None:
    gate = Gate(rig, 1, then=refuse)
    worker.load(ORDERS, by_layer=True)
    worker.await_layer("a")
    gate.open.set()
    worker.await_layer("b")
    loaded, lost = collected(worker)
    assert (loaded["first"].failed_from, loaded["second"].failed_from) == (0, None)
    assert lost == {1, 2}


def test_the_step_does_not_end_before_its_loads_have(worker: Worker, rig: Rig) -> None:
    gate = Gate(rig, 1)
    worker.load(ORDERS, by_layer=True)
    worker.await_layer("a")
    opener = threading.Timer(0.05, gate.open.set)
    opener.start()
    loaded, _ = collected(worker)
    assert set(loaded) == {"first", "second"}
    opener.join()


def test_an_engine_that_does_not_wait_for_a_layer_computes_again_and_is_given_whole_loads_from_then_on(
    worker: Worker, rig: Rig
) -> None:
    worker.load(ORDERS, by_layer=True)
    worker.await_layer("a")
    assert collected(worker)[1] == set(ALL)
    worker.load(ORDERS, by_layer=True)
    assert rig.same(ALL), "all of it is there before the step begins"
    assert collected(worker)[1] == set()


def test_without_the_promise_to_wait_for_layers_all_is_there_before_the_step(worker: Worker, rig: Rig) -> None:
    worker.load(ORDERS, by_layer=False)
    assert rig.same(ALL)
    worker.await_layer("a")
    assert collected(worker)[1] == set()


def test_a_load_that_never_ends_is_given_up(worker: Worker, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "GRACE_S", -9.9)
    gate = Gate(rig, 1)
    worker.load(ORDERS, by_layer=True)
    for name in "ab":
        worker.await_layer(name)
    gate.open.set()
    assert collected(worker)[1] == set(ALL), "a layer was used that had not come"


@pytest.mark.parametrize(
    ("attention", "mode", "waits"),
    [
        ({"a": object()}, CUDAGraphMode.NONE, True),
        ({"a": object()}, CUDAGraphMode.PIECEWISE, True),
        ([{"a": object()}, {"a": object()}], CUDAGraphMode.NONE, True),
        ({"a": object()}, CUDAGraphMode.FULL, False),
        (None, CUDAGraphMode.NONE, False),
    ],
)
def test_layers_are_waited_for_only_where_attention_runs_as_python(attention: Any, mode: Any, waits: bool) -> None:
    context: Any = SimpleNamespace(attn_metadata=attention, cudagraph_runtime_mode=mode)
    assert _waits_for_layers(context) is waits
