"""Which chunks are stored, when they leave their pages, and what becomes of them."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from kvd.wire.chunks import ROOT, ReserveStatus
from kvd_client.adapters.vllm import storing as storing_module
from kvd_client.adapters.vllm.matching import Grid
from kvd_client.adapters.vllm.meta import StoreJob, StoreReport
from kvd_client.adapters.vllm.storing import Storing
from tests.unit.vllm_fakes import FakeController, FakeRequest, hashes_of

GRID = Grid(block_tokens=16, chunk_blocks=4)
RANKS = 2


@pytest.fixture
def controller() -> FakeController:
    return FakeController()


@pytest.fixture
def storing(controller: FakeController) -> Storing:
    return Storing(controller, GRID, RANKS, step_chunks=64, store_timeout_s=60.0)  # type: ignore[arg-type]


def request(tokens: int, name: str = "a") -> FakeRequest:
    return FakeRequest(name, tokens, hashes_of(name, tokens // 16), num_computed_tokens=tokens)


def keys(prompt: FakeRequest) -> list[bytes]:
    return [GRID.key(prompt, i) for i in range(len(prompt.block_hashes) // 4)]


def blocks(_: str) -> list[int]:
    return list(range(100, 200))


def step(
    storing: Storing, *computed: tuple[FakeRequest, int], attached: bool = True
) -> tuple[list[StoreJob], set[str]]:
    """What the scheduler half does in one step."""
    storing.take_answers()
    orders = storing.take_jobs(blocks, attached=attached)
    for prompt, tokens in computed:
        storing.complete(prompt, tokens)  # type: ignore[arg-type]
    storing.flush()
    return orders


def reported(storing: Storing, job: StoreJob, failed: set[int] | None = None) -> None:
    for _ in range(RANKS):
        storing.report(job.job_id, StoreReport(1, set(failed or ())))


def test_complete_chunks_are_asked_for_in_one_call_with_their_parents(
    storing: Storing, controller: FakeController
) -> None:
    one, two = request(150, "one"), request(70, "two")
    step(storing, (one, 150), (two, 70))
    a, b = keys(one)
    (c,) = keys(two)
    assert controller.reserved == [[(a, ROOT), (b, a), (c, ROOT)]]


def test_a_chunk_is_asked_for_once_and_only_when_it_is_complete(storing: Storing, controller: FakeController) -> None:
    prompt = request(200)
    for tokens in (60, 64, 100, 127, 128, 130):
        step(storing, (prompt, tokens))
    assert [len(items) for items in controller.reserved] == [1, 1]


def test_granted_chunks_leave_their_pages_at_the_next_step(storing: Storing, controller: FakeController) -> None:
    prompt = request(150)
    assert step(storing, (prompt, 150)) == ([], set())
    controller.answer()
    ((job,), _) = step(storing)
    assert job.blocks == [[100, 101, 102, 103], [104, 105, 106, 107]]
    assert len(job.locations) == 2
    assert step(storing) == ([], set())


def test_nothing_leaves_before_every_rank_has_a_data_path(storing: Storing, controller: FakeController) -> None:
    step(storing, (request(150), 150))
    controller.answer()
    assert step(storing, attached=False) == ([], set())
    assert len(step(storing)[0]) == 1


def test_chunks_are_committed_when_all_ranks_have_stored_them(storing: Storing, controller: FakeController) -> None:
    prompt = request(150)
    step(storing, (prompt, 150))
    controller.answer()
    ((job,), _) = step(storing)
    assert storing.pending
    storing.report(job.job_id, StoreReport(1, set()))
    assert controller.committed == []
    storing.report(job.job_id, StoreReport(1, set()))
    assert controller.committed == keys(prompt)
    assert not storing.pending


def test_a_chunk_that_failed_on_one_rank_is_aborted(storing: Storing, controller: FakeController) -> None:
    prompt = request(200)
    step(storing, (prompt, 200))
    controller.answer()
    ((job,), _) = step(storing)
    storing.report(job.job_id, StoreReport(1, {1}))
    storing.report(job.job_id, StoreReport(1, set()))
    a, b, c = keys(prompt)
    assert controller.aborted == [b]
    assert controller.committed == [a, c]


@pytest.mark.parametrize("status", [ReserveStatus.PRESENT, ReserveStatus.BUSY])
def test_what_somebody_holds_already_is_not_stored_again(
    storing: Storing, controller: FakeController, status: ReserveStatus
) -> None:
    prompt = request(150)
    first, second = keys(prompt)
    controller.verdicts[first] = status
    step(storing, (prompt, 150))
    controller.answer()
    ((job,), _) = step(storing, (prompt, 150))
    assert job.blocks == [[104, 105, 106, 107]]
    assert len(controller.reserved) == 1
    reported(storing, job)
    assert controller.committed == [second]


def test_a_full_daemon_is_not_asked_again_for_the_same_request(storing: Storing, controller: FakeController) -> None:
    prompt = request(200)
    controller.verdicts = dict.fromkeys(keys(prompt), ReserveStatus.NO_ROOM)
    step(storing, (prompt, 64))
    controller.answer()
    step(storing)
    step(storing, (prompt, 200))
    assert len(controller.reserved) == 1


def test_a_lost_parent_has_the_whole_prefix_offered_once_more(storing: Storing, controller: FakeController) -> None:
    prompt = request(200)
    storing.known(prompt.request_id, 2)
    controller.verdicts = {keys(prompt)[2]: ReserveStatus.NO_PARENT}
    step(storing, (prompt, 200))
    controller.answer()
    step(storing, (prompt, 200))
    assert [key for key, _ in controller.reserved[1]] == keys(prompt)
    controller.answer()
    step(storing, (prompt, 200))
    step(storing, (prompt, 200))
    assert len(controller.reserved) == 2


def test_what_a_lookup_has_found_is_not_offered(storing: Storing, controller: FakeController) -> None:
    prompt = request(200)
    storing.known(prompt.request_id, 2)
    step(storing, (prompt, 200))
    assert [key for key, _ in controller.reserved[0]] == keys(prompt)[2:]


@pytest.mark.parametrize("answered", [False, True])
def test_a_preempted_request_gives_up_what_is_not_sent_and_stores_it_when_it_gets_there_again(
    storing: Storing, controller: FakeController, answered: bool
) -> None:
    prompt = request(200)
    step(storing, (prompt, 200))
    if answered:
        controller.answer()
        storing.take_answers()
    storing.preempted(prompt.request_id)
    controller.answer()
    assert step(storing) == ([], set())
    assert controller.aborted == keys(prompt)
    step(storing, (prompt, 200))
    assert [key for key, _ in controller.reserved[1]] == keys(prompt)


def test_what_is_sent_before_a_preemption_is_stored(storing: Storing, controller: FakeController) -> None:
    prompt = request(200)
    step(storing, (prompt, 200))
    controller.answer()
    ((job,), _) = step(storing)
    storing.preempted(prompt.request_id)
    reported(storing, job)
    assert controller.committed == keys(prompt)


def test_a_finished_request_keeps_its_blocks_until_its_chunks_have_left(
    storing: Storing, controller: FakeController
) -> None:
    prompt = request(150)
    assert storing.finished(prompt, 150, list(range(50, 60)))  # type: ignore[arg-type]
    assert step(storing) == ([], set())
    controller.answer()
    jobs, done = step(storing)
    assert jobs[0].blocks == [[50, 51, 52, 53], [54, 55, 56, 57]]
    assert done == {prompt.request_id}


def test_a_finished_request_without_news_frees_its_blocks_at_once(storing: Storing, controller: FakeController) -> None:
    prompt = request(150)
    step(storing, (prompt, 150))
    controller.answer()
    step(storing)
    assert not storing.finished(prompt, 150, list(range(50, 60)))  # type: ignore[arg-type]


def test_a_daemon_that_does_not_answer_costs_a_finished_request_its_blocks_only_until_the_deadline(
    controller: FakeController,
) -> None:
    storing = Storing(controller, GRID, RANKS, step_chunks=64, store_timeout_s=0.0)  # type: ignore[arg-type]
    prompt = request(150)
    assert storing.finished(prompt, 150, list(range(50, 60)))  # type: ignore[arg-type]
    assert step(storing) == ([], {prompt.request_id})
    controller.answer()
    assert step(storing) == ([], set())
    assert controller.aborted == keys(prompt)


def test_no_answer_at_all_frees_the_blocks(storing: Storing, controller: FakeController) -> None:
    prompt = request(150)
    assert storing.finished(prompt, 150, list(range(50, 60)))  # type: ignore[arg-type]
    controller.answer(with_lease=False)
    assert step(storing) == ([], {prompt.request_id})


def test_a_prefix_that_two_requests_share_is_asked_for_once(storing: Storing, controller: FakeController) -> None:
    one, two = request(150), request(150)
    two.request_id = "b"
    step(storing, (one, 150), (two, 150))
    assert [len(items) for items in controller.reserved] == [2]


def test_a_step_takes_a_bounded_number_of_chunks_and_the_next_the_rest(controller: FakeController) -> None:
    storing = Storing(controller, GRID, RANKS, step_chunks=2, store_timeout_s=60.0)  # type: ignore[arg-type]
    step(storing, (request(330), 330))
    controller.answer()
    first, second, none = (step(storing)[0] for _ in range(3))
    assert [len(job.blocks) for job in first + second] == [2, 2]
    assert none == []  # until something has arrived
    reported(storing, first[0])
    assert [len(job.blocks) for job in step(storing)[0]] == [1]


def test_wrong_pages_void_everything_that_is_not_sent(storing: Storing, controller: FakeController) -> None:
    prompt = request(200)
    step(storing, (prompt, 200))
    storing.drop_all()
    controller.answer()
    assert step(storing) == ([], set())
    assert controller.aborted == keys(prompt)


def test_without_a_daemon_nothing_is_asked_and_later_everything(storing: Storing, controller: FakeController) -> None:
    prompt = request(200)
    controller.ready = False
    step(storing, (prompt, 200))
    assert controller.reserved == []
    controller.ready = True
    step(storing, (prompt, 200))
    assert [key for key, _ in controller.reserved[0]] == keys(prompt)


def test_workers_that_never_report_do_not_keep_the_engine_stepping(
    storing: Storing, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storing_module, "JOB_TIMEOUT_S", -1.0)
    step(storing, (request(150), 150))
    controller.answer()
    ((job,), _) = step(storing)
    assert not storing.pending
    reported(storing, job)
    assert controller.committed == [] and controller.aborted == []


def test_slots_that_cannot_be_filled_are_given_back(
    storing: Storing, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storing_module, "GRANT_TIMEOUT_S", -1.0)
    prompt = request(150)
    step(storing, (prompt, 150), attached=False)
    controller.answer()
    assert step(storing, attached=False) == ([], set())
    assert controller.aborted == keys(prompt)
