"""The worker's transfers over small random pages and a pretended pool."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from kvd.wire.chunks import Location
from kvd.wire.errors import Unavailable
from kvd_client.adapters.vllm import transfer as transfer_module
from kvd_client.adapters.vllm.meta import LoadJob, StoreJob
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
        return [self.kind == "tcp" or location not in self.lost for location in locations]

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

    def __init__(
        self, kind: str, monkeypatch: pytest.MonkeyPatch, shard: Shard, *, load_timeout_s: float = 0.5
    ) -> None:
        heads = HEADS // shard.tp_size
        self.pages = {str(i): torch.rand(BLOCKS, heads, TOKENS, CONTENT) for i in range(LAYERS)}
        self.before = {name: pages.clone() for name, pages in self.pages.items()}
        self.path = FakePath(kind)
        self.opened = 0
        self.refuse = False
        monkeypatch.setattr(transfer_module, "open_path", self._open)
        copier = make_copier(self.pages, ChunkLayout((PAGE_BYTES,) * LAYERS, HEADS, CHUNK_BLOCKS), shard)
        #: Called on the load's thread with the layers (None: all) that are copied into the pages next.
        self.before_copy: Callable[[range | None], None] = lambda layers: None
        load = copier.load

        def watched(*args: Any) -> bool:
            self.before_copy(args[5] if len(args) > 5 else None)
            return load(*args)

        monkeypatch.setattr(copier, "load", watched)
        self.transfers = Transfers(copier, Options(load_timeout_s=load_timeout_s), Tally())

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

    def same(self, blocks: Sequence[int], layer: int | None = None) -> bool:
        """Whether the pages, of one layer or of all, are what they were in the beginning."""
        names = self.pages if layer is None else [str(layer)]
        return all(torch.equal(self.pages[n][list(blocks)], self.before[n][list(blocks)]) for n in names)

    def store(self) -> set[int]:
        self.transfers.start_store(StoreJob(7, 1, 1, PLACES, CHUNKS))
        news = wait_until(lambda: self.transfers.collect()[0].stored, what="the store")
        assert news[7].ranks == 1
        return news[7].failed

    def load(self, epoch: int = 1, *, synchronous: bool = False) -> tuple[int | None, set[str], set[int]]:
        progress = self.transfers.start_loads([LoadJob("r", 1, epoch, PLACES, CHUNKS, synchronous)])
        assert progress.wait(time.monotonic() + 10)
        news, arrived, lost = self.transfers.collect()
        assert news.loaded["r"].ranks == 1
        return news.loaded["r"].failed_from, arrived, lost
