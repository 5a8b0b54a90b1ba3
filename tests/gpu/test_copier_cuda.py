"""The copier on a real CUDA device: the contract that the CPU copier takes too, and what only a device can show."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
pytest.importorskip("cupy", reason="CuPy is not installed")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from kvd_client.copier import Copier, Form  # noqa: E402
from kvd_client.copier_cupy import CupyCopier  # noqa: E402
from kvd_client.layout import ChunkLayout, Shard  # noqa: E402
from kvd_client.memory import address_of  # noqa: E402
from tests.gpu import copier_contract as contract  # noqa: E402
from tests.gpu.caches import Model, naive_chunk  # noqa: E402
from tests.wait import wait_until  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

#: 4 MiB a chunk.
LARGE = Model(heads=8, sub_blocks=1, tokens=16, widths=(256,) * 8, element_bytes=2, chunk_blocks=8)


def make(caches: Mapping[str, torch.Tensor], layout: ChunkLayout, shard: Shard) -> Copier:
    """Small pieces, so that transfers are cut in many ways."""
    return CupyCopier(caches, layout, shard, piece_bytes=700, max_inflight_bytes=contract.STAGING_BYTES)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_one_sharding_and_layout_wrote_any_other_reads(data: st.DataObject) -> None:
    contract.check_what_one_sharding_wrote_another_reads(make, data, "cuda")


def test_the_most_and_largest_chunks_have_room() -> None:
    contract.check_the_most_and_largest_chunks_of_these_checks_have_room(make, "cuda")


def test_a_load_whose_deadline_has_passed_says_so() -> None:
    contract.check_deadline_that_has_passed_ends_a_load(make, "cuda")


def test_stored_bytes_are_those_of_the_hook() -> None:
    contract.check_stored_bytes_are_those_of_the_hook(make, "cuda")


def large(max_inflight_bytes: int = 1 << 30) -> tuple[Copier, list[torch.Tensor]]:
    """A copier over a cache of LARGE chunks, with the default pieces."""

    def build(caches: Mapping[str, torch.Tensor], layout: ChunkLayout, shard: Shard) -> Copier:
        return CupyCopier(caches, layout, shard, max_inflight_bytes=max_inflight_bytes)

    return contract.one_rank(build, LARGE, "cuda")


def test_large_chunks_move_through_registered_and_unregistered_memory_alike() -> None:
    copier, caches = large()
    count = 4
    pool = contract.slot(count * copier.chunk_bytes)
    slots = [pool[i * copier.chunk_bytes : (i + 1) * copier.chunk_bytes] for i in range(count)]
    chunks = [list(range(8)), [8, 1, 0, 2, 3, 7, 6, 5], [0] * 8, list(range(8, 0, -1))]
    wanted = [naive_chunk(LARGE, caches, blocks) for blocks in chunks]
    for registered in (False, True):
        if registered:
            copier.register(pool)
            wait_until(lambda: any(area.done for area in copier._pinning._areas.values()), what="registration")
        ctypes.memset(address_of(pool), 0, pool.nbytes)
        pending = copier.start_store(chunks, slots, Form.SLOT)
        assert pending is not None and pending.wait(contract.soon())
        assert [bytes(slot) for slot in slots] == wanted
        assert copier.load(chunks[:1], slots[1:2], Form.SLOT, contract.soon(), copier.mark())
        assert naive_chunk(LARGE, caches, chunks[0]) == wanted[1]
        assert copier.load(chunks[:1], slots[:1], Form.SLOT, contract.soon(), copier.mark())
    copier.unregister(pool)
    copier.close()


def test_the_hook_returns_while_the_engine_is_still_computing() -> None:
    copier, caches = large()
    memory = contract.slot(copier.chunk_bytes)
    before = naive_chunk(LARGE, caches, list(range(8)))
    torch.cuda._sleep(1_000_000_000)
    computing = torch.cuda.Event()
    computing.record()
    pending = copier.start_store([list(range(8))], [memory], Form.SLOT)
    assert not computing.query(), "start_store waited for the engine"
    for cache in caches:
        cache.zero_()
    assert pending is not None and not pending.wait(time.monotonic())
    torch.cuda.synchronize()
    for cache in caches:
        assert not cache.view(torch.uint8).any()
    assert copier.load([list(range(8))], [memoryview(bytearray(before))], Form.SLOT, contract.soon(), copier.mark())
    assert naive_chunk(LARGE, caches, list(range(8))) == before
    copier.close()


def test_a_full_ring_answers_none() -> None:
    copier, _ = large(max_inflight_bytes=LARGE.layout.chunk_bytes)
    memory = contract.slot(copier.chunk_bytes)
    pending = copier.start_store([list(range(8))], [memory], Form.SLOT)
    assert copier.start_store([list(range(8))], [memory], Form.SLOT) is None
    assert pending is not None and pending.wait(contract.soon()) and copier.room() == 1
    copier.close()
