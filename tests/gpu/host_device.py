"""A ``Device`` made of host memory: kernels through g++, streams as queues that nobody empties until somebody waits.

Work runs as late as it may, so a copier that reuses memory or reports bytes too early is caught.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from tests.gpu import twin


class LateStream:
    """A queue of work, done when waited for; ``stalled``: not even looking at an event moves it on."""

    def __init__(self, *, eager: bool = False) -> None:
        self.work: list[Callable[[], None]] = []
        self.finished = 0
        self.stalled = False
        self.eager = eager

    def add(self, job: Callable[[], None]) -> None:
        self.work.append(job)

    def run_to(self, end: int) -> None:
        while self.finished < end:
            job = self.work[self.finished]
            self.work[self.finished] = lambda: None
            self.finished += 1
            job()

    def synchronize(self) -> None:
        assert not self.stalled, "waited for a stream that does not move"
        self.run_to(len(self.work))


class LateEvent:
    """A point in a ``LateStream``."""

    def __init__(self, stream: LateStream) -> None:
        self.stream, self.end = stream, len(stream.work)

    @property
    def done(self) -> bool:
        if self.stream.eager and not self.stream.stalled:
            self.stream.run_to(self.end)
        return self.stream.finished >= self.end

    def synchronize(self) -> None:
        assert not self.stream.stalled, "waited for a stream that does not move"
        self.stream.run_to(self.end)


class HostDevice:
    """Implements ``kvd_client.cuda.Device``. ``engine`` is the engine's stream; ``refuse`` makes copies fail."""

    def __init__(self) -> None:
        twin.library()
        self.engine = LateStream(eager=True)
        self.streams: list[LateStream] = []
        self.copies: list[int] = []
        self.rows_copied = 0
        self.registered: dict[int, int] = {}
        self.refuse = False

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def memory(self, size_bytes: int) -> torch.Tensor:
        spare = torch.full((size_bytes + 256,), 0xAA, dtype=torch.uint8)
        begin = -spare.data_ptr() % 256
        return spare[begin : begin + size_bytes]

    def words(self, count: int) -> torch.Tensor:
        return torch.full((count,), -1, dtype=torch.int64)

    def pinned_words(self, count: int) -> torch.Tensor:
        return torch.full((count,), -1, dtype=torch.int64)

    def stream(self) -> LateStream:
        self.streams.append(LateStream())
        return self.streams[-1]

    def engine_stream(self) -> LateStream:
        return self.engine

    def record(self, stream: LateStream) -> LateEvent:
        return LateEvent(stream)

    def copy(self, target: int, source: int, size_bytes: int, stream: LateStream) -> None:
        self._check(target, source, size_bytes)
        stream.add(lambda: ctypes.memmove(target, source, size_bytes))

    def copy_rows(
        self, target: int, target_stride: int, source: int, source_stride: int, run: int, count: int, stream: LateStream
    ) -> None:
        self._check(target, source, run * count)
        self.rows_copied += 1
        for address, stride in ((target, target_stride), (source, source_stride)):
            self._one_registration(address, (count - 1) * stride + run)
        for i in range(count):
            row = (target + i * target_stride, source + i * source_stride, run)
            stream.add(lambda row=row: ctypes.memmove(*row))

    def launch(self, kernel: str, blocks: int, args: Sequence[int], stream: LateStream) -> None:
        stream.add(lambda: twin.run(kernel, blocks, args, threads=32))

    def register(self, address: int, size_bytes: int) -> None:
        self.registered[address] = size_bytes

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def _check(self, target: int, source: int, size_bytes: int) -> None:
        if self.refuse:
            raise RuntimeError("the device refuses")
        self.copies.append(size_bytes)
        self._one_registration(target, size_bytes)
        self._one_registration(source, size_bytes)

    def _one_registration(self, address: int, size_bytes: int) -> None:
        """The driver refuses a copy over two registrations, or over the edge of one."""
        for begin, size in self.registered.items():
            inside = begin <= address and address + size_bytes <= begin + size
            outside = address + size_bytes <= begin or begin + size <= address
            assert inside or outside, "a copy crosses the edge of a registration"
