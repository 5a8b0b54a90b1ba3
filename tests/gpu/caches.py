"""KV caches of every physical layout, and the pages that belong in them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from kvd_client.layout import ChunkLayout, Shard

#: The six physical orders of layers, blocks, heads, tokens and C that vLLM knows.
PHYSICAL = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
_DTYPES = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True)
class Model:
    """A model's cache: layers may differ in C (``widths``, elements)."""

    heads: int
    sub_blocks: int
    tokens: int
    widths: tuple[int, ...]
    element_bytes: int
    chunk_blocks: int

    @property
    def layout(self) -> ChunkLayout:
        pages = tuple(self.sub_blocks * self.tokens * width * self.element_bytes for width in self.widths)
        return ChunkLayout(pages, self.heads, self.chunk_blocks)


#: No chunk of ``models`` is larger.
LARGEST = Model(heads=4, sub_blocks=2, tokens=16, widths=(64,) * 5, element_bytes=4, chunk_blocks=4)


def models() -> st.SearchStrategy[Model]:
    """Small models of all kinds, none larger than LARGEST; one head is MLA."""
    width = st.sampled_from([1, 3, 4, 8, 20, 64])
    widths = st.one_of(
        st.tuples(width, st.integers(1, 5)).map(lambda of: (of[0],) * of[1]),
        st.lists(width, min_size=1, max_size=4).map(tuple),
    )
    return st.builds(
        Model,
        heads=st.sampled_from([1, 2, 4]),
        sub_blocks=st.sampled_from([1, 1, 2]),
        tokens=st.sampled_from([1, 2, 5, 16]),
        widths=widths,
        element_bytes=st.sampled_from([1, 2, 4]),
        chunk_blocks=st.integers(1, 4),
    )


def shardings(model: Model) -> st.SearchStrategy[list[Shard]]:
    """All ranks of one engine that runs ``model``: tensor parallel size, one or two pipeline stages."""
    sizes = [t for t in (1, 2, 4, 8) if model.heads % t == 0 or t % model.heads == 0]
    layers = len(model.widths)
    cuts = st.sampled_from([[0, layers]] if layers == 1 else [[0, layers], [0, 1, layers], [0, layers - 1, layers]])
    return st.builds(
        lambda size, cut: [
            Shard(begin, end, rank, size) for begin, end in itertools.pairwise(sorted(set(cut))) for rank in range(size)
        ],
        st.sampled_from(sizes),
        cuts,
    )


def make_caches(
    model: Model,
    shard: Shard,
    physical: str,
    blocks: int,
    *,
    device: str = "cpu",
    skew: int = 0,
    shared: bool = True,
) -> dict[str, torch.Tensor]:
    """A rank's caches filled with noise, ``skew`` elements into their storage.

    Equal layers lie together in the order ``physical``, unequal ones behind one another; all of them in one storage,
    or each such group in its own unless ``shared``.
    """
    stripe = shard.load_stripe(model.layout)
    widths = model.widths[shard.layer_begin : shard.layer_end]
    heads = stripe.head_end - stripe.head_begin
    groups = [widths] if len(set(widths)) == 1 and shared else [(width,) for width in widths]
    order = physical.replace("B", "BK")
    shapes = [
        {"L": len(group), "B": blocks, "K": model.sub_blocks, "H": heads, "N": model.tokens, "C": group[0]}
        for group in groups
    ]
    counts = [math.prod(shape.values()) for shape in shapes]
    storages = (
        [noise(skew + sum(counts), model, device)] if shared else [noise(skew + n, model, device) for n in counts]
    )
    caches: dict[str, torch.Tensor] = {}
    at = skew
    for number, (shape, count) in enumerate(zip(shapes, counts, strict=True)):
        storage = storages[0 if shared else number]
        whole = storage[at : at + count].view([shape[axis] for axis in order])
        at += count if shared else 0
        for layer in whole.permute([order.index(axis) for axis in "LBKHNC"]):
            caches[f"layer{len(caches)}"] = layer if model.sub_blocks > 1 else layer[:, 0]
    return caches


def noise(count: int, model: Model, device: str) -> torch.Tensor:
    """Elements of any bit pattern."""
    bits = torch.randint(0, 256, (count * model.element_bytes,), dtype=torch.uint8)
    return bits.view(_DTYPES[model.element_bytes]).to(device)


def read_page(cache: torch.Tensor, block: int, head: int) -> bytes:
    """The page as a chunk holds it: tokens in order."""
    page = cache[block, :, head] if cache.dim() == 5 else cache[block, head]
    return bytes(page.contiguous().flatten().view(torch.uint8).cpu().numpy())


def write_page(cache: torch.Tensor, block: int, head: int, page: bytes) -> None:
    """Puts a page where the engine would have it."""
    view = cache[block, :, head] if cache.dim() == 5 else cache[block, head]
    bits = torch.frombuffer(bytearray(page), dtype=torch.uint8).view(cache.dtype)
    view.copy_(bits.view(view.shape).to(cache.device))


def naive_chunk(model: Model, caches: Sequence[torch.Tensor], blocks: Sequence[int]) -> bytes:
    """The chunk of an engine that holds the whole model, page by page."""
    return b"".join(
        read_page(cache, block, head) for cache in caches for block in blocks for head in range(model.heads)
    )
