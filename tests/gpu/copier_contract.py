"""What every copier promises, as checks that each implementation's tests call."""

from __future__ import annotations

import mmap
import random
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from hypothesis import strategies as st

from kvd.wire.spans import Span
from kvd_client.copier import Copier, Form
from kvd_client.layout import ChunkLayout, Shard
from tests.gpu.caches import (
    LARGEST,
    PHYSICAL,
    Model,
    make_caches,
    models,
    naive_chunk,
    read_page,
    shardings,
    write_page,
)

Make = Callable[[Mapping[str, torch.Tensor], ChunkLayout, Shard], Copier]

BLOCKS = 9
#: Chunks of one transfer, and the staging memory in which a store of so many has room whatever the model.
MOST_CHUNKS = 3
STAGING_BYTES = MOST_CHUNKS * LARGEST.layout.chunk_bytes


def soon() -> float:
    """A deadline that a working copier keeps."""
    return time.monotonic() + 30


def slot(size_bytes: int) -> memoryview:
    """Mapped memory like a pool's, slightly larger than a chunk, full of noise."""
    memory = memoryview(mmap.mmap(-1, size_bytes + 4096))
    memory[:] = random.Random(size_bytes).randbytes(len(memory))
    return memory


def pack(chunk: bytes, spans: Sequence[Span]) -> bytearray:
    """The payload that the TCP path carries for ``spans``."""
    return bytearray(b"".join(chunk[at : at + length] for span in spans for at, length in span.runs()))


def unpack(chunk: memoryview, spans: Sequence[Span], payload: bytes) -> None:
    """Puts a payload into a slot, as the daemon does."""
    done = 0
    for span in spans:
        for at, length in span.runs():
            chunk[at : at + length] = payload[done : done + length]
            done += length
    assert done == len(payload)


def check_what_one_sharding_wrote_another_reads(make: Make, data: st.DataObject, device: str = "cpu") -> None:
    """Pages stored by any sharding and physical layout make the chunk of the naive loop, and load into any other."""
    model = data.draw(models(), label="model")
    layout = model.layout
    count = data.draw(st.integers(1, MOST_CHUNKS), label="chunks")
    shuffled = st.permutations(range(BLOCKS * 2)).map(lambda ids: list(ids))
    blocks_of = [data.draw(shuffled) for _ in range(2)]
    chunks_of = [
        [ids[i * model.chunk_blocks : (i + 1) * model.chunk_blocks] for i in range(count)] for ids in blocks_of
    ]
    whole = list(make_caches(model, Shard(0, layout.num_layers), "LBHNC", BLOCKS * 2).values())
    truth = [naive_chunk(model, whole, chunk) for chunk in chunks_of[0]]

    # The writer: every rank's cache holds its part of the pages.
    slots = [slot(layout.chunk_bytes) for _ in range(count)]
    guards = [bytes(memory[layout.chunk_bytes :]) for memory in slots]
    physical, form = data.draw(st.sampled_from(PHYSICAL)), data.draw(st.sampled_from(Form))
    skew, shared = data.draw(st.integers(0, 3)), data.draw(st.booleans())
    for shard in data.draw(shardings(model), label="writers"):
        caches = make_caches(model, shard, physical, BLOCKS * 2, device=device, skew=skew, shared=shared)
        stripe = shard.load_stripe(layout)
        for layer, cache in enumerate(caches.values(), shard.layer_begin):
            for block in (block for chunk in chunks_of[0] for block in chunk):
                for head in range(stripe.head_begin, stripe.head_end):
                    write_page(cache, block, head - stripe.head_begin, read_page(whole[layer], block, head))
        copier = make(caches, layout, shard)
        assert copier.chunk_bytes == layout.chunk_bytes
        targets = slots if form is Form.SLOT else [memoryview(bytearray(copier.store_bytes)) for _ in slots]
        pending = copier.start_store(chunks_of[0], targets, form)
        assert pending is not None and pending.wait(soon()) and pending.wait(soon())
        if form is Form.PACKED:
            for memory, payload in zip(slots, targets, strict=True):
                unpack(memory, copier.store_spans, bytes(payload))
        copier.close()
    assert [bytes(memory[: layout.chunk_bytes]) for memory in slots] == truth
    assert [bytes(memory[layout.chunk_bytes :]) for memory in slots] == guards

    # The reader: other blocks, another sharding, another physical layout; blocks not asked for stay as they are.
    physical, form = data.draw(st.sampled_from(PHYSICAL)), data.draw(st.sampled_from(Form))
    for shard in data.draw(shardings(model), label="readers"):
        caches = make_caches(model, shard, physical, BLOCKS * 2, device=device, skew=skew, shared=shared)
        before = [cache.clone() for cache in caches.values()]
        stripe = shard.load_stripe(layout)
        copier = make(caches, layout, shard)
        layers = range(copier.load_layers)
        cut = data.draw(st.integers(0, copier.load_layers - 1), label="begin with layer")
        # All at once, or in two loads, the last layers first.
        for part in [None] if cut == 0 else [layers[cut:], layers[:cut]]:
            sources = [memory.toreadonly() for memory in slots]
            if form is Form.PACKED:
                sources = [memoryview(pack(chunk, copier.load_spans(part or layers))) for chunk in truth]
            assert copier.load(chunks_of[1], sources, form, soon(), copier.mark(), part)
        copier.close()
        flat = [[block for chunk in chunks for block in chunk] for chunks in chunks_of]
        wanted = dict(zip(flat[1], flat[0], strict=True))
        for layer, cache in enumerate(caches.values()):
            for block in range(BLOCKS * 2):
                for head in range(stripe.head_end - stripe.head_begin):
                    page = read_page(cache, block, head)
                    if block in wanted:
                        origin = whole[shard.layer_begin + layer]
                        assert page == read_page(origin, wanted[block], stripe.head_begin + head)
                    else:
                        assert page == read_page(before[layer], block, head)


MODEL = Model(heads=4, sub_blocks=1, tokens=16, widths=(32, 32, 32), element_bytes=2, chunk_blocks=2)


def one_rank(make: Make, model: Model = MODEL, device: str = "cpu") -> tuple[Copier, list[torch.Tensor]]:
    """A copier over a cache that holds the whole of ``model``."""
    shard = Shard(0, len(model.widths))
    caches = make_caches(model, shard, "LBNHC", BLOCKS, device=device)
    return make(caches, model.layout, shard), list(caches.values())


def check_deadline_that_has_passed_ends_a_load(make: Make, device: str = "cpu") -> None:
    """A load after its deadline answers False and leaves the copier usable."""
    copier, caches = one_rank(make, device=device)
    memory = slot(copier.chunk_bytes)
    assert not copier.load([[0, 1]], [memory], Form.SLOT, time.monotonic() - 1)
    assert copier.load([[0, 1]], [memory], Form.SLOT, soon())
    assert naive_chunk(MODEL, caches, [0, 1]) == bytes(memory[: copier.chunk_bytes])
    copier.close()


def check_the_most_and_largest_chunks_of_these_checks_have_room(make: Make, device: str = "cpu") -> None:
    """The largest transfer that the check of shardings may draw, which it draws once in many thousand examples."""
    copier, caches = one_rank(make, LARGEST, device)
    chunks = [[i, i + 2, i + 1, i + 3] for i in range(MOST_CHUNKS)]
    before = [naive_chunk(LARGEST, caches, blocks) for blocks in chunks]
    slots = [slot(copier.chunk_bytes) for _ in chunks]
    pending = copier.start_store(chunks, slots, Form.SLOT)
    assert pending is not None and pending.wait(soon())
    assert [bytes(memory[: copier.chunk_bytes]) for memory in slots] == before
    for cache in caches:
        cache.zero_()
    assert copier.load(chunks, slots, Form.SLOT, soon(), copier.mark())
    assert naive_chunk(LARGEST, caches, chunks[-1]) == before[-1]
    copier.close()


def check_stored_bytes_are_those_of_the_hook(make: Make, device: str = "cpu") -> None:
    """Pages overwritten after start_store returned are stored as they were before."""
    copier, caches = one_rank(make, device=device)
    before = naive_chunk(MODEL, caches, [3, 7])
    memory = slot(copier.chunk_bytes)
    pending = copier.start_store([[3, 7]], [memory], Form.SLOT)
    for cache in caches:
        cache.zero_()
    assert pending is not None and pending.wait(soon())
    assert bytes(memory[: copier.chunk_bytes]) == before
    copier.close()
