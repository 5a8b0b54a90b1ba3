"""Layout: spans, stripes, pieces and geometry against naive loops."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.wire.chunks import Stripe
from kvd.wire.spans import Span
from kvd_client.layout import (
    MAX_BANDS,
    MIN_BAND_BYTES,
    ChunkLayout,
    LayoutError,
    PageGeometry,
    Shard,
    bands,
    consecutive,
    cut,
    is_empty,
    packed_places,
    pieces,
    slot_places,
)

layouts = st.builds(
    ChunkLayout,
    page_bytes=st.lists(st.sampled_from([1, 6, 64]), min_size=1, max_size=6).map(tuple),
    num_heads=st.sampled_from([1, 2, 4, 8]),
    chunk_blocks=st.integers(1, 3),
)


def named_bytes(spans: list[Span]) -> list[int]:
    """The bytes of spans, in order."""
    return [byte for span in spans for at, length in span.runs() for byte in range(at, at + length)]


def stripe_bytes(layout: ChunkLayout, stripe: Stripe) -> list[int]:
    """The bytes of a stripe by counting through the chunk ``[layer][block][head][page]``."""
    found, at = [], 0
    for layer, page in enumerate(layout.page_bytes):
        for _, head in itertools.product(range(layout.chunk_blocks), range(layout.num_heads)):
            mine = stripe.layer_begin <= layer < stripe.layer_end and stripe.head_begin <= head < stripe.head_end
            found.extend(range(at, at + page) if mine else ())
            at += page
    assert at == layout.chunk_bytes
    return found


@st.composite
def stripes(draw: st.DrawFn) -> tuple[ChunkLayout, Stripe]:
    """A layout and any stripe of it, empty ones too."""
    layout = draw(layouts)
    layer_ends = sorted((draw(st.integers(0, layout.num_layers)), draw(st.integers(0, layout.num_layers))))
    head_ends = sorted((draw(st.integers(0, layout.num_heads)), draw(st.integers(0, layout.num_heads))))
    return layout, Stripe(*layer_ends, *head_ends)


@given(stripes())
def test_spans_name_exactly_the_bytes_of_the_stripe(given_stripe: tuple[ChunkLayout, Stripe]) -> None:
    layout, stripe = given_stripe
    spans = layout.spans(stripe)
    assert named_bytes(spans) == stripe_bytes(layout, stripe)
    assert layout.stripe_bytes(stripe) == sum(span.size for span in spans)
    assert all(span.fits(layout.chunk_bytes) for span in spans)
    assert is_empty(stripe) == (not spans)


@given(stripes())
def test_places_lead_to_the_same_bytes_as_spans(given_stripe: tuple[ChunkLayout, Stripe]) -> None:
    layout, stripe = given_stripe
    order = stripe_bytes(layout, stripe)
    slot, packed = slot_places(layout, stripe), packed_places(layout, stripe)
    for index, layer in enumerate(range(stripe.layer_begin, stripe.layer_end)):
        page = layout.page_bytes[layer]
        for block, head in itertools.product(range(layout.chunk_blocks), range(stripe.head_end - stripe.head_begin)):
            in_slot = slot[index].offset + block * slot[index].block_stride + head * page
            in_packed = packed[index].offset + block * packed[index].block_stride + head * page
            assert order[in_packed : in_packed + page] == list(range(in_slot, in_slot + page))


def test_a_stripe_of_all_heads_is_one_contiguous_span_whatever_its_pages() -> None:
    layout = ChunkLayout((64, 6, 64), num_heads=2, chunk_blocks=3)
    assert layout.spans(Stripe(0, 3, 0, 2)) == [Span(0, 804, 804, 1)]
    assert layout.spans(Stripe(1, 3, 0, 2)) == [Span(384, 420, 420, 1)]


def test_a_stripe_of_some_heads_is_one_span_per_run_of_equal_pages() -> None:
    layout = ChunkLayout((64, 64, 6), num_heads=4, chunk_blocks=3)
    assert layout.spans(Stripe(0, 3, 1, 3)) == [Span(64, 128, 256, 6), Span(1542, 12, 24, 3)]


@given(layouts, st.sampled_from([1, 2, 4, 8, 16]), st.data())
def test_ranks_together_store_every_byte_once_and_load_all_they_hold(
    layout: ChunkLayout, size: int, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, layout.num_layers))
    stages = [(a, b) for a, b in ((0, at), (at, layout.num_layers)) if a < b]
    stored: list[int] = []
    for (begin, end), rank in itertools.product(stages, range(size)):
        shard = Shard(begin, end, rank, size)
        store, load = shard.store_stripe(layout), shard.load_stripe(layout)
        stored.extend(stripe_bytes(layout, store))
        assert load[:2] == (begin, end) and load[2:] == store[2:]
        assert load.head_begin == rank * layout.num_heads // size
    assert sorted(stored) == list(range(layout.chunk_bytes))


def test_replicas_of_a_head_share_its_layers_out() -> None:
    mla = ChunkLayout((64,) * 5, num_heads=1, chunk_blocks=1)
    assert [Shard(0, 5, rank, 2).store_stripe(mla) for rank in range(2)] == [Stripe(0, 2, 0, 1), Stripe(2, 5, 0, 1)]
    assert {Shard(0, 5, rank, 2).load_stripe(mla) for rank in range(2)} == {Stripe(0, 5, 0, 1)}
    assert sum(is_empty(Shard(0, 5, rank, 8).store_stripe(mla)) for rank in range(8)) == 3


@pytest.mark.parametrize(
    ("heads", "shard"),
    [
        (3, Shard(0, 2, 0, 2)),
        (4, Shard(0, 2, 0, 6)),
        (4, Shard(0, 2, 2, 2)),
        (4, Shard(0, 3)),
        (4, Shard(1, 1)),
        (4, Shard(0, 2, 0, 0)),
    ],
)
def test_impossible_shardings_are_refused(heads: int, shard: Shard) -> None:
    with pytest.raises(LayoutError):
        shard.load_stripe(ChunkLayout((64, 64), heads, 1))


@pytest.mark.parametrize("numbers", [((), 1, 1), ((64, 0), 1, 1), ((64,), 0, 1), ((64,), 1, 0)])
def test_layouts_without_bytes_are_refused(numbers: tuple[tuple[int, ...], int, int]) -> None:
    with pytest.raises(LayoutError):
        ChunkLayout(*numbers)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 5), st.integers(1, 40), st.data())
def test_pieces_cover_every_layer_of_every_chunk_once_in_order(
    layer_bytes: list[int], chunks: int, piece_bytes: int, data: st.DataObject
) -> None:
    begin = data.draw(st.integers(0, len(layer_bytes) - 1))
    wanted = data.draw(st.sampled_from([None, range(begin, data.draw(st.integers(begin + 1, len(layer_bytes))))]))
    of_all = wanted if wanted is not None else range(len(layer_bytes))
    cells = []
    for piece in pieces(layer_bytes, chunks, piece_bytes, wanted):
        layers = range(piece.layer_begin, piece.layer_end)
        inside = list(itertools.product(range(piece.chunk_begin, piece.chunk_end), layers))
        assert sum(layer_bytes[layer] for _, layer in inside) <= piece_bytes or len(inside) == 1
        assert piece.chunk_end - piece.chunk_begin == 1 or layers == of_all
        cells.extend(inside)
    assert cells == list(itertools.product(range(chunks), of_all))


@given(st.integers(1, 100), st.integers(0, 100 * MIN_BAND_BYTES))
def test_bands_are_all_layers_in_order_few_and_not_small(layers: int, total_bytes: int) -> None:
    cut = bands(layers, total_bytes)
    assert [layer for band in cut for layer in band] == list(range(layers))
    assert len(cut) <= MAX_BANDS and all(cut)
    assert len(cut) == 1 or total_bytes / len(cut) >= MIN_BAND_BYTES
    assert max(map(len, cut)) - min(map(len, cut)) <= 1


@given(
    st.builds(
        lambda offset, run, gap, count: Span(offset, run, run + gap, count),
        st.integers(0, 20),
        st.integers(1, 9),
        st.integers(0, 5),
        st.integers(1, 6),
    ),
    st.lists(st.integers(0, 120)),
)
def test_a_cut_span_names_the_same_bytes_and_crosses_no_edge(span: Span, edges: list[int]) -> None:
    parts = cut(span, edges)
    assert named_bytes(parts) == named_bytes([span])
    assert all(part.fits(span.end) for part in parts)
    assert not any(part.offset < edge < part.end for part in parts for edge in edges)


@given(st.lists(st.integers(0, 12)))
def test_runs_of_consecutive_blocks_spell_the_list(blocks: list[int]) -> None:
    runs = consecutive(blocks)
    assert [run.block + i for run in runs for i in range(run.length)] == blocks
    assert [run.position + i for run in runs for i in range(run.length)] == list(range(len(blocks)))
    assert all(a.block + a.length != b.block for a, b in itertools.pairwise(runs))


@st.composite
def views(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Shape, strides and element size of a view with any order of axes and padding between them."""
    shape = draw(st.lists(st.integers(1, 4), min_size=4, max_size=5))
    strides, step = [0] * len(shape), 1
    for axis in [len(shape) - 1, *draw(st.permutations(range(len(shape) - 1)))]:
        strides[axis] = step
        step = step * shape[axis] + draw(st.sampled_from([0, 0, 0, 1, 2, 4]))
    strides[-1] = 1
    return shape, strides, draw(st.sampled_from([1, 2, 4]))


@given(views(), st.sampled_from([0, 1, 2, 8, 48, 64]))
def test_rows_and_alignment_hold_for_every_run_of_every_page(
    view: tuple[list[int], list[int], int], address: int
) -> None:
    shape, strides, element = view
    geometry = PageGeometry.from_view(address, shape, strides, element)
    if len(shape) == 4:
        shape, strides = [shape[0], 1, *shape[1:]], [strides[0], 0, *strides[1:]]
    run, inner, inner_stride, outer, outer_stride = geometry.rows
    assert geometry.page_bytes == run * inner * outer == shape[1] * shape[3] * shape[4] * element
    assert 16 % geometry.alignment == 0
    for block, head in itertools.product(range(shape[0]), range(shape[2])):
        page = address + block * geometry.block_stride + head * geometry.head_stride
        starts = [page + o * outer_stride + i * inner_stride for o in range(outer) for i in range(inner)]
        naive = [
            address + element * (block * strides[0] + k * strides[1] + head * strides[2] + n * strides[3] + c) + byte
            for k, n, c in itertools.product(range(shape[1]), range(shape[3]), range(shape[4]))
            for byte in range(element)
        ]
        assert [start + byte for start in starts for byte in range(run)] == naive
        assert all(number % geometry.alignment == 0 for number in (run, *starts))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 3, 4), (12, 4, 1)),
        ((2, 1, 4, 8), (32, 32, 8)),
        ((2, 1, 0, 8), (0, 0, 8, 1)),
        ((2, 1, 4, 8), (64, 64, 16, 2)),
        ((2, 1, 4, 8), (-32, 32, 8, 1)),
    ],
)
def test_views_that_are_no_pages_are_refused(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError):
        PageGeometry.from_view(0, shape, strides, 2)
