"""Loads within the step that needs them: the forward pass uses the first layers before the last have come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.e2e.engine import Engine, prompt

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PROMPTS = [prompt(1, 3 * 256 + 9), prompt(2, 2 * 256 + 7)]
CACHED = [768, 512]


@pytest.fixture(scope="module", params=["shm", "tcp"])
def engine(request: pytest.FixtureRequest, model: Callable[..., Path]) -> Iterator[Engine]:
    # In float32 tokens do not depend on what else is in a batch.
    options = {"dtype": "float32", "async_scheduling": False, "connector": {"load_async": False}}
    with (
        Daemon() as daemon,
        Engine(
            model("llama"),
            endpoint=daemon.unix_endpoint if request.param == "shm" else daemon.tcp_endpoint,
            **options,
        ) as engine,
    ):
        yield engine


def test_layers_are_computed_while_later_ones_come_and_a_late_failure_is_computed_again(engine: Engine) -> None:
    expected = [answer.tokens for answer in engine.generate(PROMPTS)]
    engine.reset()
    engine.lock_step()
    loaded = engine.generate(PROMPTS)
    assert [answer.tokens for answer in loaded] == expected
    assert [answer.cached for answer in loaded] == CACHED
    before = engine.metrics()
    assert before["vllm:kvd_load_failures"] == 0
    assert before["vllm:kvd_loaded_chunks"] == 5

    # The forward pass has used the layers before this one: its result must not be.
    engine.reset()
    engine.lock_step(fail_layer=2)
    assert [answer.tokens for answer in engine.generate(PROMPTS)] == expected
    after = engine.metrics()
    assert after["vllm:kvd_load_failures"] == 5
    assert after["vllm:kvd_loaded_chunks"] == 5
    engine.lock_step()
    engine.reset()
    assert [answer.tokens for answer in engine.generate(PROMPTS)] == expected
    assert "did not wait for every layer" not in engine.log
