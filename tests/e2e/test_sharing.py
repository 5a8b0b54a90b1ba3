"""What one engine has computed, another loads: the same bytes, the same output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Daemon
from tests.e2e.engine import Answer, Engine, prompt

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

#: Lengths just above whole chunks (256 tokens), so that kvd and vLLM's own prefix cache have the same tokens to offer.
PROMPTS = [prompt(1, 3 * 256 + 9), prompt(2, 2 * 256 + 7), prompt(3, 256 + 13)]
CACHED = [768, 512, 256]


def alone(engine: Engine) -> list[Answer]:
    """The answers to the prompts, each asked for by itself: bits may depend on what else is in a batch."""
    return [engine.generate([each])[0] for each in PROMPTS]


def cached(answers: list[Answer]) -> list[int]:
    return [answer.cached for answer in answers]


@pytest.mark.parametrize(
    ("kind", "transport", "load_async"),
    [
        ("llama", "shm", True),
        ("llama", "tcp", True),
        ("qwen2", "tcp", False),
        ("qwen2", "shm", False),
        ("mla", "shm", True),
    ],
)
def test_two_processes_share_and_answer_as_with_their_own_prefix_cache(
    model: Callable[..., Path], kind: str, transport: str, load_async: bool
) -> None:
    options: dict[str, Any] = {"connector": {"load_async": load_async}, "prefix_caching_anyway": kind == "mla"}
    if not load_async:
        options["async_scheduling"] = False
    with Daemon() as daemon:
        endpoint = daemon.unix_endpoint if transport == "shm" else daemon.tcp_endpoint
        with Engine(model(kind), endpoint=endpoint, **options) as writer:
            cold = alone(writer)
            own = alone(writer)
            assert cached(cold) == [0, 0, 0]
            assert cached(own) == CACHED
            writer.reset()
            again = alone(writer)
            assert again == own
        with Engine(model(kind), endpoint=endpoint, **options) as reader:
            first = alone(reader)
            assert first == own
            metrics = reader.metrics()
            assert metrics["vllm:external_prefix_cache_hits"] == sum(CACHED)
            assert metrics["vllm:kvd_loaded_chunks"] == sum(CACHED) / 256
            assert metrics["vllm:kvd_load_failures"] == 0
            sessions = daemon.stats().sessions
            assert [session.path for session in sessions] == [transport]
        assert daemon.audit() == []


def test_what_two_ranks_wrote_one_reads_and_the_other_way_round(model: Callable[..., Path]) -> None:
    options: dict[str, Any] = {"dtype": "float32"}  # so that the sums of two ranks and of one are close
    two_wrote, one_wrote = PROMPTS[:2], [prompt(4, 256 + 5), prompt(5, 2 * 256 + 3)]
    with Daemon() as daemon:
        endpoint = daemon.unix_endpoint
        with (
            Engine(model("llama"), endpoint=endpoint, tensor_parallel_size=2, wait=False, **options) as two,
            Engine(model("llama"), endpoint=endpoint, wait=False, **options) as one,
        ):
            one.wait_ready()
            two.wait_ready()
            of_two = two.generate(two_wrote)
            of_one = one.generate(one_wrote)
            two.reset()
            one.reset()
            assert cached(of_two) == cached(of_one) == [0, 0]

            one_reads, two_reads = one.generate(two_wrote), two.generate(one_wrote)
            assert cached(one_reads) == [768, 512]
            assert cached(two_reads) == [256, 512]
            assert [a.tokens for a in one_reads] == [a.tokens for a in of_two]
            assert [a.tokens for a in two_reads] == [a.tokens for a in of_one]
            for mine, theirs in zip(one_reads + two_reads, of_two + of_one, strict=True):
                assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-2)
        assert daemon.audit() == []


def test_latent_heads_are_stored_once_by_all_ranks_together(model: Callable[..., Path]) -> None:
    options: dict[str, Any] = {"prefix_caching_anyway": True, "dtype": "float32"}
    with Daemon() as daemon:
        with Engine(model("mla"), endpoint=daemon.unix_endpoint, tensor_parallel_size=2, **options) as two:
            alone(two)
            two.reset()
            again = alone(two)
            assert cached(again) == CACHED
            stored = two.metrics()["vllm:kvd_stored_bytes"]
        assert stored == sum(n.chunk_bytes * n.chunks for n in daemon.stats().namespaces)
        with Engine(model("mla"), endpoint=daemon.unix_endpoint, **options) as one:
            first = alone(one)
            assert cached(first) == CACHED
            assert [a.tokens[0] for a in first] == [a.tokens[0] for a in again]
        assert daemon.audit() == []
