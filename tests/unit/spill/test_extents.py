"""The space on the disks against a naive model of it, and what each rule promises."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.ledger.terms import ExtentSpace
from kvd.spill.extents import Extents, extent_bytes_for, extents_in, index_bytes_in
from kvd.spill.record import HEADER_BYTES
from kvd.types import Place

PAGE = 4096
EXTENT = 16 * PAGE
#: What fits into an extent beside its header.
ROOM = EXTENT - HEADER_BYTES


def space(*extents: int) -> Extents:
    """Drives with so many extents each, new and empty."""
    made = Extents(len(extents))
    for number, count in enumerate(extents):
        made.attach(number, EXTENT, count, ())
    return made


def fill(made: Extents, payload_bytes: int) -> list[Place]:
    """Allocates until there is no room."""
    places = []
    while (place := made.allocate(payload_bytes)) is not None:
        places.append(place)
    return places


def test_it_is_what_the_books_ask_for() -> None:
    asked = [name for name in vars(ExtentSpace) if not name.startswith("_")]
    assert asked and [name for name in asked if not hasattr(Extents, name)] == []


def test_extents_are_a_sixteenth_of_the_drive_within_bounds() -> None:
    mib = 1 << 20
    assert extent_bytes_for(2 * mib) == mib
    assert extent_bytes_for(1 << 40) == 1024 * mib
    middle = extent_bytes_for(1024 * mib)
    assert 63 * mib < middle < 64 * mib and middle % PAGE == 0 and extents_in(1024 * mib, middle) == 16
    for size in (2 * mib, 40 * mib, 123_456_789, 1 << 34):
        assert extents_in(size, extent_bytes_for(size)) * extent_bytes_for(size) < size
    with pytest.raises(ValueError, match="smaller"):
        extent_bytes_for(mib)


@pytest.mark.parametrize("size", [2 << 20, 9 << 20, 40 << 20, 123_456_789, 1 << 34, 1 << 40])
def test_extents_and_their_indexes_leave_room_for_what_is_neither(size: int) -> None:
    extent_bytes = extent_bytes_for(size)
    extents, index_bytes = extents_in(size, extent_bytes), index_bytes_in(size, extent_bytes)
    assert extents * (extent_bytes + index_bytes) <= size - max(1 << 17, size // 512)
    assert index_bytes % PAGE == 0 and index_bytes > extent_bytes // 512 - PAGE


def test_records_of_a_life_follow_each_other_and_drives_take_turns() -> None:
    made = space(3, 3)
    places = [made.allocate(PAGE) for _ in range(6)]
    assert [place and place.drive for place in places] == [0, 1, 0, 1, 0, 1]
    assert [place and place.offset for place in places] == [PAGE, PAGE, 3 * PAGE, 3 * PAGE, 5 * PAGE, 5 * PAGE]
    sequences = [place.sequence for place in places if place]
    assert sequences == sorted(set(sequences))


def test_a_record_larger_than_an_extent_gets_no_place() -> None:
    made = space(3)
    assert made.allocate(ROOM - HEADER_BYTES) is not None
    assert made.allocate(ROOM - HEADER_BYTES + 1) is None and not made.fits(ROOM - HEADER_BYTES + 1)


def test_the_last_free_extent_of_a_drive_is_opened_for_moves_only() -> None:
    made = space(3)
    written = fill(made, PAGE)
    assert {place.extent for place in written} == {0, 1} and made.free_extents == 1
    moved = made.allocate(PAGE, moving=True)
    assert moved is not None and moved.extent == 2
    assert made.allocate(PAGE) is None  # the moves' extent is not filled up while none is kept
    for place in written:
        if place.extent == 0:
            made.release(place)
    assert made.free_extents == 1
    filled = made.allocate(PAGE)  # now it is
    assert filled is not None and filled.extent == 2
    assert made.audit() == []


def test_an_extent_can_be_emptied_into_the_one_that_is_kept_whatever_its_records_are() -> None:
    for seed in range(50):
        chosen = random.Random(seed)
        made = space(4)
        places = []
        while (place := made.allocate(chosen.randrange(1, 6 * PAGE))) is not None:
            places.append(place)
        for place in chosen.sample(places, len(places) // 2):
            made.release(place)
            places.remove(place)
        while made.free_extents == 1 and (victim := made.emptiest()) is not None:
            inside = [place for place in places if (place.drive, place.extent) == victim]
            chosen.shuffle(inside)
            for place in inside:
                target = made.allocate(place.record_bytes - HEADER_BYTES, moving=True)
                assert target is not None, f"seed {seed}"
                made.release(place)
                places.remove(place)
                places.append(target)
            if made.live_in(*victim) == 0 and made.free_extents <= 1:
                break
        assert made.audit() == []


def test_a_sealed_extent_without_a_live_record_is_free_at_once_and_gets_a_new_life() -> None:
    made = space(2)
    places = fill(made, ROOM - HEADER_BYTES)
    assert len(places) == 1 and made.emptiest() is None  # it is still open
    extra = made.allocate(ROOM - HEADER_BYTES, moving=True)
    assert extra is not None
    made.release(places[0])
    again = made.allocate(ROOM - HEADER_BYTES, moving=True)
    assert again is None or again.life > places[0].life
    made.release(extra)
    assert made.audit() == []


def test_lives_and_sequences_never_repeat() -> None:
    made = space(3)
    lives: dict[int, tuple[int, int]] = {}
    last = 0
    for _ in range(200):
        place = made.allocate(6 * PAGE)
        assert place is not None
        assert place.sequence > last
        last = place.sequence
        assert lives.setdefault(place.life, (place.drive, place.extent)) == (place.drive, place.extent)
        made.release(place)
    assert len(lives) > 50


def test_what_a_former_daemon_left_is_neither_free_nor_usable_until_it_is_scanned() -> None:
    made = Extents(1)
    made.attach(0, EXTENT, 4, [0, 1, 2, 99])
    assert made.free_extents == 1
    assert made.allocate(PAGE) is None and made.emptiest() is None
    made.adopt(Place(0, 1, PAGE, 2 * PAGE, 500))
    made.scanned(0, 0)
    made.scanned(0, 1)
    assert made.free_extents == 2 and made.live_in(0, 1) == 2 * PAGE == made.live_bytes
    assert made.emptiest() is None  # 2 may turn out to be free
    new = made.allocate(PAGE)
    assert new is not None and new.sequence > 500 and new.extent == 0  # one that has a file goes first
    made.scanned(0, 2)
    assert made.emptiest() == (0, 1)
    with pytest.raises(ValueError, match="not being scanned"):
        made.adopt(Place(0, 1, 3 * PAGE, 2 * PAGE, 501))
    assert made.audit() == []


def test_moves_go_on_in_an_extent_of_a_former_daemon_when_it_has_left_no_free_one() -> None:
    made = Extents(1)
    made.attach(0, EXTENT, 3, [0, 1, 2])
    for extent, life, records in ((0, 7, 1), (1, 8, 3), (2, 9, 2)):
        for number in range(records):
            made.adopt(Place(0, extent, PAGE + number * 2 * PAGE, 2 * PAGE, 100 * life + number, life))
        made.scanned(0, extent)
    assert made.free_extents == 0 and made.allocate(PAGE) is None and made.emptiest() == (0, 0)
    place = made.allocate(PAGE, moving=True)
    assert place is not None and (place.extent, place.offset, place.life) == (2, 5 * PAGE, 9)
    made.release(Place(0, 0, PAGE, 2 * PAGE, 700, 7))  # moved
    assert made.free_extents == 1 and made.audit() == []


def test_a_drive_that_does_not_work_gets_nothing_and_keeps_what_it_has() -> None:
    made = space(3, 3)
    assert made.total_bytes == 6 * ROOM
    first = made.allocate(PAGE)
    assert first is not None and first.drive == 0
    made.set_working(0, False)
    assert not made.works(0) and made.total_bytes == 3 * ROOM and made.live_bytes == 2 * PAGE
    assert {place.drive for place in fill(made, PAGE)} == {1}
    made.release(first)
    made.set_working(0, True)
    assert made.total_bytes == 6 * ROOM
    again = made.allocate(PAGE)
    assert again is not None and again.drive == 0 and made.audit() == []


def test_no_more_extents_are_opened_than_the_file_system_has_room_for() -> None:
    made = space(6)
    assert made.set_available(0, 3) == []
    assert made.total_bytes == 3 * ROOM
    places = fill(made, PAGE)
    assert {place.extent for place in places} == {0, 1}
    for place in places:
        if place.extent == 0:
            made.release(place)
    spares = made.set_available(0, 1)
    assert [spare.extent for spare in spares] == [0] and spares[0].life == places[0].life
    assert made.free_extents == 0 and made.allocate(PAGE) is None and made.allocate(PAGE, moving=True) is None
    made.removed(0, [0])
    assert made.set_available(0, 6) == []
    opened = made.allocate(PAGE)
    assert opened is not None and made.audit() == []


def test_nothing_is_placed_in_an_extent_whose_file_is_gone() -> None:
    made = space(4)
    first = made.allocate(PAGE)
    assert first is not None
    made.removed(0, [first.extent])
    second = made.allocate(PAGE)
    assert second is not None and second.extent != first.extent
    made.release(first)
    assert made.audit() == [] and made.free_extents == 3


def test_a_record_that_is_released_twice_is_an_error() -> None:
    made = space(2)
    place = made.allocate(PAGE)
    assert place is not None
    made.release(place)
    with pytest.raises(ValueError, match="nothing lives"):
        made.release(place)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "move", "release", "release", "work", "room", "remove"]),
        st.integers(0, 1 << 30),
    ),
    max_size=150,
)


@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=3), steps=STEPS)
def test_no_two_records_overlap_and_every_byte_is_accounted_for(
    counts: list[int], steps: list[tuple[str, int]]
) -> None:
    made = space(*counts)
    live: list[Place] = []
    ends: dict[tuple[int, int, int], int] = {}  # of each life: where the next record must begin
    occupant: dict[tuple[int, int], int] = {}  # the life that an extent has now
    last_sequence = 0
    for what, number in steps:
        if what in ("write", "move"):
            place = made.allocate(number % (ROOM - HEADER_BYTES) + 1, moving=what == "move")
            if place is None:
                continue
            spot = (place.drive, place.extent)
            if occupant.get(spot) != place.life:
                assert not any((other.drive, other.extent) == spot for other in live), "opened while something lives"
                occupant[spot] = place.life
            assert place.offset == ends.get((*spot, place.life), HEADER_BYTES)
            ends[(*spot, place.life)] = place.offset + place.record_bytes
            assert place.offset + place.record_bytes <= EXTENT and place.sequence > last_sequence
            last_sequence = place.sequence
            live.append(place)
        elif what == "release" and live:
            made.release(live.pop(number % len(live)))
        elif what == "work":
            made.set_working(number % len(counts), bool(number & 8))
        elif what == "room":
            made.set_available(number % len(counts), number // 8 % 6)
        elif what == "remove":
            drive, extent = number % len(counts), number // 8 % counts[number % len(counts)]
            made.removed(drive, [extent])
            gone = [place for place in live if (place.drive, place.extent) == (drive, extent)]
            for place in gone:
                made.release(place)
                live.remove(place)
        assert made.audit() == []
        assert made.live_bytes == sum(place.record_bytes for place in live)
        for drive in range(len(counts)):
            use = made.use(drive)
            assert use.live_bytes + use.dead_bytes + use.free_bytes == use.capacity_bytes and use.dead_bytes >= 0
            for extent in range(counts[drive]):
                inside = [place for place in live if (place.drive, place.extent) == (drive, extent)]
                assert made.live_in(drive, extent) == sum(place.record_bytes for place in inside)
