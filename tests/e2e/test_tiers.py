"""What left the daemon's memory, or outlived the daemon, is loaded as if it had never been away."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.e2e.engine import Answer, Engine, prompt
from tests.wait import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

#: Lengths just above whole chunks (256 tokens), so that kvd and vLLM's own prefix cache have the same tokens to offer.
PROMPTS = [prompt(1, 3 * 256 + 9), prompt(2, 2 * 256 + 7), prompt(3, 256 + 13)]
CACHED = [768, 512, 256]

#: Room for eight chunks of the llama in bfloat16, 256 KiB each.
SMALL_POOL = "2MiB"

_seeds = itertools.count(5000)


def alone(engine: Engine) -> list[Answer]:
    """The answers to the prompts, each asked for by itself: bits may depend on what else is in a batch."""
    return [engine.generate([each])[0] for each in PROMPTS]


def cached(answers: list[Answer]) -> list[int]:
    return [answer.cached for answer in answers]


def tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


def crowd_out(engine: Engine, daemon: Daemon) -> None:
    """Stores, and uses again, more than the pool has room for; all that was stored before is on the disk then."""
    others = [prompt(next(_seeds), 3 * 256 + 9) for _ in range(6)]
    for _ in range(2):
        for other in others:
            engine.generate([other], max_tokens=1)
            wait_until(lambda: not daemon.stats().disk.queue_chunks, 30, "the disk to be written")
        engine.reset()


def promoted(engine: Engine) -> float:
    return engine.metrics()["vllm:kvd_promoted_chunks"]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_what_was_crowded_out_to_the_disk_is_loaded_as_from_vllms_own_cache(
    model: Callable[..., Path], transport: str
) -> None:
    with Daemon(pool=SMALL_POOL, spill="256MiB") as daemon:
        endpoint = daemon.unix_endpoint if transport == "shm" else daemon.tcp_endpoint
        with Engine(model("llama"), endpoint=endpoint) as engine:
            assert cached(alone(engine)) == [0, 0, 0]
            own = alone(engine)
            assert cached(own) == CACHED
            engine.reset()
            assert promoted(engine) == 0
            crowd_out(engine, daemon)
            assert alone(engine) == own
            assert promoted(engine) > 0
            metrics = engine.metrics()
            assert metrics["vllm:kvd_promote_misses"] == metrics["vllm:kvd_load_failures"] == 0
            assert metrics["vllm:kvd_promote_waits"] > 0
            # The pool is anonymous memory: after this nothing is left but the disk.
            engine.reset()
            daemon.kill()
            daemon.start()
            wait_until(lambda: daemon.stats().sessions, 30, "the engine to connect again")
            before = promoted(engine)

            def all_from_disk() -> bool:
                engine.reset()
                answers = alone(engine)
                assert tokens(answers) == tokens(own)
                return answers == own

            wait_until(all_from_disk, 60, "the disk to be scanned")
            assert promoted(engine) >= before + sum(CACHED) / 256
        assert daemon.audit() == []


def test_a_restarted_daemon_has_everything_for_engines_that_stayed_up_and_for_new_ones(
    model: Callable[..., Path],
) -> None:
    with Daemon(warm=True) as daemon:
        with Engine(model("llama"), endpoint=daemon.unix_endpoint) as engine:
            alone(engine)
            own = alone(engine)
            assert cached(own) == CACHED
            engine.reset()
            for end in (daemon.stop, daemon.kill):
                end()
                assert tokens(alone(engine)) == tokens(own)  # nobody is there: it computes
                engine.reset()
                daemon.start()
                wait_until(lambda: daemon.stats().sessions, 30, "the engine to connect again")
                assert alone(engine) == own
                engine.reset()
            assert engine.metrics()["vllm:kvd_load_failures"] == 0
        daemon.kill()
        daemon.start()
        with Engine(model("llama"), endpoint=daemon.unix_endpoint) as fresh:
            assert alone(fresh) == own
            assert fresh.metrics()["vllm:kvd_loaded_chunks"] == sum(CACHED) / 256
        assert daemon.audit() == []


def test_a_daemon_that_is_killed_during_stores_has_nothing_wrong_when_it_is_back(
    model: Callable[..., Path], expected: Callable[..., list[list[int]]]
) -> None:
    with (
        Daemon(warm=True, quarantine=0.5) as daemon,
        Engine(model("llama"), endpoint=daemon.unix_endpoint, dtype="float32") as engine,
    ):
        for _ in range(3):
            prompts = [prompt(next(_seeds), 1800) for _ in range(6)]
            before = daemon.stats().counters["reserved_chunks"]
            engine.start_generate(prompts)
            wait_until(lambda seen=before: daemon.stats().counters["reserved_chunks"] > seen, 30, "stores")  # type: ignore[misc]
            daemon.kill()
            daemon.start()
            assert tokens(engine.finish_generate()) == expected(prompts)
            wait_until(lambda: daemon.stats().sessions, 30, "the engine to connect again")
            engine.reset()
            assert tokens(engine.generate(prompts)) == expected(prompts)
            assert daemon.audit() == []


@pytest.mark.parametrize("failure", ["truncated", "gone"])
def test_a_disk_that_fails_costs_nothing_but_what_it_held(
    model: Callable[..., Path], expected: Callable[..., list[list[int]]], failure: str
) -> None:
    with (
        Daemon(pool="4MiB", spill="256MiB") as daemon,
        Engine(model("llama"), endpoint=daemon.unix_endpoint, dtype="float32") as engine,
    ):
        right = [expected([each])[0] for each in PROMPTS]
        assert tokens(alone(engine)) == right
        engine.reset()
        crowd_out(engine, daemon)
        extents = [path for path in daemon.spill_directory.rglob("*") if path.suffix == ".extent"]
        assert extents
        if failure == "truncated":
            for extent in extents:
                os.truncate(extent, 4096)
        else:
            (found,) = daemon.spill_directory.iterdir()
            found.rename(daemon.directory / "elsewhere")
        for _ in range(2):
            assert tokens(alone(engine)) == right
            engine.reset()
        # What can be kept in memory still is.
        assert tokens(alone(engine)) == right
        assert sum(cached(alone(engine))) > 0
        assert daemon.audit() == []
