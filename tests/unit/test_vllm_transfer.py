"""The worker's transfers: real copies between small pages and a pretended pool, with everything that can go wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")
pytest.importorskip("torch")

from kvd_client.adapters.vllm import transfer as transfer_module
from kvd_client.adapters.vllm.meta import NO_EPOCH, StoreJob
from kvd_client.layout import Shard
from tests.unit.vllm_rig import CHUNK_BYTES, CHUNKS, LAYERS, PLACES, FakePath, Rig
from tests.wait import wait_until


@pytest.fixture(params=["shm", "tcp"])
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    rig = Rig(request.param, monkeypatch, Shard(0, LAYERS))
    yield rig
    rig.path.gate.set()
    rig.transfers.close()


def test_stored_chunks_come_back_into_the_pages(rig: Rig) -> None:
    rig.attached()
    assert rig.store() == set()
    rig.wipe()
    assert rig.load() == (None, {"r"}, set())
    assert rig.same([1, 2, 3, 4, 5, 6])
    assert not rig.same([7])


def test_pages_may_be_overwritten_as_soon_as_a_store_has_started(rig: Rig) -> None:
    rig.attached()
    rig.path.gate.clear()
    rig.transfers.start_store(StoreJob(7, 1, 1, PLACES, CHUNKS))
    rig.wipe()
    rig.path.gate.set()
    wait_until(lambda: rig.transfers.collect()[0].stored, what="the store")
    assert rig.load() == (None, {"r"}, set())
    assert rig.same([1, 2, 3, 4, 5, 6])


def test_a_lost_chunk_makes_the_prefix_shorter(rig: Rig) -> None:
    rig.attached()
    rig.store()
    rig.wipe()
    rig.path.lost = {PLACES[1]}
    assert rig.load() == (1, {"r"}, {3, 4, 5, 6})
    assert rig.same([1, 2])


def test_a_synchronous_load_is_not_reported_as_an_arrival(rig: Rig) -> None:
    rig.attached()
    rig.store()
    assert rig.load(synchronous=True) == (None, set(), set())


def test_a_load_of_another_session_fails(rig: Rig) -> None:
    rig.attached()
    assert rig.load(epoch=2) == (0, {"r"}, {1, 2, 3, 4, 5, 6})
    assert rig.load(epoch=NO_EPOCH) == (0, {"r"}, {1, 2, 3, 4, 5, 6})


def test_a_store_without_a_path_fails_at_once(rig: Rig) -> None:
    assert rig.store() == {0, 1, 2}


def test_a_path_that_died_is_not_used_and_opened_again(rig: Rig) -> None:
    rig.attached()
    dead, rig.path = rig.path, FakePath(rig.path.kind)
    dead.alive = False
    assert rig.store() == {0, 1, 2}
    rig.transfers._tried_at = 0.0
    rig.attached()
    assert rig.store() == set()
    wait_until(lambda: dead.closed, what="the old path to be closed")


def test_a_new_session_has_its_own_path(rig: Rig) -> None:
    rig.attached()
    old, rig.path = rig.path, FakePath(rig.path.kind)
    rig.attach(epoch=2)
    wait_until(lambda: 2 in rig.transfers.collect()[0].attached, what="the path")
    wait_until(lambda: old.closed, what="the old path to be closed")
    assert rig.store() == {0, 1, 2}  # the job is of the old session


def test_a_daemon_that_does_not_open_is_not_asked_at_every_step(rig: Rig) -> None:
    rig.refuse = True
    for _ in range(10):
        rig.attach()
    wait_until(lambda: rig.opened, what="an attempt")
    assert rig.opened == 1
    assert rig.load() == (0, {"r"}, {1, 2, 3, 4, 5, 6})


def test_a_hanging_transfer_ends_with_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module, "SEND_TIMEOUT_S", 0.5)
    rig = Rig("tcp", monkeypatch, Shard(0, LAYERS))
    try:
        rig.attached()
        rig.path.gate.clear()
        assert rig.load() == (0, {"r"}, {1, 2, 3, 4, 5, 6})
        assert rig.store() == {0, 1, 2}
    finally:
        rig.path.gate.set()
        rig.transfers.close()


def test_stores_over_tcp_hold_a_bounded_amount_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module, "STORE_BUFFER_BYTES", 4 * CHUNK_BYTES)
    rig = Rig("tcp", monkeypatch, Shard(0, LAYERS))
    try:
        rig.attached()
        rig.path.gate.clear()
        rig.transfers.start_store(StoreJob(1, 1, 1, PLACES, CHUNKS))
        rig.transfers.start_store(StoreJob(2, 1, 1, PLACES, CHUNKS))
        assert rig.transfers.collect()[0].stored[2].failed == {0, 1, 2}
        rig.path.gate.set()
        wait_until(lambda: 1 in rig.transfers.collect()[0].stored, what="the first store")
        assert rig.store() == set()
    finally:
        rig.path.gate.set()
        rig.transfers.close()


@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_each_rank_moves_its_own_heads_and_together_they_fill_the_chunk(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Rig(kind, monkeypatch, Shard(0, LAYERS))
    halves = [Rig(kind, monkeypatch, Shard(0, LAYERS, rank, 2)) for rank in range(2)]
    try:
        for rank, half in enumerate(halves):
            half.path = whole.path
            for name, pages in whole.pages.items():
                half.pages[name].copy_(pages[:, rank : rank + 1])
        for rig in (whole, *halves):
            rig.attached()
        for half in halves:
            assert half.store() == set()
        whole.wipe()
        assert whole.load()[0] is None
        assert whole.same([1, 2, 3, 4, 5, 6])
    finally:
        for rig in (whole, *halves):
            rig.transfers.close()


def test_an_idle_step_waits_for_a_transfer_only_while_there_is_one(rig: Rig) -> None:
    rig.attached()
    wait_until(lambda: not rig.transfers._tasks, what="the thread to be idle")
    began = time.monotonic()
    rig.transfers.wait(30)
    assert time.monotonic() - began < 30
