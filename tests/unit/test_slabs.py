"""The slab allocator: slots of any size mix, none given twice, all room found again."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.memory.slabs import NodeFigures, Part, SlabAllocator, region_bytes_for

GRANULE = 4096
MIB = 1 << 20
GIB = 1 << 30


def test_regions_follow_the_size_of_the_pool() -> None:
    assert region_bytes_for(1 * GIB) == 4 * MIB
    assert region_bytes_for(512 * MIB) == 2 * MIB
    assert region_bytes_for(10 * GIB) == 40 * MIB
    assert region_bytes_for(4096 * GIB) == 1 * GIB
    assert region_bytes_for(64 * GRANULE) == 4 * GRANULE
    assert region_bytes_for(GRANULE) == GRANULE


def test_slot_is_the_chunk_rounded_up_to_the_granule() -> None:
    assert [SlabAllocator.slot_bytes(n) for n in (1, 4096, 4097)] == [4096, 4096, 8192]


def test_pool_without_room_for_one_slot_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller than one slot"):
        SlabAllocator(GRANULE - 1)


def test_every_byte_of_the_pool_can_be_given_out() -> None:
    slabs = SlabAllocator(64 * GRANULE)
    offsets = [slabs.allocate(GRANULE) for _ in range(64)]
    assert sorted(offset for offset in offsets if offset is not None) == [n * GRANULE for n in range(64)]
    assert slabs.allocate(GRANULE) is None
    assert (slabs.free_bytes, slabs.taken_bytes) == (0, slabs.total_bytes)
    assert slabs.audit() == []


def test_room_for_a_size_is_what_is_in_no_slab_and_its_own_free_slots() -> None:
    slabs = SlabAllocator(64 * GRANULE)  # regions of 4 granules
    first, _, _ = slabs.allocate(GRANULE), slabs.allocate(GRANULE), slabs.allocate(2 * GRANULE)
    assert first is not None
    assert [slabs.room_bytes(n * GRANULE) // GRANULE for n in (1, 2, 3)] == [56 + 2, 56 + 2, 56]
    slabs.free(first)
    assert slabs.room_bytes(GRANULE) == (56 + 3) * GRANULE
    slabs.claim(first, GRANULE)
    assert slabs.room_bytes(GRANULE) == (56 + 2) * GRANULE
    assert slabs.audit() == []


def test_empty_slab_gives_its_regions_back_at_once() -> None:
    slabs = SlabAllocator(64 * GRANULE)
    offsets = [slabs.allocate(3 * GRANULE) for _ in range(5)]
    assert list(slabs._classes) == [3 * GRANULE]
    for offset in offsets:
        assert offset is not None
        slabs.free(offset)
    assert (slabs.free_bytes, list(slabs._classes)) == (slabs.total_bytes, [])
    assert slabs.allocate(64 * GRANULE) == 0


def test_slab_takes_more_regions_when_one_would_waste_too_much() -> None:
    slabs = SlabAllocator(64 * GRANULE)  # regions of 4 granules
    first = slabs.allocate(3 * GRANULE)  # in one region 25 % would be lost; in two 25 %; in three none
    assert first is not None
    assert slabs.free_bytes == slabs.total_bytes - 3 * slabs.region_bytes


def test_slot_larger_than_a_region_gets_neighbouring_regions() -> None:
    slabs = SlabAllocator(64 * GRANULE)
    assert [slabs.allocate(31 * GRANULE) for _ in range(3)] == [0, 32 * GRANULE, None]
    assert slabs.audit() == []


@pytest.mark.parametrize("offset", [0, GRANULE, 100 * GRANULE, -GRANULE, 5])
def test_freeing_what_was_not_given_is_refused(offset: int) -> None:
    slabs = SlabAllocator(64 * GRANULE)
    taken = [slabs.allocate(GRANULE), slabs.allocate(GRANULE)]
    slabs.free(0)
    with pytest.raises(ValueError, match="offset"):
        slabs.free(offset if offset != GRANULE else 2 * GRANULE)
    assert taken == [0, GRANULE]
    assert slabs.audit() == []


def test_windows_are_the_places_of_a_slab_that_other_sizes_occupy() -> None:
    slabs = SlabAllocator(16 * GRANULE)  # 16 regions of a granule
    for _ in range(4):
        slabs.allocate(GRANULE)
    assert slabs.allocate(4 * GRANULE) == 4 * GRANULE
    for _ in range(8):
        slabs.allocate(GRANULE)
    windows = list(slabs.windows(4 * GRANULE))
    assert [window.slabs[0] // GRANULE for window in windows] == [0, 8, 12]
    assert {window.size_bytes for window in windows} == {4 * GRANULE}
    for slab in windows[0].slabs:
        for offset in list(slabs.used_slots(slab)):
            slabs.free(offset)
    assert slabs.allocate(4 * GRANULE) == 0
    assert slabs.audit() == []


def test_gaps_that_another_size_leaves_are_never_too_short_for_a_slab() -> None:
    slabs = SlabAllocator(64 * GRANULE)  # 16 regions of 4 granules
    size = 16 * GRANULE
    small = [slabs.allocate(4 * GRANULE) for _ in range(3)]
    while slabs.allocate(size) is not None:
        pass
    for offset in small:
        assert offset is not None
        slabs.free(offset)
    assert slabs.allocate(size) is not None
    assert slabs.free_bytes == 0


@given(
    granules=st.integers(1, 200),
    steps=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 1000)), max_size=200),
)
def test_slots_never_overlap_and_everything_comes_back(granules: int, steps: list[tuple[int, int]]) -> None:
    slabs = SlabAllocator(granules * GRANULE)
    taken: dict[int, int] = {}
    for size, choice in steps:
        if choice % 3 == 0 and taken:
            offset = sorted(taken)[choice % len(taken)]
            slabs.free(offset)
            del taken[offset]
        else:
            got = slabs.allocate(size * GRANULE)
            if got is None:
                continue
            assert got % GRANULE == 0
            assert got + size * GRANULE <= slabs.total_bytes
            assert all(got + size * GRANULE <= at or at + other <= got for at, other in taken.items())
            taken[got] = size * GRANULE
        assert slabs.audit() == []
        assert slabs.taken_bytes == sum(taken.values())
        by_slab = {slabs.slab_of(offset) for offset in taken}
        assert sorted(at for slab in by_slab for at in slabs.used_slots(slab)) == sorted(taken)
    for offset in taken:
        slabs.free(offset)
    assert slabs.free_bytes == slabs.total_bytes
    assert slabs.audit() == []


@given(
    granules=st.integers(1, 200),
    steps=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 1000)), max_size=120),
    order=st.randoms(use_true_random=False),
)
def test_an_allocator_is_rebuilt_from_the_slots_that_it_has_given_out(
    granules: int, steps: list[tuple[int, int]], order: random.Random
) -> None:
    slabs = SlabAllocator(granules * GRANULE)
    taken: dict[int, int] = {}
    for size, choice in steps:
        if choice % 3 == 0 and taken:
            slabs.free(offset := sorted(taken)[choice % len(taken)])
            del taken[offset]
        elif (got := slabs.allocate(size * GRANULE)) is not None:
            taken[got] = size * GRANULE
    claims = list(taken.items())
    order.shuffle(claims)
    rebuilt = SlabAllocator(granules * GRANULE)
    for offset, size in claims:
        rebuilt.claim(offset, size)
        assert rebuilt.audit() == []
        with pytest.raises(ValueError, match=str(offset)):
            rebuilt.claim(offset, size)
    assert (rebuilt.free_bytes, rebuilt.taken_bytes) == (slabs.free_bytes, slabs.taken_bytes)
    assert [(rebuilt.slab_of(at), slabs.slab_of(at)) for at in taken] == [(slabs.slab_of(at),) * 2 for at in taken]
    # It goes on as the other would: what is free is found, what is in use is not given again.
    for size, _ in steps:
        got, expected = rebuilt.allocate(size * GRANULE), slabs.allocate(size * GRANULE)
        assert (got is None) == (expected is None)
        assert got is None or all(got + size * GRANULE <= at or at + other <= got for at, other in taken.items())
        if got is not None:
            taken[got] = size * GRANULE
    assert rebuilt.audit() == []
    for offset in taken:
        rebuilt.free(offset)
    assert rebuilt.free_bytes == rebuilt.total_bytes


@given(
    granules=st.integers(1, 100),
    claims=st.lists(st.tuples(st.integers(-2, 110), st.integers(-1, 40)), max_size=60),
    odd=st.sampled_from([0, 0, 0, 1, 2048]),
)
def test_claims_that_cannot_be_change_nothing(granules: int, claims: list[tuple[int, int]], odd: int) -> None:
    slabs = SlabAllocator(granules * GRANULE)
    taken: dict[int, int] = {}
    for at, size in claims:
        offset, slot_bytes = at * GRANULE + odd, size * GRANULE
        before = (slabs.free_bytes, slabs.taken_bytes)
        try:
            slabs.claim(offset, slot_bytes)
        except ValueError:
            assert (slabs.free_bytes, slabs.taken_bytes) == before
        else:
            assert offset >= 0 and slot_bytes > 0 and offset + slot_bytes <= slabs.total_bytes
            assert all(offset + slot_bytes <= at or at + other <= offset for at, other in taken.items())
            taken[offset] = slot_bytes
        assert slabs.audit() == []
    assert slabs.taken_bytes == sum(taken.values())


@given(
    granules=st.integers(1, 200),
    sizes=st.lists(st.integers(1, 40), max_size=100),
    wanted=st.integers(1, 200),
)
def test_emptying_any_window_makes_the_room_it_promises(granules: int, sizes: list[int], wanted: int) -> None:
    slabs = SlabAllocator(granules * GRANULE)
    for size in sizes:
        slabs.allocate(size * GRANULE)
    wanted_bytes = wanted * GRANULE
    if wanted_bytes > slabs.total_bytes:
        assert slabs.allocate(wanted_bytes) is None
        return
    while (got := slabs.allocate(wanted_bytes)) is not None:
        assert got + wanted_bytes <= slabs.total_bytes
    windows = list(slabs.windows(wanted_bytes))
    if not windows:
        # Every place is taken by the size itself: whoever wants more of it evicts its own.
        assert wanted_bytes in slabs._classes
        return
    for offset in [at for slab in windows[-1].slabs for at in slabs.used_slots(slab)]:
        slabs.free(offset)
    assert slabs.allocate(wanted_bytes) is not None
    assert slabs.audit() == []


# ---------------------------------------------------------------- several memory nodes


def on_nodes(*sizes: int) -> SlabAllocator:
    """An allocator over nodes 0, 1, ... with so many granules each."""
    ends = [GRANULE * end for end in accumulate(sizes, initial=0)]
    parts = [Part(node, begin, end) for node, (begin, end) in enumerate(pairwise(ends))]
    return SlabAllocator(ends[-1], parts)


def given_out(slabs: SlabAllocator, size: int, near: int | None) -> list[int]:
    """The granules where all slots begin that can still be given, in the order in which they are."""
    found = []
    while (offset := slabs.allocate(size * GRANULE, near)) is not None:
        found.append(offset // GRANULE)
        assert slabs.audit() == []
    return found


@pytest.mark.parametrize("near", [0, 1])
def test_slots_are_near_as_long_as_there_is_room_and_then_anywhere(near: int) -> None:
    slabs = on_nodes(8, 8)
    found = given_out(slabs, 1, near)
    assert {granule // 8 for granule in found[:8]} == {near}
    assert sorted(found) == list(range(16))


def test_each_of_four_nodes_gets_what_is_asked_near_it() -> None:
    slabs = on_nodes(4, 4, 4, 4)
    for number in range(16):
        offset = slabs.allocate(GRANULE, near=number % 4)
        assert offset is not None and offset // GRANULE // 4 == number % 4
    assert slabs.nodes() == [NodeFigures(node, 4 * GRANULE, 4 * GRANULE) for node in range(4)]


def test_a_free_slot_near_is_taken_before_one_elsewhere_and_before_a_new_slab() -> None:
    slabs = on_nodes(64, 64)  # regions of 8 granules
    far, near = [slabs.allocate(GRANULE, node) for node in (0, 1)]
    free = slabs.free_bytes
    assert far is not None and near is not None
    assert slabs.slab_of(near) == 64 * GRANULE
    assert all(slabs.slab_of(slabs.allocate(GRANULE, 1) or 0) == slabs.slab_of(near) for _ in range(7))
    assert slabs.free_bytes == free
    assert slabs.slab_of(slabs.allocate(GRANULE, 1) or 0) == 72 * GRANULE  # a new one near, though node 0 has slots
    slabs.free(near)
    assert slabs.allocate(GRANULE, 0) != near
    assert slabs.allocate(GRANULE, 1) == near
    assert slabs.audit() == []


@pytest.mark.parametrize("near", [None, 7])
def test_who_is_near_no_node_leaves_room_on_each(near: int | None) -> None:
    slabs = on_nodes(16, 16)
    for size in (2, 3, 4, 5):
        slabs.allocate(size * GRANULE, near)
    free = [sum(1 for at in range(node * 8, node * 8 + 8) if slabs._regions[at] is None) for node in (0, 1)]
    assert min(free) > 0
    assert sorted(given_out(slabs, 1, near))[-1] >= 16


def test_a_slab_lies_across_a_border_only_when_nothing_else_is_left() -> None:
    slabs = on_nodes(8, 8)
    assert given_out(slabs, 5, 0) == [0, 10, 5]
    assert slabs.nodes()[0].used_bytes == 10 * GRANULE  # it counts where it begins
    for granule in (0, 5, 10):
        slabs.free(granule * GRANULE)
    assert (slabs.free_bytes, slabs.audit()) == (slabs.total_bytes, [])
    assert slabs.allocate(16 * GRANULE, 1) == 0


def test_a_part_that_was_full_is_found_again_when_it_has_room() -> None:
    slabs = on_nodes(8, 8)
    slots = [slabs.allocate(GRANULE, 0) for _ in range(8)]
    assert slabs.allocate(4 * GRANULE, 0) == 8 * GRANULE
    for slot in slots[:4]:
        assert slot is not None
        slabs.free(slot)
    assert slabs.allocate(4 * GRANULE, 0) == 0
    assert slabs.audit() == []


cuts = st.sets(st.integers(1, 15), min_size=1, max_size=3)


@given(
    granules=st.integers(1, 4),
    borders=cuts,
    steps=st.lists(
        st.tuples(st.integers(1, 12), st.integers(0, 1000), st.sampled_from([None, 0, 1, 2, 3])), max_size=150
    ),
    others=cuts,
)
def test_with_several_nodes_as_much_is_given_and_near_if_it_can_be(
    granules: int, borders: set[int], steps: list[tuple[int, int, int | None]], others: set[int]
) -> None:
    pool_bytes = 16 * granules * GRANULE  # sixteen regions
    parts = divided(granules, borders)
    slabs = SlabAllocator(pool_bytes, parts)
    taken: dict[int, int] = {}
    for size, choice, near in steps:
        if choice % 3 == 0 and taken:
            slabs.free(offset := sorted(taken)[choice % len(taken)])
            del taken[offset]
        else:
            slot_bytes = -(-size * granules // 2) * GRANULE
            near_there_is = any(part.node == near and room_in(slabs, part, slot_bytes) for part in parts)
            anywhere = room_in(slabs, Part(0, 0, pool_bytes), slot_bytes)
            got = slabs.allocate(slot_bytes, near)
            assert (got is not None) == anywhere
            if got is not None:
                taken[got] = slot_bytes
                at = slabs.slab_of(got)
                assert not near_there_is or any(part.node == near and part.begin <= at < part.end for part in parts)
        assert slabs.audit() == []
        assert sum(node.used_bytes for node in slabs.nodes()) == slabs.taken_bytes == sum(taken.values())
    # What was given out can be claimed by an allocator that is divided otherwise, or not at all.
    for rebuilt in (SlabAllocator(pool_bytes), SlabAllocator(pool_bytes, divided(granules, others))):
        for offset, slot_bytes in taken.items():
            rebuilt.claim(offset, slot_bytes)
        assert rebuilt.audit() == []
        assert (rebuilt.taken_bytes, rebuilt.free_bytes) == (slabs.taken_bytes, slabs.free_bytes)
    for offset in taken:
        slabs.free(offset)
    assert (slabs.free_bytes, slabs.audit()) == (slabs.total_bytes, [])


def divided(granules: int, borders: set[int]) -> list[Part]:
    """Sixteen regions of so many granules on nodes 0, 1, ...; a node ends at each border."""
    ends = [region * granules * GRANULE for region in (0, *sorted(borders), 16)]
    return [Part(node, begin, end) for node, (begin, end) in enumerate(pairwise(ends))]


def room_in(slabs: SlabAllocator, part: Part, slot_bytes: int) -> bool:
    """Whether a slab that begins in ``part`` has a free slot of this size, or one fits into it."""
    first, end = part.begin // slabs.region_bytes, part.end // slabs.region_bytes
    inside = {slab for slab in slabs._regions[first:end] if slab is not None}
    if any(s.slot_bytes == slot_bytes and s.taken < s.slots and s.offset >= part.begin for s in inside):
        return True
    regions, _ = slabs._shape(slot_bytes)
    starts = range(-(-first // regions) * regions, end - regions + 1, regions)
    return any(not any(slabs._regions[at : at + regions]) for at in starts)
