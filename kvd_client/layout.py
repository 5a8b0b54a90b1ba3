"""The geometry of paged KV buffers and of chunks. Pure arithmetic: no tensors, no I/O.

A *page* is what one KV head holds of one engine block: ``sub_blocks x tokens x token_bytes`` bytes. In the engine's
memory a page may lie in one piece or as many strided rows; in a chunk it is always contiguous and in this order, so a
chunk ``[layer][block][head][page]`` has the same bytes whatever the physical layout and the tensor parallelism of the
engine that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from math import gcd
from typing import NamedTuple

from kvd.wire.chunks import Stripe
from kvd.wire.spans import Span


class LayoutError(ValueError):
    """Shapes, strides or a sharding that this layout cannot describe. Such an engine is not cached."""


def is_empty(stripe: Stripe) -> bool:
    """Whether the stripe names no bytes: a rank with nothing to store, because there are more replicas than layers."""
    return stripe.layer_begin >= stripe.layer_end or stripe.head_begin >= stripe.head_end


@dataclass(frozen=True, slots=True)
class PageGeometry:
    """Where the pages of one layer lie. Strides in bytes; ``address`` is where block 0, head 0, token 0 begins.

    ``sub_blocks`` is 1 unless the engine's attention kernel works on smaller blocks than its block manager; then a
    block is ``sub_blocks`` kernel blocks of ``tokens`` tokens each.
    """

    address: int
    blocks: int
    sub_blocks: int
    heads: int
    tokens: int
    token_bytes: int
    block_stride: int
    sub_block_stride: int
    head_stride: int
    token_stride: int

    @classmethod
    def from_view(cls, address: int, shape: Sequence[int], strides: Sequence[int], element_bytes: int) -> PageGeometry:
        """Geometry of a view ``[blocks, heads, tokens, C]`` or ``[blocks, sub_blocks, heads, tokens, C]``.

        ``strides`` count elements, as tensors give them. Raises LayoutError for another rank, an empty axis, negative
        strides, or a C axis that is not contiguous.
        """
        if len(shape) != len(strides) or len(shape) not in (4, 5):
            raise LayoutError(f"pages must be a view of 4 or 5 axes, got {tuple(shape)}, strides {tuple(strides)}")
        if min(shape) < 1 or min(strides) < 0 or element_bytes < 1:
            raise LayoutError(f"pages with an empty axis or negative stride: {tuple(shape)}, {tuple(strides)}")
        if strides[-1] != 1 and shape[-1] != 1:
            raise LayoutError(f"the last axis of the pages must be contiguous, its stride is {strides[-1]}")
        size = list(shape)
        step = [s * element_bytes for s in strides]
        if len(size) == 4:
            size.insert(1, 1)
            step.insert(1, 0)
        return cls(
            address=address,
            blocks=size[0],
            sub_blocks=size[1],
            heads=size[2],
            tokens=size[3],
            token_bytes=size[4] * element_bytes,
            block_stride=step[0],
            sub_block_stride=step[1],
            head_stride=step[2],
            token_stride=step[3],
        )

    def moved(self, distance_bytes: int) -> PageGeometry:
        """The same pages ``distance_bytes`` further on."""
        return replace(self, address=self.address + distance_bytes)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.sub_blocks * self.tokens * self.token_bytes

    @property
    def rows(self) -> tuple[int, int, int, int, int]:
        """A page as ``outer x inner`` contiguous runs: (run bytes, inner, inner stride, outer, outer stride).

        Axes that adjoin in memory are merged, so a contiguous page is one run with inner = outer = 1.
        """
        run, inner, inner_stride = self.token_bytes, self.tokens, self.token_stride
        outer, outer_stride = self.sub_blocks, self.sub_block_stride
        if inner == 1 or inner_stride == run:
            run, inner, inner_stride = run * inner, outer, outer_stride
            outer, outer_stride = 1, 0
            if inner == 1 or inner_stride == run:
                run, inner, inner_stride = run * inner, 1, 0
        elif outer == 1 or outer_stride == inner * inner_stride:
            inner, outer, outer_stride = inner * outer, 1, 0
        return run, inner, inner_stride, outer, outer_stride

    @property
    def alignment(self) -> int:
        """Largest power of two, at most 16, that divides the address and the length of every run of every page."""
        run, inner, inner_stride, outer, outer_stride = self.rows
        steps = [16, self.address, run]
        for count, stride in (
            (self.blocks, self.block_stride),
            (self.heads, self.head_stride),
            (inner, inner_stride),
            (outer, outer_stride),
        ):
            if count > 1:
                steps.append(stride)
        return gcd(*steps)


@dataclass(frozen=True)
class ChunkLayout:
    """The bytes of a chunk: ``[layer][block][head][page]`` of the whole model.

    ``page_bytes`` has one entry per layer of the model (all pipeline ranks), ``num_heads`` counts the KV heads of the
    whole model, ``chunk_blocks`` the engine's blocks in a chunk.
    """

    page_bytes: tuple[int, ...]
    num_heads: int
    chunk_blocks: int

    def __post_init__(self) -> None:
        """Raises LayoutError when a number is not positive."""
        if not self.page_bytes or min(self.page_bytes) < 1 or self.num_heads < 1 or self.chunk_blocks < 1:
            raise LayoutError(f"a chunk needs layers, heads, blocks and bytes, got {self}")

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return len(self.page_bytes)

    @cached_property
    def layer_offsets(self) -> tuple[int, ...]:
        """Byte offset of each layer in the chunk, and the length of the chunk as the last entry."""
        return self.packed_offsets(Stripe(0, self.num_layers, 0, self.num_heads))

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a whole chunk."""
        return self.layer_offsets[-1]

    def stripe_bytes(self, stripe: Stripe) -> int:
        """Bytes of ``stripe`` in one chunk."""
        return self.packed_offsets(stripe)[-1]

    def packed_offsets(self, stripe: Stripe) -> tuple[int, ...]:
        """Where each layer of ``stripe`` begins when its bytes lie span after span, ``[layer][block][head][page]`` with
        its heads only; the last entry is the length."""
        heads = stripe.head_end - stripe.head_begin
        pages = self.page_bytes[stripe.layer_begin : stripe.layer_end]
        return tuple(accumulate((page * self.chunk_blocks * heads for page in pages), initial=0))

    def spans(self, stripe: Stripe) -> list[Span]:
        """The bytes of ``stripe`` in a chunk, in order; one span per run of layers with equal pages, or one in all
        when every head belongs to the stripe."""
        if is_empty(stripe):
            return []
        begin, end = self.layer_offsets[stripe.layer_begin], self.layer_offsets[stripe.layer_end]
        heads = stripe.head_end - stripe.head_begin
        if heads == self.num_heads:
            return [Span(begin, end - begin, end - begin, 1)]
        spans = []
        layers = range(stripe.layer_begin, stripe.layer_end)
        for page, group in groupby(layers, key=lambda layer: self.page_bytes[layer]):
            members = list(group)
            offset = self.layer_offsets[members[0]] + stripe.head_begin * page
            spans.append(Span(offset, heads * page, self.num_heads * page, len(members) * self.chunk_blocks))
        return spans


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's place: tensor parallel rank and size, and its pipeline stage's layers (end exclusive)."""

    layer_begin: int
    layer_end: int
    tp_rank: int = 0
    tp_size: int = 1

    def load_stripe(self, layout: ChunkLayout) -> Stripe:
        """What this rank reads: its heads of all its layers. Raises LayoutError for an impossible sharding."""
        heads, size = layout.num_heads, self.tp_size
        if not 0 <= self.tp_rank < size or not 0 <= self.layer_begin < self.layer_end <= layout.num_layers:
            raise LayoutError(f"{self} is not a place in a model of {layout.num_layers} layers")
        if heads % size and size % heads:
            raise LayoutError(f"{heads} KV heads cannot be shared by {size} tensor parallel ranks")
        first = self.tp_rank * heads // size
        return Stripe(self.layer_begin, self.layer_end, first, first + max(1, heads // size))

    def store_stripe(self, layout: ChunkLayout) -> Stripe:
        """What this rank writes. Ranks that hold the same head share its layers out among them, so every byte is
        written once; with more replicas than layers a stripe may be empty. Raises LayoutError as load_stripe."""
        stripe = self.load_stripe(layout)
        replicas = max(1, self.tp_size // layout.num_heads)
        replica = self.tp_rank % replicas
        count = self.layer_end - self.layer_begin
        begin = self.layer_begin + replica * count // replicas
        end = self.layer_begin + (replica + 1) * count // replicas
        return stripe._replace(layer_begin=begin, layer_end=end)


class Place(NamedTuple):
    """Where a rank's pages of one layer lie in chunk memory: page (block b, its head h) begins at
    ``offset + b * block_stride + h * page_bytes``."""

    offset: int
    block_stride: int


def slot_places(layout: ChunkLayout, stripe: Stripe) -> list[Place]:
    """The places of the layers of ``stripe`` in a whole chunk slot."""
    return [
        Place(
            layout.layer_offsets[layer] + stripe.head_begin * layout.page_bytes[layer],
            layout.num_heads * layout.page_bytes[layer],
        )
        for layer in range(stripe.layer_begin, stripe.layer_end)
    ]


def packed_places(layout: ChunkLayout, stripe: Stripe) -> list[Place]:
    """The places of the layers of ``stripe`` in memory that holds its bytes alone."""
    heads = stripe.head_end - stripe.head_begin
    pages = layout.page_bytes[stripe.layer_begin : stripe.layer_end]
    return [Place(o, heads * page) for o, page in zip(layout.packed_offsets(stripe), pages, strict=False)]


class Piece(NamedTuple):
    """Part of a transfer of several chunks: all its layers of some chunks, or some layers of one. Ends exclusive;
    layers count from the first of the stripe."""

    chunk_begin: int
    chunk_end: int
    layer_begin: int
    layer_end: int


def pieces(layer_bytes: Sequence[int], chunks: int, piece_bytes: int, layers: range | None = None) -> Iterator[Piece]:
    """Cuts ``layers`` (None: all) of ``chunks`` chunks into pieces of at most ``piece_bytes`` (but at least one layer),
    in prefix order.

    ``layer_bytes`` are the stripe's bytes per layer in one chunk.
    """
    layers = layers if layers is not None else range(len(layer_bytes))
    per_chunk = sum(layer_bytes[layers.start : layers.stop])
    if per_chunk <= piece_bytes:
        step = max(1, piece_bytes // max(1, per_chunk))
        for chunk in range(0, chunks, step):
            yield Piece(chunk, min(chunk + step, chunks), layers.start, layers.stop)
        return
    for chunk in range(chunks):
        begin, size = layers.start, 0
        for layer in layers:
            extra = layer_bytes[layer]
            if layer > begin and size + extra > piece_bytes:
                yield Piece(chunk, chunk + 1, begin, layer)
                begin, size = layer, 0
            size += extra
        yield Piece(chunk, chunk + 1, begin, layers.stop)


#: A load by layers is cut into so many bands at most: the first is there after that part of the time, and what the
#: engine computes while the others come is hidden but for that part of it. More only makes the single copies smaller.
MAX_BANDS = 16
#: A band has so many bytes at least: below that, beginning and ending it takes longer than the copy.
MIN_BAND_BYTES = 4 << 20


def bands(layers: int, total_bytes: int) -> list[range]:
    """The layers of a load of ``total_bytes`` as bands, first to last, for a load whose reader begins with the first
    layer before the last has come."""
    count = max(1, min(layers, MAX_BANDS, total_bytes // MIN_BAND_BYTES))
    return [range(i * layers // count, (i + 1) * layers // count) for i in range(count)]


class Run(NamedTuple):
    """``length`` consecutive block ids from ``block``, standing at ``position`` in the list."""

    position: int
    block: int
    length: int


def consecutive(blocks: Sequence[int]) -> list[Run]:
    """The list of block ids as runs of consecutive ids, so that neighbours move in one copy."""
    runs: list[Run] = []
    for position, block in enumerate(blocks):
        if runs and block == runs[-1].block + runs[-1].length:
            runs[-1] = runs[-1]._replace(length=runs[-1].length + 1)
        else:
            runs.append(Run(position, block, 1))
    return runs


def cut(span: Span, positions: Iterable[int]) -> list[Span]:
    """``span`` as spans of the same bytes in the same order, none of which crosses one of ``positions``."""
    parts = [span]
    for at in positions:
        parts = [half for part in parts for half in _split(part, at)]
    return parts


def _split(span: Span, at: int) -> list[Span]:
    """The runs before ``at``, the two halves of the run it falls into, the runs after it; what there is of them."""
    if not span.offset < at < span.end:
        return [span]
    offset, run, stride, count = span
    before, inside = divmod(at - offset, stride) if count > 1 else (0, at - offset)
    broken = 0 < inside < run
    if inside and not broken:
        before += 1  # between two runs
    at_run, after = offset + before * stride, count - before - broken
    parts = [
        Span(offset, run, stride, before),
        Span(at_run, inside, inside, int(broken)),
        Span(at, run - inside, run - inside, int(broken)),
        Span(at_run + broken * stride, run, stride, after),
    ]
    return [part for part in parts if part.count]
