"""The worker's transfers: real copies between small pages and a pretended pool, with everything that can go wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest

pytest.importorskip("vllm")
pytest.importorskip("torch")

import torch

from kvd.wire.chunks import Location
from kvd.wire.errors import Unavailable
from kvd_client.adapters.vllm import transfer as transfer_module
from kvd_client.adapters.vllm.meta import NO_EPOCH, LoadJob, StoreJob
from kvd_client.adapters.vllm.options import Options
from kvd_client.adapters.vllm.stats import Tally
from kvd_client.adapters.vllm.transfer import Transfers
from kvd_client.copier import make_copier
from kvd_client.layout import ChunkLayout, Shard
from kvd_client.path import Attachment, Piece
from tests.wait import wait_until

LAYERS, BLOCKS, HEADS, TOKENS, CONTENT, CHUNK_BLOCKS = 2, 12, 2, 4, 8, 2
PAGE_BYTES = TOKENS * CONTENT * 4
CHUNK_BYTES = LAYERS * CHUNK_BLOCKS * HEADS * PAGE_BYTES
PLACES = [Location(0, i * CHUNK_BYTES, i + 1) for i in range(3)]
CHUNKS = [[1, 2], [3, 4], [5, 6]]


class FakePath:
    """A pool in a bytearray, reached as shared memory or as if over TCP."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.alive = True
        self.closed = False
        self.lost: set[Location] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.pool = bytearray(len(PLACES) * CHUNK_BYTES)

    def memory(self) -> list[memoryview]:
        return []

    def view(self, location: Location, length: int) -> memoryview | None:
        if self.kind != "shm" or location.offset + length > len(self.pool):
            return None
        return memoryview(self.pool)[location.offset : location.offset + length]

    def intact(self, locations: Sequence[Location]) -> list[bool]:
        return [location not in self.lost for location in locations]

    def read(self, lease_id: int, pieces: Sequence[Piece], deadline: float) -> list[bool]:
        return [self._move(piece, deadline, store=False) for piece in pieces]

    def write(self, lease_id: int, pieces: Sequence[Piece], deadline: float) -> list[bool]:
        return [self._move(piece, deadline, store=True) for piece in pieces]

    def close(self) -> None:
        self.closed = True

    def _move(self, piece: Piece, deadline: float, *, store: bool) -> bool:
        if not self.gate.wait(max(0.0, deadline - time.monotonic())) or piece.location in self.lost:
            return False
        memory, at = memoryview(piece.buffer).cast("B"), 0
        for offset, size in piece.span.runs():
            slot = slice(piece.location.offset + offset, piece.location.offset + offset + size)
            if store:
                self.pool[slot] = memory[at : at + size]
            else:
                memory[at : at + size] = self.pool[slot]
            at += size
        return True


class Rig:
    """Transfers over random pages and a fake path."""

    def __init__(self, kind: str, monkeypatch: pytest.MonkeyPatch, shard: Shard) -> None:
        heads = HEADS // shard.tp_size
        self.pages = {str(i): torch.rand(BLOCKS, heads, TOKENS, CONTENT) for i in range(LAYERS)}
        self.before = {name: pages.clone() for name, pages in self.pages.items()}
        self.path = FakePath(kind)
        self.opened = 0
        self.refuse = False
        monkeypatch.setattr(transfer_module, "open_path", self._open)
        copier = make_copier(self.pages, ChunkLayout((PAGE_BYTES,) * LAYERS, HEADS, CHUNK_BLOCKS), shard)
        self.transfers = Transfers(copier, Options(load_timeout_s=0.5), Tally())

    def _open(self, attachment: Attachment, *, timeout_s: float) -> FakePath:
        self.opened += 1
        if self.refuse:
            raise Unavailable("nobody there")
        return self.path

    def attach(self, epoch: int = 1) -> None:
        self.transfers.attach(Attachment("shm", "", 0, bytes(16), 0, epoch, 1))

    def attached(self) -> None:
        self.attach()
        wait_until(lambda: self.transfers.collect()[0].attached, what="the path")

    def wipe(self) -> None:
        for pages in self.pages.values():
            pages.zero_()

    def same(self, blocks: Sequence[int]) -> bool:
        return all(torch.equal(self.pages[n][list(blocks)], self.before[n][list(blocks)]) for n in self.pages)

    def store(self) -> set[int]:
        self.transfers.start_store(StoreJob(7, 1, 1, PLACES, CHUNKS))
        news = wait_until(lambda: self.transfers.collect()[0].stored, what="the store")
        assert news[7].ranks == 1
        return news[7].failed

    def load(self, epoch: int = 1, *, synchronous: bool = False) -> tuple[int | None, set[str], set[int]]:
        done = self.transfers.start_load(LoadJob("r", 1, epoch, PLACES, CHUNKS, synchronous))
        assert done.wait(10)
        news, arrived, lost = self.transfers.collect()
        assert news.loaded["r"].ranks == 1
        return news.loaded["r"].failed_from, arrived, lost


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
