"""Copies between an engine's KV pages and chunk memory: the seam, and the choice of an implementation.

This module alone does not import torch or CuPy; ``make_copier`` imports what the tensors ask for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from kvd.wire.chunks import Stripe
from kvd.wire.spans import Span
from kvd_client.layout import ChunkLayout, LayoutError, Shard

if TYPE_CHECKING:
    import torch

#: Default bound of the bytes that stores may have under way in device memory.
MAX_INFLIGHT_BYTES = 512 << 20


class Form(Enum):
    """What the memory given for a chunk holds."""

    #: A whole chunk slot (``chunk_bytes``); the stripe's bytes go to, or come from, its spans.
    SLOT = "slot"
    #: The stripe's bytes alone, or those of some layers of it, span after span: the payload of the TCP path.
    PACKED = "packed"


class Pending(Protocol):
    """A store under way."""

    def wait(self, deadline: float) -> bool:
        """Blocks until the bytes are in the targets (True) or it is sure that they will not be (False).

        ``deadline`` is in ``time.monotonic`` seconds. After either answer nothing touches the targets any more, so a
        slot may be committed or aborted; a copy already handed to the hardware is waited for first. The answer stays
        the same when asked again. Call it for every store, from a transfer thread: it also returns the staging room.
        Raises RuntimeError only when the device cannot even say whether it still writes; then the targets stay mapped
        and must never be given to anybody else.
        """
        ...


class Mark(Protocol):
    """A point in the engine's work that a load must come after. Made by ``Copier.mark``."""

    @property
    def done(self) -> bool:
        """Whether the engine's work has come to it."""
        ...


class Copier(Protocol):
    """Moves pages of the engine's blocks to and from chunks, for one rank.

    ``chunks`` are lists of the engine's (manager) block ids, ``chunk_blocks`` of them per chunk; one target or source
    per chunk. Calls raise LayoutError when ids or sizes do not fit, before anything is copied.
    """

    chunk_bytes: int
    #: What this rank writes, for Commit and for the path; an empty stripe (``store_bytes`` 0) is not to be committed.
    stripe: Stripe
    store_spans: list[Span]
    store_bytes: int
    load_bytes: int
    #: How many layers a load fills: all of this rank's.
    load_layers: int

    def load_spans(self, layers: range) -> list[Span]:
        """What a load of these layers, counted from this rank's first, reads of a chunk."""
        ...

    def room(self) -> int:
        """How many chunks ``start_store`` would take now."""
        ...

    def start_store(self, chunks: Sequence[Sequence[int]], targets: Sequence[memoryview], form: Form) -> Pending | None:
        """Called on the engine's thread, in its hook. When it returns, the engine's later work may overwrite the pages.

        The targets belong to the store until ``Pending.wait`` has answered. None: no staging room, nothing was started.
        """
        ...

    def mark(self) -> Mark | None:
        """Called on the engine's thread when it hands blocks to be loaded: work it has launched so far may still use
        those blocks. Pass the result to ``load``."""
        ...

    def load(
        self,
        chunks: Sequence[Sequence[int]],
        sources: Sequence[memoryview],
        form: Form,
        deadline: float,
        after: Mark | None = None,
        layers: range | None = None,
    ) -> bool:
        """Called on a transfer thread. Copies in prefix order, in bounded pieces; True when all bytes are in the
        pages. False: the deadline (``time.monotonic`` seconds) passed. Whatever it answers or raises, nothing
        started is still under way afterwards.

        ``layers``: only these, counted from this rank's first; packed sources then hold ``load_spans(layers)``."""
        ...

    def register(self, memory: memoryview) -> None:
        """Tells of shared memory that targets and sources will lie in, so that the device can copy without a bounce.
        Returns at once; copies work before, during and without it. The memory is kept mapped until ``unregister``.
        CPU: nothing to do."""
        ...

    def unregister(self, memory: memoryview) -> None:
        """Undoes ``register``. No copy in the memory may be under way."""
        ...

    def close(self) -> None:
        """Gives back staging memory and registrations. No store or load may be under way."""
        ...


def make_copier(
    kv_caches: Mapping[str, torch.Tensor],
    layout: ChunkLayout,
    shard: Shard,
    *,
    max_inflight_bytes: int = MAX_INFLIGHT_BYTES,
) -> Copier:
    """The copier for this rank's caches.

    ``kv_caches`` maps layer names to views ``[blocks, heads, tokens, C]``, or of five axes with ``sub_blocks`` after
    blocks, in layer order: entry i is layer ``shard.layer_begin + i``. Raises LayoutError when they do not fit the
    layout.
    """
    devices = {tensor.device.type for tensor in kv_caches.values()}
    if devices == {"cpu"}:
        from kvd_client.copier_torch import TorchCopier

        return TorchCopier(kv_caches, layout, shard)
    if devices == {"cuda"}:
        from kvd_client.copier_cupy import CupyCopier

        return CupyCopier(kv_caches, layout, shard, max_inflight_bytes=max_inflight_bytes)
    raise LayoutError(f"KV caches on {sorted(devices) or 'no device'}: only cpu or cuda alone is supported")
