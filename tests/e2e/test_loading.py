"""The borders between what the engine has, what kvd has, and what is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.e2e.engine import Engine, prompt
from tests.wait import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def engine(model: Callable[..., Path], daemon: Daemon) -> Iterator[Engine]:
    with Engine(model("llama"), endpoint=daemon.unix_endpoint, max_num_batched_tokens=512) as engine:
        yield engine


def test_a_prompt_of_whole_chunks_leaves_a_block_to_compute_as_vllms_own_cache_does(engine: Engine) -> None:
    whole = [prompt(1, 2 * 256)]
    engine.generate(whole)
    own = engine.generate(whole)
    engine.reset()
    loaded = engine.generate(whole)
    assert loaded == own
    assert loaded[0].cached == 480


def test_a_prompt_longer_than_a_step_is_loaded_and_computed_in_pieces(engine: Engine) -> None:
    long = [prompt(2, 5 * 256 + 3)]
    engine.generate(long)
    engine.reset()
    longer = [long[0] + prompt(3, 600)]
    loaded = engine.generate(longer)
    assert loaded[0].cached == 5 * 256
    engine.reset()
    again = engine.generate(longer)
    assert again[0].cached == 7 * 256
    assert again[0].tokens == loaded[0].tokens


def test_a_local_hit_that_ends_inside_a_chunk_is_completed_without_touching_what_others_share(engine: Engine) -> None:
    long = prompt(4, 2 * 256 + 9)
    short = long[:140]
    alone = engine.generate([short], max_tokens=60)[0]
    whole = engine.generate([long])[0]
    engine.reset()
    # The short one fills four of the chunk's eight blocks and goes on decoding while the long one loads the others.
    beside, completed = engine.generate([short, long], max_tokens=60)
    assert completed.tokens[:8] == whole.tokens
    assert beside.tokens == alone.tokens
    engine.reset()
    engine.generate([short])
    completed = engine.generate([long])[0]
    assert completed.cached == 512
    assert completed.tokens == whole.tokens
    assert engine.generate([short], max_tokens=60)[0].tokens == alone.tokens


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_requests_that_are_aborted_leave_nothing_behind(engine: Engine, daemon: Daemon, steps: int) -> None:
    known, new = [prompt(5, 700), prompt(6, 900)], [prompt(100 + steps, 800), prompt(200 + steps, 600)]
    expected = [answer.tokens for answer in engine.generate(known)]
    engine.reset()
    engine.abandon([*known, *new], steps)
    engine.reset()  # fails while blocks are still held
    answers = engine.generate(known)
    assert [answer.tokens for answer in answers] == expected
    assert [answer.cached for answer in answers] == [512, 768]
    engine.drain()
    sessions = daemon.stats().sessions
    assert [session.write_leases for session in sessions] == [0]
    wait_until(lambda: not daemon.stats().sessions[0].read_leases, 10, "read leases to be released")
    assert daemon.stats().pool.writing_bytes == 0
    assert daemon.audit() == []
