"""The copier, between paged caches and chunks: on a CPU against memcpy, on a GPU against the copy engines."""

from __future__ import annotations

import importlib.util
import mmap
import random
import time
from collections.abc import Callable

from kvd_client.bench.figures import GIB, Figure, figure, interleave, timed
from kvd_client.bench.limits import Memcpy
from kvd_client.copier import Copier, Form, make_copier
from kvd_client.layout import ChunkLayout, Shard

#: A model with 8 layers of 4 KV heads: keys and values of 128 elements each, 16 bits, side by side.
LAYERS, HEADS, BLOCK_TOKENS, CONTENT, ELEMENT_BYTES = 8, 4, 16, 256, 2
CHUNK_BLOCKS = 16
WARMUP = 4
#: No copy here takes so long, seconds.
PATIENCE_S = 60.0


def missing() -> str | None:
    """Why no copier can be measured here; None: one can."""
    return None if importlib.util.find_spec("torch") else "copier: torch is not installed here"


def bench_copier(rounds: int, chunks: int) -> tuple[list[Figure], list[str]]:
    """Gathers ``chunks`` chunks from blocks anywhere in the caches, and scatters them there again. The figures, and
    what was left out. Needs torch (see ``missing``)."""
    import torch

    figures = _bench("cpu", torch.device("cpu"), rounds, chunks)
    if not torch.cuda.is_available():
        return figures, ["copier on a GPU: there is no CUDA device here"]
    if importlib.util.find_spec("cupy") is None:
        return figures, ["copier on a GPU: CuPy is not installed here"]
    return figures + _bench("gpu", torch.device("cuda"), rounds, chunks), []


def _bench(label: str, device: object, rounds: int, chunks: int) -> list[Figure]:
    import torch

    layout = ChunkLayout((BLOCK_TOKENS * CONTENT * ELEMENT_BYTES,) * LAYERS, HEADS, CHUNK_BLOCKS)
    blocks = chunks * CHUNK_BLOCKS
    shape = (LAYERS, blocks, HEADS, BLOCK_TOKENS, CONTENT)
    caches = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, device=device)
    copier = make_copier({str(i): caches[i] for i in range(LAYERS)}, layout, Shard(0, LAYERS, 0, 1))
    total = layout.chunk_bytes * chunks
    pool = memoryview(mmap.mmap(-1, total))  # shared memory, as a pool is
    slots = [pool[i * layout.chunk_bytes : (i + 1) * layout.chunk_bytes] for i in range(chunks)]
    anywhere = random.Random(0).sample(range(blocks), blocks)
    ids = [anywhere[i * CHUNK_BLOCKS : (i + 1) * CHUNK_BLOCKS] for i in range(chunks)]
    copier.register(pool)
    store, load = f"copier store, {label}", f"copier load, {label}"
    parts: dict[str, Callable[[], float]] = {
        store: lambda: total / timed(lambda: _store(copier, ids, slots)) / GIB,
        load: lambda: total / timed(lambda: _load(copier, ids, slots)) / GIB,
    }
    if label == "cpu":
        bare = Memcpy(layout.chunk_bytes, chunks)
        limits = {store: ("memcpy in", bare.into), load: ("memcpy out", bare.out)}
    else:
        limits = _device_limits(store, load, total)
        parts["copy on the device"] = _on_device(total)
    try:
        samples = interleave({**parts, **dict(limits.values())}, rounds, WARMUP)
        before = caches.clone()
        _store(copier, ids, slots)
        caches.zero_()
        _load(copier, ids, slots)
        if not torch.equal(before, caches):
            raise RuntimeError("what was loaded is not what was stored")
    finally:
        copier.unregister(pool)
        copier.close()
    figures = [figure(name, "GiB/s", samples, limits[name][0]) for name in (store, load)]
    return figures + [figure(name, "GiB/s", samples) for name in parts if name not in limits]


def _store(copier: Copier, ids: list[list[int]], slots: list[memoryview]) -> None:
    pending = copier.start_store(ids, slots, Form.SLOT)
    if pending is None or not pending.wait(time.monotonic() + PATIENCE_S):
        raise RuntimeError("a store was not carried out")


def _load(copier: Copier, ids: list[list[int]], slots: list[memoryview]) -> None:
    if not copier.load(ids, slots, Form.SLOT, time.monotonic() + PATIENCE_S):
        raise RuntimeError("a load was not carried out")


def _device_limits(store: str, load: str, size_bytes: int) -> dict[str, tuple[str, Callable[[], float]]]:
    """One large copy between pinned memory and the device, either way."""
    import torch

    host = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
    return {
        store: ("copy from the device, pinned", _copies(host, device, size_bytes)),
        load: ("copy to the device, pinned", _copies(device, host, size_bytes)),
    }


def _on_device(size_bytes: int) -> Callable[[], float]:
    import torch

    first, second = (torch.empty(size_bytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    return _copies(first, second, size_bytes)


def _copies(to: object, source: object, size_bytes: int) -> Callable[[], float]:
    import torch

    def copy() -> None:
        to.copy_(source, non_blocking=True)  # type: ignore[attr-defined]
        torch.cuda.synchronize()

    return lambda: size_bytes / timed(copy) / GIB
