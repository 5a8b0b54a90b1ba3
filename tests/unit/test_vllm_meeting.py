"""How an engine comes to its daemon: what all ranks have found out goes into the client."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvd_client.adapters.vllm import scheduler
from kvd_client.adapters.vllm.meta import Geometry, WorkerFacts
from kvd_client.adapters.vllm.options import Options
from kvd_client.adapters.vllm.scheduler import Scheduler

GEOMETRY = Geometry("CPU_ATTN", "cpu", "bfloat16", 4, 2, "32+32", "1x32x64", 4096, 32, 8)


class FakeController:
    """A line to a daemon that is not there."""

    def __init__(self, client: Any, *_: Any) -> None:
        self.client = client
        self.namespace: Any = None

    def await_daemon(self, timeout_s: float) -> None:
        pass

    def use(self, namespace: Any) -> None:
        self.namespace = namespace

    def close(self) -> None:
        pass


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The clients that were made, by what they were told."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(scheduler, "check_cacheable", lambda *_: None)
    monkeypatch.setattr(scheduler, "weights_revision", lambda _: "r")
    monkeypatch.setattr(scheduler, "Controller", FakeController)
    monkeypatch.setattr(scheduler, "Client", lambda endpoint, **more: told.append({"endpoint": endpoint, **more}))
    return told


def engine(ranks: int, endpoint: str | None = None) -> Scheduler:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=ranks),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        kv_transfer_config=SimpleNamespace(is_kv_consumer=True, is_kv_producer=True, engine_id="e"),
    )
    return Scheduler(config, None, Options(endpoint=endpoint))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "node"), [([1], 1), ([0, 0], 0), ([1, 1, 1], 1), ([0, 1], None), ([1, None], None), ([None, None], None)]
)
def test_an_engine_is_near_a_node_when_all_its_ranks_are(
    made: list[dict[str, Any]], nodes: list[int | None], node: int | None
) -> None:
    started = engine(len(nodes))
    started.meet([WorkerFacts(GEOMETRY, step_bytes=1 << 20, numa_node=one) for one in nodes])
    assert made == [{"endpoint": None, "name": "vllm e", "numa_node": node}]
    started.close()


def test_an_engine_whose_pages_cannot_be_shared_connects_to_nobody(made: list[dict[str, Any]]) -> None:
    started = engine(1)
    started.meet([WorkerFacts(None, "odd pages")])
    assert made == []
    started.close()


def test_an_endpoint_that_is_none_is_refused_and_the_engine_goes_on(
    made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(endpoint: str, **_: Any) -> None:
        raise ValueError(f"{endpoint!r} is no endpoint")

    monkeypatch.setattr(scheduler, "Client", refuse)
    started = engine(1, "nonsense")
    started.meet([WorkerFacts(GEOMETRY, step_bytes=1 << 20)])
    assert started.match(SimpleNamespace(request_id="r"), 0) == (0, False)  # type: ignore[arg-type]
    started.close()
