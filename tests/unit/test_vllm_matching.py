"""Which tokens a request is offered from the cache, and the jobs that load them."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from kvd_client.adapters.vllm.matching import Grid, Matching
from kvd_client.adapters.vllm.meta import NO_EPOCH, NULL_BLOCK, LoadReport
from kvd_client.adapters.vllm.stats import Tally
from kvd_client.adapters.vllm.waiting import Waits
from tests.unit.vllm_fakes import FakeController, FakeRequest, hashes_of

GRID = Grid(block_tokens=16, chunk_blocks=4)  # chunks of 64 tokens


@pytest.fixture
def controller() -> FakeController:
    return FakeController()


@pytest.fixture
def matching(controller: FakeController) -> Matching:
    return Matching(controller, GRID, 2, Waits(1.0, Tally()), load_async=True)  # type: ignore[arg-type]


def request(tokens: int, name: str = "a") -> FakeRequest:
    return FakeRequest(f"request-{name}-{tokens}", tokens, hashes_of(name, tokens // 16))


def store(controller: FakeController, prompt: FakeRequest, chunks: int) -> None:
    controller.stored |= {GRID.key(prompt, i) for i in range(chunks)}


def test_the_longest_stored_prefix_is_offered(matching: Matching, controller: FakeController) -> None:
    prompt = request(300)
    store(controller, prompt, 3)
    assert matching.match(prompt, 0) == (192, True, 3)
    assert controller.lookups == [([GRID.key(prompt, i) for i in range(4)], 0)]


@pytest.mark.parametrize("salt", [b"", b"s" * 32])
def test_the_keys_of_a_prompt_are_those_of_its_chunks(salt: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRID.adapters, "salt", lambda request: salt)
    prompt = request(300)
    for chunks in range(5):
        assert GRID.keys(prompt, chunks) == [GRID.key(prompt, i) for i in range(chunks)]
    assert len(set(GRID.keys(prompt, 4))) == 4


def test_a_token_is_always_left_to_compute(matching: Matching, controller: FakeController) -> None:
    prompt = request(128)
    store(controller, prompt, 2)
    assert matching.match(prompt, 0)[0] == 112


def test_a_prompt_shorter_than_a_chunk_asks_nobody(matching: Matching, controller: FakeController) -> None:
    assert matching.match(request(63), 0) == (0, False, 0)
    assert controller.lookups == []


def test_what_the_engine_has_by_itself_is_not_leased(matching: Matching, controller: FakeController) -> None:
    prompt = request(300)
    store(controller, prompt, 4)
    assert matching.match(prompt, 128) == (128, True, 4)
    assert controller.lookups[0][1] == 2
    assert len(controller.leases[0]) == 2


def test_a_request_that_waits_is_not_looked_up_at_every_step(matching: Matching, controller: FakeController) -> None:
    prompt = request(300)
    store(controller, prompt, 2)
    for _ in range(5):
        assert matching.match(prompt, 0)[0] == 128
    assert len(controller.lookups) == 1


def test_another_local_hit_or_another_session_means_another_lookup(
    matching: Matching, controller: FakeController
) -> None:
    prompt = request(300)
    store(controller, prompt, 2)
    matching.match(prompt, 0)
    matching.match(prompt, 16)
    controller.epoch = 2
    matching.match(prompt, 16)
    assert controller.again == [False, True, True]
    assert [lease.released for lease in controller.leases] == [True, True, False]


def test_an_old_lease_is_replaced(matching: Matching, controller: FakeController) -> None:
    prompt = request(300)
    store(controller, prompt, 2)
    controller.read_lease_s = 0.0
    matching.match(prompt, 0)
    matching.match(prompt, 0)
    assert [lease.released for lease in controller.leases] == [True, False]


def test_a_load_lists_the_blocks_to_fill(matching: Matching, controller: FakeController) -> None:
    prompt = request(300)
    store(controller, prompt, 2)
    tokens, _, _ = matching.match(prompt, 0)
    matching.allocated(prompt.request_id, list(range(10, 29)), tokens)
    (job,) = matching.take_jobs()
    assert job.blocks == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert job.locations == controller.leases[0].locations
    assert not job.synchronous
    assert matching.take_jobs() == []


def test_blocks_that_the_engine_has_or_will_compute_are_not_written(
    matching: Matching, controller: FakeController
) -> None:
    prompt = request(128)
    store(controller, prompt, 2)
    tokens, _, _ = matching.match(prompt, 32)
    assert tokens == 80
    matching.allocated(prompt.request_id, list(range(1, 9)), tokens)
    (job,) = matching.take_jobs()
    assert job.blocks == [[NULL_BLOCK, NULL_BLOCK, 3, 4], [5, 6, 7, NULL_BLOCK]]
    assert job.blocks_from(1) == {5, 6, 7}


def test_the_scheduler_may_want_fewer_tokens_than_it_was_offered(
    matching: Matching, controller: FakeController
) -> None:
    prompt = request(300)
    store(controller, prompt, 4)
    matching.match(prompt, 0)
    matching.allocated(prompt.request_id, list(range(1, 20)), 96)
    (job,) = matching.take_jobs()
    assert job.blocks == [[1, 2, 3, 4], [5, 6, NULL_BLOCK, NULL_BLOCK]]
    assert len(job.locations) == 2


def test_a_lease_that_is_not_wanted_is_released(matching: Matching, controller: FakeController) -> None:
    prompt = request(300)
    store(controller, prompt, 2)
    matching.match(prompt, 0)
    matching.allocated(prompt.request_id, [1, 2], 0)
    assert controller.leases[0].released
    assert matching.take_jobs() == []


def test_tokens_that_were_never_offered_are_answered_with_a_failure(matching: Matching) -> None:
    prompt = request(300)
    matching.allocated(prompt.request_id, [1, 2, 3], 48)
    (job,) = matching.take_jobs()
    assert job.epoch == NO_EPOCH
    assert job.blocks_from(0) == {1, 2, 3}


def test_the_lease_lasts_until_every_rank_has_loaded(matching: Matching, controller: FakeController) -> None:
    prompt = request(300)
    store(controller, prompt, 2)
    tokens, _, _ = matching.match(prompt, 0)
    matching.allocated(prompt.request_id, list(range(19)), tokens)
    assert matching.report(prompt.request_id, LoadReport(1, None)) is None
    assert not controller.leases[0].released and matching.is_loading(prompt.request_id)
    assert matching.report(prompt.request_id, LoadReport(1, None)) is None
    assert controller.leases[0].released and not matching.is_loading(prompt.request_id)


def test_the_lease_of_an_aborted_request_lasts_until_its_load_is_over(
    matching: Matching, controller: FakeController
) -> None:
    prompt = request(300)
    store(controller, prompt, 2)
    tokens, _, _ = matching.match(prompt, 0)
    matching.allocated(prompt.request_id, list(range(19)), tokens)
    matching.end(prompt.request_id)
    assert not controller.leases[0].released
    matching.report(prompt.request_id, LoadReport(2, None))
    assert controller.leases[0].released


def test_after_a_failed_load_a_request_computes(matching: Matching, controller: FakeController) -> None:
    prompt = request(300)
    store(controller, prompt, 4)
    tokens, _, _ = matching.match(prompt, 64)
    matching.allocated(prompt.request_id, list(range(19)), tokens)
    assert matching.report(prompt.request_id, LoadReport(2, 1)) == 2
    assert matching.match(prompt, 0) == (0, False, 0)
    matching.end(prompt.request_id)
    assert matching.match(prompt, 0)[0] > 0


def test_without_an_answer_nothing_is_offered_and_soon_nobody_asked_again(
    matching: Matching, controller: FakeController
) -> None:
    controller.ready = False
    prompt = request(300)
    assert matching.match(prompt, 0) == (0, False, 0)
    assert matching.match(prompt, 0) == (0, False, 0)
    assert len(controller.lookups) == 1


def test_a_request_that_must_not_read_the_prefix_cache_does_not(matching: Matching, controller: FakeController) -> None:
    prompt = request(300)
    store(controller, prompt, 4)
    prompt.skip_reading_prefix_cache = True
    assert matching.match(prompt, 0) == (0, False, 0)
    assert controller.lookups == []
