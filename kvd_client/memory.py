"""What every copier needs to know of memory: addresses of buffers, one rank's pages, checks before any copy."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvd.wire.chunks import Stripe
from kvd.wire.spans import Span
from kvd_client.copier import Form
from kvd_client.layout import ChunkLayout, LayoutError, PageGeometry, Shard

if TYPE_CHECKING:
    import torch


def address_of(memory: memoryview) -> int:
    """Address of the first byte; read-only memory too. The caller keeps ``memory`` alive while it uses the address."""
    address: int = np.frombuffer(memory, dtype=np.uint8).__array_interface__["data"][0]
    return address


def window(address: int, size_bytes: int) -> ctypes.Array[ctypes.c_ubyte]:
    """``size_bytes`` of memory from ``address`` as a buffer object. Unlike a read-only memoryview it becomes a tensor
    without a warning; whoever uses it to read must not write."""
    return (ctypes.c_ubyte * size_bytes).from_address(address)


def geometries(caches: Mapping[str, torch.Tensor], layout: ChunkLayout, stripe: Stripe) -> list[PageGeometry]:
    """Geometry of each layer's view, checked against what ``stripe`` of ``layout`` says. Raises LayoutError."""
    count = stripe.layer_end - stripe.layer_begin
    if len(caches) != count:
        raise LayoutError(f"{len(caches)} KV caches given for {count} layers")
    found = []
    for layer, (name, tensor) in enumerate(caches.items(), stripe.layer_begin):
        try:
            geometry = PageGeometry.from_view(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.element_size())
        except LayoutError as error:
            raise LayoutError(f"{name}: {error}") from None
        if geometry.heads != stripe.head_end - stripe.head_begin:
            raise LayoutError(f"{name}: {geometry.heads} heads, expected {stripe.head_end - stripe.head_begin}")
        if geometry.page_bytes != layout.page_bytes[layer]:
            raise LayoutError(f"{name}: pages of {geometry.page_bytes} bytes, expected {layout.page_bytes[layer]}")
        found.append(geometry)
    return found


class RankPages:
    """What is the same for every copier: one rank's pages, what it owns of a chunk, and the checks before a copy."""

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], layout: ChunkLayout, shard: Shard) -> None:
        """Takes views as ``copier.make_copier`` does. Raises LayoutError when they do not fit the layout."""
        self.load_stripe = shard.load_stripe(layout)
        self.stripe = shard.store_stripe(layout)
        self.layout = layout
        self.geometries = geometries(kv_caches, layout, self.load_stripe)
        self.caches = list(kv_caches.values())
        self.chunk_bytes = layout.chunk_bytes
        self.store_spans = layout.spans(self.stripe)
        self.store_bytes = layout.stripe_bytes(self.stripe)
        self.load_bytes = layout.stripe_bytes(self.load_stripe)
        self.load_layers = len(self.caches)
        self._load_offsets = layout.packed_offsets(self.load_stripe)
        self._blocks = min(g.blocks for g in self.geometries)

    def local_layers(self, stripe: Stripe) -> slice:
        """The rank's own layers, counted from its first, that ``stripe`` names."""
        first = self.load_stripe.layer_begin
        return slice(stripe.layer_begin - first, stripe.layer_end - first)

    def load_spans(self, layers: range) -> list[Span]:
        """See ``Copier``."""
        first = self.load_stripe.layer_begin
        return self.layout.spans(
            self.load_stripe._replace(layer_begin=first + layers.start, layer_end=first + layers.stop)
        )

    def check_store(self, chunks: Sequence[Sequence[int]], targets: Sequence[memoryview], form: Form) -> None:
        """Raises LayoutError unless every chunk has valid block ids and a large enough, writable target."""
        self._check(chunks, targets, self.store_bytes if form is Form.PACKED else self.chunk_bytes)
        if any(target.readonly for target in targets):
            raise LayoutError("targets of a store must be writable")

    def check_load(
        self, chunks: Sequence[Sequence[int]], sources: Sequence[memoryview], form: Form, layers: range
    ) -> None:
        """Raises LayoutError unless every chunk has valid block ids and a large enough source, and there are such
        layers."""
        if layers.step != 1 or not 0 <= layers.start < layers.stop <= self.load_layers:
            raise LayoutError(f"{layers} are not layers of {self.load_layers}")
        packed_bytes = self._load_offsets[layers.stop] - self._load_offsets[layers.start]
        self._check(chunks, sources, packed_bytes if form is Form.PACKED else self.chunk_bytes)

    def _check(self, chunks: Sequence[Sequence[int]], memory: Sequence[memoryview], need_bytes: int) -> None:
        if len(chunks) != len(memory):
            raise LayoutError(f"{len(chunks)} chunks given with memory for {len(memory)}")
        for ids, view in zip(chunks, memory, strict=True):
            if len(ids) != self.layout.chunk_blocks or min(ids) < 0 or max(ids) >= self._blocks:
                raise LayoutError(f"a chunk is {self.layout.chunk_blocks} blocks below {self._blocks}, got {list(ids)}")
            if view.nbytes < need_bytes or not view.c_contiguous:
                raise LayoutError(f"a chunk needs {need_bytes} contiguous bytes, got {view.nbytes}")
