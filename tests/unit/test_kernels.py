"""The CUDA kernels: compiled for real architectures without a device, and run on the host against a naive loop."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: no caches to copy")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from kvd_client import kernels  # noqa: E402
from kvd_client.layout import Shard  # noqa: E402
from kvd_client.memory import RankPages  # noqa: E402
from tests.gpu import twin  # noqa: E402
from tests.gpu.caches import PHYSICAL, make_caches, models, read_page, shardings  # noqa: E402

BLOCKS = 7


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_kernels_compile_for_the_architecture(arch: str) -> None:
    nvrtc = pytest.importorskip("cupy", reason="CuPy is not installed: no NVRTC to compile with").cuda.nvrtc
    assert int(arch) in nvrtc.getSupportedArchs()
    handle = nvrtc.createProgram(kernels.SOURCE, "kvd.cu", (), ())
    try:
        nvrtc.compileProgram(handle, (f"--gpu-architecture=sm_{arch}", *kernels.OPTIONS))
        cubin = nvrtc.getCUBIN(handle)
    finally:
        nvrtc.destroyProgram(handle)
    assert all(name.encode() + b"\0" in cubin for name in kernels.kernel_names())


@pytest.mark.parametrize("physical", PHYSICAL)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_gather_and_scatter_move_what_the_naive_loop_moves(physical: str, data: st.DataObject) -> None:
    model = data.draw(models(), label="model")
    layout = model.layout
    shard: Shard = data.draw(shardings(model).flatmap(st.sampled_from), label="rank")
    caches = make_caches(model, shard, physical, BLOCKS, skew=data.draw(st.integers(0, 9)))
    rank = RankPages(caches, layout, shard)
    stripe, heads = rank.load_stripe, rank.load_stripe.head_end - rank.load_stripe.head_begin
    layers = len(rank.caches)
    begin = data.draw(st.integers(0, layers - 1))
    end = data.draw(st.integers(begin + 1, layers))
    offsets = layout.packed_offsets(stripe)
    per_chunk = offsets[end] - offsets[begin]

    # A ring of slots, the batch somewhere in it, perhaps over its end; every width that the addresses allow.
    ring = data.draw(st.integers(1, 4))
    first, count = data.draw(st.integers(0, ring - 1)), data.draw(st.integers(1, ring))
    stride = -(-per_chunk // 16) * 16
    ids = torch.randint(0, BLOCKS, (ring, model.chunk_blocks), dtype=torch.int64)
    table = torch.tensor(kernels.layer_rows(rank.geometries, offsets), dtype=torch.int64)
    widest = kernels.vector_bytes(rank.geometries)
    width = data.draw(st.sampled_from([w for w in (1, 2, 4, 8, 16) if w <= widest]))
    staging = torch.zeros(ring * stride + 64, dtype=torch.uint8)
    base = -staging.data_ptr() % 16
    spread = data.draw(st.tuples(st.integers(1, 9), st.sampled_from([1, 3, 32])), label="blocks, threads")
    args = (
        *(table.data_ptr(), begin, end - begin, ids.data_ptr(), count, model.chunk_blocks, heads),
        *(staging.data_ptr() + base, stride, first, ring),
    )
    twin.run(kernels.kernel_name("gather", width), spread[0], args, threads=spread[1])

    used = [(first + chunk) % ring for chunk in range(count)]
    for slot in range(ring):
        pages = [
            read_page(cache, int(block), head)
            for cache in rank.caches[begin:end]
            for block in ids[slot]
            for head in range(heads)
        ]
        wanted = b"".join(pages) if slot in used else bytes(per_chunk)
        assert bytes(staging[base + slot * stride :][:per_chunk].numpy()) == wanted

    # Scatter into another cache gives back the same pages and touches nothing else.
    other = make_caches(model, shard, data.draw(st.sampled_from(PHYSICAL)), BLOCKS)
    before = {name: cache.clone() for name, cache in other.items()}
    goal = RankPages(other, layout, shard)
    table = torch.tensor(kernels.layer_rows(goal.geometries, offsets), dtype=torch.int64)
    width = data.draw(st.sampled_from([w for w in (1, 2, 4, 8, 16) if w <= kernels.vector_bytes(goal.geometries)]))
    ids = torch.tensor([[(3 * slot + i) % BLOCKS for i in range(model.chunk_blocks)] for slot in range(ring)])
    written = {int(block): (slot, i) for slot in used for i, block in enumerate(ids[slot])}
    if len(written) < len(used) * model.chunk_blocks:
        return  # one block twice in a batch has no defined winner
    args = (table.data_ptr(), begin, end - begin, ids.data_ptr(), *args[4:])
    twin.run(kernels.kernel_name("scatter", width), spread[0], args, threads=spread[1])
    for layer, (name, cache) in enumerate(other.items()):
        page_bytes = goal.geometries[layer].page_bytes
        for block in range(BLOCKS):
            for head in range(heads):
                wanted = read_page(before[name], block, head)
                if begin <= layer < end and block in written:
                    slot, position = written[block]
                    at = base + slot * stride + offsets[layer] - offsets[begin]
                    at += (position * heads + head) * page_bytes
                    wanted = bytes(staging[at : at + page_bytes].numpy())
                assert read_page(cache, block, head) == wanted
