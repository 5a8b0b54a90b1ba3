"""Copier for KV caches in CPU memory: strided copies straight between pages and chunk memory.

Layers that lie at equal distances in one storage are one view with a layer axis, and neighbouring blocks move together,
so a chunk takes a few large copies (which release the GIL) and no second copy of the bytes.

The copies are NumPy's, not torch's: torch splits a large copy over OpenMP threads, and a team of them started on a
transfer thread, which inherits the core that a CPU engine has bound itself to, spins there against the engine. Measured
on two cores, a load of 36 MiB took up to 5 s that way.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

from kvd.wire.chunks import Stripe
from kvd_client.copier import Form, Mark, Pending
from kvd_client.layout import (
    ChunkLayout,
    PageGeometry,
    Place,
    Shard,
    consecutive,
    is_empty,
    packed_places,
    slot_places,
)
from kvd_client.memory import RankPages, address_of, window

#: Plain bytes.
_Bytes = np.ndarray[Any, np.dtype[np.uint8]]

#: What ``room`` answers: CPU stores need no staging.
_UNBOUNDED = 1 << 30


class _Stored:
    """A store that was done when it was started."""

    def wait(self, deadline: float) -> bool:
        """Always True."""
        return True


class _Stack(NamedTuple):
    """Layers with equal geometry at equal distances in one storage."""

    #: Counted from the stripe's first.
    first_layer: int
    #: ``[layers, blocks, heads, sub_blocks, tokens, token_bytes]``, bytes.
    pages: _Bytes
    #: Where the first layer's pages lie, and how far apart layers are, in either form.
    places: dict[Form, tuple[Place, int]]


class TorchCopier(RankPages):
    """The ``Copier`` for CPU tensors."""

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], layout: ChunkLayout, shard: Shard) -> None:
        """Takes views as ``make_copier`` does. Raises LayoutError when they do not fit the layout."""
        super().__init__(kv_caches, layout, shard)
        self._store_stacks = self._stacks(self.stripe)
        self._load_stacks = self._stacks(self.load_stripe)

    def room(self) -> int:
        """No staging, no bound."""
        return _UNBOUNDED

    def start_store(self, chunks: Sequence[Sequence[int]], targets: Sequence[memoryview], form: Form) -> Pending | None:
        """Copies at once; the returned store is done. Raises LayoutError as documented by ``Copier``."""
        self.check_store(chunks, targets, form)
        for blocks, target in zip(chunks, targets, strict=True):
            for stack in self._store_stacks:
                _copy(stack, blocks, target, form, store=True)
        return _Stored()

    def mark(self) -> Mark | None:
        """None: CPU work is over when its call returns."""
        return None

    def load(
        self,
        chunks: Sequence[Sequence[int]],
        sources: Sequence[memoryview],
        form: Form,
        deadline: float,
        after: Mark | None = None,
        layers: range | None = None,
    ) -> bool:
        """Copies chunk by chunk until all are in the pages (True) or the deadline has passed (False)."""
        wanted = layers if layers is not None else range(self.load_layers)
        self.check_load(chunks, sources, form, wanted)
        packed_bytes = self._load_offsets[wanted.start] if form is Form.PACKED else 0
        stacks = [part for stack in self._load_stacks if (part := _part(stack, wanted, packed_bytes)) is not None]
        for blocks, source in zip(chunks, sources, strict=True):
            if time.monotonic() > deadline:
                return False
            for stack in stacks:
                _copy(stack, blocks, source, form, store=False)
        return True

    def register(self, memory: memoryview) -> None:
        """Nothing to do."""

    def unregister(self, memory: memoryview) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Lets go of the caches."""
        self._store_stacks, self._load_stacks, self.caches = [], [], []

    def _stacks(self, stripe: Stripe) -> list[_Stack]:
        """The layers of ``stripe`` in as few stacks as their memory allows."""
        if is_empty(stripe):
            return []
        slot, packed = slot_places(self.layout, stripe), packed_places(self.layout, stripe)
        layers = self.local_layers(stripe)
        caches, geometries = self.caches[layers], self.geometries[layers]
        stacks, begin = [], 0
        while begin < len(caches):
            end = begin + 1
            while end < len(caches) and _stackable(caches[begin : end + 1], geometries[begin : end + 1]):
                end += 1
            places = {
                form: (of[begin], of[begin + 1].offset - of[begin].offset if end > begin + 1 else 0)
                for form, of in ((Form.SLOT, slot), (Form.PACKED, packed))
            }
            stacks.append(_Stack(begin, _stack_view(caches[begin], geometries[begin:end]), places))
            begin = end
        return stacks


def _part(stack: _Stack, layers: range, skipped_bytes: int) -> _Stack | None:
    """The layers of ``stack`` that are among ``layers``, their places ``skipped_bytes`` further to the front."""
    begin, end = max(layers.start - stack.first_layer, 0), min(layers.stop - stack.first_layer, len(stack.pages))
    if begin >= end:
        return None
    places = {
        form: (place._replace(offset=place.offset + begin * stride - skipped_bytes), stride)
        for form, (place, stride) in stack.places.items()
    }
    return _Stack(stack.first_layer + begin, stack.pages[begin:end], places)


def _copy(stack: _Stack, blocks: Sequence[int], memory: memoryview, form: Form, *, store: bool) -> None:
    """Copies the stack's pages of one chunk to or from its memory."""
    flat = np.frombuffer(window(address_of(memory), memory.nbytes), dtype=np.uint8)
    layers, _, heads, sub_blocks, tokens, token_bytes = stack.pages.shape
    place, layer_stride = stack.places[form]
    page = sub_blocks * tokens * token_bytes
    chunk = as_strided(
        flat[place.offset :],
        (layers, len(blocks), heads, sub_blocks, tokens, token_bytes),
        (layer_stride, place.block_stride, page, tokens * token_bytes, token_bytes, 1),
    )
    for run in consecutive(blocks):
        pages = stack.pages[:, run.block : run.block + run.length]
        part = chunk[:, run.position : run.position + run.length]
        if store:
            np.copyto(part, pages)
        else:
            np.copyto(pages, part)


def _stackable(caches: Sequence[torch.Tensor], layers: Sequence[PageGeometry]) -> bool:
    """Whether the last layer continues the stack that the others are."""
    step = layers[1].address - layers[0].address
    return (
        step > 0
        and layers[-1] == layers[0].moved((len(layers) - 1) * step)
        and caches[-1].untyped_storage().data_ptr() == caches[0].untyped_storage().data_ptr()
    )


def _stack_view(cache: torch.Tensor, layers: Sequence[PageGeometry]) -> _Bytes:
    """The pages of a stack as bytes ``[layers, blocks, heads, sub_blocks, tokens, token_bytes]``.

    Made from the storage and outside inference mode, in which engines make their caches and copiers: a tensor made in
    it does not become an array.
    """
    g = layers[0]
    step = layers[1].address - g.address if len(layers) > 1 else 0
    storage = cache.untyped_storage()
    with torch.inference_mode(False):
        whole: _Bytes = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    pages: _Bytes = as_strided(
        whole[g.address - storage.data_ptr() :],
        (len(layers), g.blocks, g.heads, g.sub_blocks, g.tokens, g.token_bytes),
        (step, g.block_stride, g.head_stride, g.sub_block_stride, g.token_stride, 1),
    )
    return pages
