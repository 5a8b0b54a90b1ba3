"""The few things the copier asks of a CUDA device, and CuPy's way of doing them.

Nothing else imports CuPy. Addresses, stream and event handles are plain integers or opaque objects, so that the logic
above can be run against a device made of host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

from kvd_client.kernels import OPTIONS, SOURCE, THREADS, kernel_names


class Event(Protocol):
    """A point in a stream."""

    @property
    def done(self) -> bool:
        """Whether the stream has passed it."""
        ...

    def synchronize(self) -> None:
        """Waits until the stream has passed it."""
        ...


class Stream(Protocol):
    """A queue of work on the device."""

    def synchronize(self) -> None:
        """Waits for everything in it."""
        ...


class Device(Protocol):
    """One CUDA device. Calls raise RuntimeError when the driver does. All but ``register`` and ``unregister`` are made
    inside ``current()``."""

    def current(self) -> AbstractContextManager[object]:
        """Makes the device the calling thread's."""
        ...

    def memory(self, size_bytes: int) -> torch.Tensor:
        """Device memory (bytes), aligned to 256."""
        ...

    def words(self, count: int) -> torch.Tensor:
        """``count`` int64 in device memory."""
        ...

    def pinned_words(self, count: int) -> torch.Tensor:
        """``count`` int64 in pinned host memory."""
        ...

    def stream(self) -> Stream:
        """A new stream that is not ordered with any other."""
        ...

    def engine_stream(self) -> Stream:
        """The stream into which the calling thread, the engine's, launches its work."""
        ...

    def record(self, stream: Stream) -> Event:
        """A new event at the present end of ``stream``."""
        ...

    def copy(self, target: int, source: int, size_bytes: int, stream: Stream) -> None:
        """Starts a copy between host and device, either way."""
        ...

    def copy_rows(
        self, target: int, target_stride: int, source: int, source_stride: int, run: int, count: int, stream: Stream
    ) -> None:
        """Starts a copy of ``count`` runs of ``run`` bytes, their starts a stride apart on either side."""
        ...

    def launch(self, kernel: str, blocks: int, args: Sequence[int], stream: Stream) -> None:
        """Starts a kernel of ``kernels.SOURCE`` with ``blocks`` thread blocks."""
        ...

    def register(self, address: int, size_bytes: int) -> None:
        """Pins host memory."""
        ...

    def unregister(self, address: int) -> None:
        """Undoes ``register``."""
        ...


def pci_bus_id(device: torch.device) -> str:
    """Where a device is plugged in: ``0000:3B:00.0``. Raises ImportError without CuPy, RuntimeError when the driver
    does."""
    import cupy

    index = torch.cuda.current_device() if device.index is None else device.index
    return str(cupy.cuda.runtime.deviceGetPCIBusId(index))


class CupyDevice:
    """``Device`` through CuPy (CUDA 12 or 13). Memory comes from torch, so that the process has one allocator."""

    def __init__(self, device: torch.device) -> None:
        """Compiles the kernels for ``device``. Raises ImportError without CuPy, RuntimeError when compiling fails."""
        import cupy

        self._cupy: Any = cupy
        self._torch_device = device
        self._index = torch.cuda.current_device() if device.index is None else device.index
        with self.current():
            module = cupy.RawModule(code=SOURCE, options=OPTIONS)
            self._kernels: dict[str, Any] = {name: module.get_function(name) for name in kernel_names()}

    def current(self) -> AbstractContextManager[object]:
        """See ``Device``."""
        device: AbstractContextManager[object] = self._cupy.cuda.Device(self._index)
        return device

    def memory(self, size_bytes: int) -> torch.Tensor:
        """See ``Device``."""
        return torch.empty(size_bytes, dtype=torch.uint8, device=self._torch_device)

    def words(self, count: int) -> torch.Tensor:
        """See ``Device``."""
        return torch.empty(count, dtype=torch.int64, device=self._torch_device)

    def pinned_words(self, count: int) -> torch.Tensor:
        """See ``Device``."""
        return torch.empty(count, dtype=torch.int64, pin_memory=True)

    def stream(self) -> Stream:
        """See ``Device``. Priority 0 is the lowest that CUDA has."""
        stream: Stream = self._cupy.cuda.Stream(non_blocking=True, priority=0)
        return stream

    def engine_stream(self) -> Stream:
        """See ``Device``."""
        handle = torch.cuda.current_stream(self._index).cuda_stream
        stream: Stream = self._cupy.cuda.ExternalStream(handle, self._index)
        return stream

    def record(self, stream: Stream) -> Event:
        """See ``Device``. Waiting for the event sleeps: a spinning thread would take the engine's core."""
        event: Any = self._cupy.cuda.Event(block=True, disable_timing=True)
        event.record(stream)
        recorded: Event = event
        return recorded

    def copy(self, target: int, source: int, size_bytes: int, stream: Any) -> None:
        """See ``Device``."""
        runtime = self._cupy.cuda.runtime
        runtime.memcpyAsync(target, source, size_bytes, runtime.memcpyDefault, stream.ptr)

    def copy_rows(
        self, target: int, target_stride: int, source: int, source_stride: int, run: int, count: int, stream: Any
    ) -> None:
        """See ``Device``."""
        runtime = self._cupy.cuda.runtime
        runtime.memcpy2DAsync(
            target, target_stride, source, source_stride, run, count, runtime.memcpyDefault, stream.ptr
        )

    def launch(self, kernel: str, blocks: int, args: Sequence[int], stream: Any) -> None:
        """See ``Device``."""
        with stream:
            self._kernels[kernel]((blocks,), (THREADS,), tuple(np.int64(arg) for arg in args))

    def register(self, address: int, size_bytes: int) -> None:
        """See ``Device``. Portable: every device of the process may use the registration."""
        with self.current():
            self._cupy.cuda.runtime.hostRegister(address, size_bytes, 1)

    def unregister(self, address: int) -> None:
        """See ``Device``."""
        with self.current():
            self._cupy.cuda.runtime.hostUnregister(address)
