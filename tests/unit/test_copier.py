"""Copiers: the contract for the CPU one, and for the CUDA one over a device made of host memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: no tensors to copy")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from kvd_client.copier import Copier, Form, make_copier  # noqa: E402
from kvd_client.copier_cupy import CupyCopier  # noqa: E402
from kvd_client.layout import ChunkLayout, LayoutError, Shard  # noqa: E402
from tests.gpu import copier_contract as contract  # noqa: E402
from tests.gpu.caches import Model, make_caches, naive_chunk  # noqa: E402
from tests.gpu.host_device import HostDevice  # noqa: E402

IMPLEMENTATIONS = ["torch", "cupy on host memory"]


def make(kind: str) -> contract.Make:
    """A factory of the implementation ``kind``; pieces are small so that transfers are cut in many ways."""
    if kind == "torch":
        return make_copier

    def cupy(caches: Mapping[str, torch.Tensor], layout: ChunkLayout, shard: Shard) -> Copier:
        return CupyCopier(
            caches, layout, shard, piece_bytes=700, max_inflight_bytes=contract.STAGING_BYTES, device=HostDevice()
        )

    return cupy


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_one_sharding_and_layout_wrote_any_other_reads(kind: str, data: st.DataObject) -> None:
    contract.check_what_one_sharding_wrote_another_reads(make(kind), data)


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_the_most_and_largest_chunks_have_room(kind: str) -> None:
    contract.check_the_most_and_largest_chunks_of_these_checks_have_room(make(kind))


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_a_load_whose_deadline_has_passed_says_so(kind: str) -> None:
    contract.check_deadline_that_has_passed_ends_a_load(make(kind))


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("blocks", "length"),
    [([0], None), ([0, 99], None), ([-1, 0], None), ([0, 1], 100)],
    ids=["too few blocks", "block out of range", "negative block", "short memory"],
)
def test_blocks_and_memory_that_do_not_fit_are_refused_before_any_copy(
    kind: str, blocks: list[int], length: int | None
) -> None:
    copier, caches = contract.one_rank(make(kind))
    everything = list(range(contract.BLOCKS))
    before = naive_chunk(contract.MODEL, caches, everything)
    memory = contract.slot(copier.chunk_bytes)
    untouched = bytes(memory)
    with pytest.raises(LayoutError):
        copier.start_store([blocks], [memory[:length]], Form.SLOT)
    with pytest.raises(LayoutError):
        copier.load([blocks], [memory[:length]], Form.SLOT, contract.soon())
    assert bytes(memory) == untouched
    assert naive_chunk(contract.MODEL, caches, everything) == before


def test_a_store_needs_writable_memory() -> None:
    copier, _ = contract.one_rank(make_copier)
    with pytest.raises(LayoutError, match="writable"):
        copier.start_store([[0, 1]], [contract.slot(copier.chunk_bytes).toreadonly()], Form.SLOT)


def test_cpu_stores_are_in_place_when_the_hook_returns() -> None:
    contract.check_stored_bytes_are_those_of_the_hook(make_copier)


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_a_copier_made_in_inference_mode_loads_from_another_thread(kind: str) -> None:
    with torch.inference_mode():
        copier, caches = contract.one_rank(make(kind))
    memory, answers = contract.slot(copier.chunk_bytes), []
    work = threading.Thread(target=lambda: answers.append(copier.load([[0, 1]], [memory], Form.SLOT, contract.soon())))
    work.start()
    work.join()
    assert answers == [True]
    assert naive_chunk(contract.MODEL, caches, [0, 1]) == bytes(memory[: copier.chunk_bytes])


def test_caches_that_do_not_fit_the_layout_are_named() -> None:
    model = contract.MODEL
    caches = make_caches(model, Shard(0, 3), "LBHNC", 4)
    with pytest.raises(LayoutError, match="2 KV caches given for 3 layers"):
        make_copier(dict(list(caches.items())[:2]), model.layout, Shard(0, 3))
    with pytest.raises(LayoutError, match="layer0: 4 heads, expected 2"):
        make_copier(caches, model.layout, Shard(0, 3, 0, 2))
    with pytest.raises(LayoutError, match="layer0: pages of 1024 bytes"):
        make_copier(caches, ChunkLayout((512, 512, 512), 4, 2), Shard(0, 3))
    with pytest.raises(LayoutError, match="no device"):
        make_copier({}, model.layout, Shard(0, 3))


def cupy_on_host(model: Model = contract.MODEL, *, slots: int = 4) -> tuple[CupyCopier, list[torch.Tensor], HostDevice]:
    """The CUDA copier over host memory with room for ``slots`` chunks."""
    device = HostDevice()

    def build(caches: Mapping[str, torch.Tensor], layout: ChunkLayout, shard: Shard) -> Copier:
        return CupyCopier(
            caches, layout, shard, piece_bytes=4096, max_inflight_bytes=slots * layout.chunk_bytes, device=device
        )

    copier, caches = contract.one_rank(build, model)
    assert isinstance(copier, CupyCopier)
    return copier, caches, device


def test_cuda_stores_take_the_pages_in_the_engines_order_not_later() -> None:
    copier, caches, device = cupy_on_host()
    before = naive_chunk(contract.MODEL, caches, [3, 7])
    memory = contract.slot(copier.chunk_bytes)
    noise = bytes(memory)
    pending = copier.start_store([[3, 7]], [memory], Form.SLOT)
    device.engine.add(lambda: [cache.zero_() for cache in caches])
    assert bytes(memory) == noise, "the hook itself moves nothing"
    assert pending is not None and pending.wait(contract.soon())
    device.engine.synchronize()
    assert bytes(memory[: copier.chunk_bytes]) == before


def test_a_full_ring_answers_none_and_has_room_again_after_the_wait() -> None:
    copier, _, _ = cupy_on_host(slots=3)
    memory = [contract.slot(copier.chunk_bytes) for _ in range(4)]
    assert copier.room() == 3
    assert copier.start_store([[0, 1]] * 4, memory, Form.SLOT) is None
    first = copier.start_store([[0, 1]] * 2, memory[:2], Form.SLOT)
    assert first is not None and copier.room() == 1
    assert copier.start_store([[2, 3]] * 2, memory[2:], Form.SLOT) is None
    assert first.wait(contract.soon()) and copier.room() == 3


def test_the_ring_wraps_and_stores_waited_for_out_of_order_keep_their_bytes() -> None:
    copier, caches, _ = cupy_on_host(slots=4)
    for turn in range(5):
        groups = [[[turn, 8]], [[1, 2], [4, 3]]]
        memory = [[contract.slot(copier.chunk_bytes) for _ in group] for group in groups]
        pending = [copier.start_store(g, m, Form.SLOT) for g, m in zip(groups, memory, strict=True)]
        assert all(p is not None and p.wait(contract.soon()) for p in reversed(pending))
        for group, slots in zip(groups, memory, strict=True):
            for blocks, slot in zip(group, slots, strict=True):
                assert bytes(slot[: copier.chunk_bytes]) == naive_chunk(contract.MODEL, caches, blocks)
        assert copier.room() == 4


def test_a_store_whose_gather_is_late_touches_nothing_and_gives_its_room_back_when_it_is_over() -> None:
    copier, _, device = cupy_on_host(slots=1)
    memory = contract.slot(copier.chunk_bytes)
    noise = bytes(memory)
    device.engine.stalled = True
    pending = copier.start_store([[0, 1]], [memory], Form.SLOT)
    assert pending is not None and not pending.wait(time.monotonic() + 0.01)
    assert copier.room() == 0, "the gather may still write to the staging slot"
    device.engine.stalled = False
    assert copier.room() == 1
    assert not pending.wait(contract.soon()) and bytes(memory) == noise


def test_a_load_waits_for_the_engines_mark_up_to_its_deadline() -> None:
    copier, caches, device = cupy_on_host()
    memory = contract.slot(copier.chunk_bytes)
    device.engine.add(lambda: [cache.zero_() for cache in caches])
    device.engine.stalled = True
    mark = copier.mark()
    assert not copier.load([[0, 1]], [memory], Form.SLOT, time.monotonic() + 0.01, mark)
    device.engine.stalled = False
    assert copier.load([[0, 1]], [memory], Form.SLOT, contract.soon(), mark)
    assert naive_chunk(contract.MODEL, caches, [0, 1]) == bytes(memory[: copier.chunk_bytes])


def test_no_single_device_copy_is_larger_than_a_piece_and_a_layer() -> None:
    copier, _, device = cupy_on_host()
    memory = contract.slot(copier.chunk_bytes)
    device.copies.clear()
    assert copier.load([[0, 1]], [memory], Form.SLOT, contract.soon())
    layer_bytes = copier.chunk_bytes // 3
    assert max(device.copies) <= max(4096, layer_bytes)


def test_a_device_that_refuses_leaves_nothing_under_way_and_no_room_lost() -> None:
    copier, _, device = cupy_on_host(slots=2)
    memory = contract.slot(copier.chunk_bytes)
    pending = copier.start_store([[0, 1]], [memory], Form.SLOT)
    device.refuse = True
    with pytest.raises(RuntimeError, match="refuses"):
        copier.start_store([[0, 1]], [memory], Form.SLOT)
    assert pending is not None and not pending.wait(contract.soon())
    with pytest.raises(RuntimeError, match="refuses"):
        copier.load([[0, 1]], [memory], Form.SLOT, contract.soon())
    assert not pending.wait(contract.soon()) and copier.room() == 2
    assert all(stream.finished == len(stream.work) for stream in device.streams)


def test_strided_stripes_move_as_rows_and_registered_memory_is_never_crossed() -> None:
    model, shard = contract.MODEL, Shard(0, 3, 1, 2)
    device = HostDevice()
    caches = make_caches(model, shard, "LBHNC", contract.BLOCKS)
    copier = CupyCopier(caches, model.layout, shard, device=device)
    copier._pinning._piece_bytes = 11000
    pool = contract.slot(3 * copier.chunk_bytes)
    copier.register(pool)
    copier.register(pool)
    slots = [pool[i * copier.chunk_bytes : (i + 1) * copier.chunk_bytes] for i in range(3)]
    pending = copier.start_store([[0, 1], [2, 3], [4, 5]], slots, Form.SLOT)
    assert pending is not None and pending.wait(contract.soon()) and device.rows_copied > 0
    assert copier.load([[6, 7]], slots[1:2], Form.SLOT, contract.soon())
    for cache in caches.values():
        bits = cache.view(torch.uint8)
        assert torch.equal(bits[[6, 7]], bits[[2, 3]])
    copier.unregister(pool)
    assert device.registered != {}, "the other user's still"
    copier.unregister(pool)
    assert device.registered == {}
    copier.close()
