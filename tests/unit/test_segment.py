"""The pool's memory and its generation table."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from kvd.memory import backing, syscalls
from kvd.memory import segment as module
from kvd.memory.backing import anonymous_backing
from kvd.memory.generations import GenerationTable
from kvd.memory.segment import Segment
from kvd.types import Location
from kvd.wire import lifeline

MIB = 1 << 20


def make(size: int, *, daemon_id: int = 1, huge_pages: bool = False) -> Segment:
    memory = anonymous_backing(size, huge_pages=huge_pages)
    return Segment(memory, GenerationTable.anonymous(memory.size, daemon_id))


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = make(4 * MIB, daemon_id=77)
    yield segment
    segment.close()


def read_table(segment: Segment) -> bytes:
    return os.pread(segment.table_fd, segment.info.table_bytes, 0)


def word(segment: Segment, offset: int) -> int:
    at = lifeline.TABLE_HEADER_BYTES + offset // lifeline.GRANULE_BYTES * lifeline.WORD_BYTES
    return int.from_bytes(read_table(segment)[at : at + lifeline.WORD_BYTES], "little")


def test_the_table_says_what_it_belongs_to(segment: Segment) -> None:
    header = lifeline.TABLE_HEADER.unpack_from(read_table(segment))
    assert header == (lifeline.TABLE_MAGIC, 4096, 0, 4 * MIB // 4096, 77)
    assert segment.info.table_bytes == 64 + 8 * (4 * MIB // 4096)


def test_a_published_generation_is_seen_through_the_descriptor_until_it_is_retracted(segment: Segment) -> None:
    slot = Location(0, 3 * 4096, (1 << 63) + 5)
    last = Location(0, 4 * MIB - 4096, 9)
    segment.publish(slot)
    segment.publish(last)
    assert word(segment, slot.offset) == slot.generation == segment.word(0, slot.offset)
    assert word(segment, last.offset) == 9
    assert word(segment, 0) == 0
    segment.retract(slot)
    assert word(segment, slot.offset) == 0
    assert word(segment, last.offset) == 9


def test_whoever_has_the_table_cannot_write_it(segment: Segment) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(segment.table_fd, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(segment.table_fd, 4096)
    # Not even by opening it anew, whatever the user may otherwise do.
    again = os.open(f"/proc/self/fd/{segment.table_fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            os.pwrite(again, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(again, 4096)
    finally:
        os.close(again)


def test_whoever_has_the_data_can_write_it_but_not_cut_it_short(segment: Segment) -> None:
    with mmap.mmap(segment.data_fd, segment.size) as other:
        other[8192:8195] = b"kvd"
        assert bytes(segment.data[8192:8195]) == b"kvd"
        assert ctypes.string_at(segment.address + 8192, 3) == b"kvd"
    with pytest.raises(PermissionError):
        os.ftruncate(segment.data_fd, 4096)


def test_memory_is_taken_when_it_is_populated_and_its_bytes_are_kept(segment: Segment) -> None:
    assert segment.populated_bytes == 0
    segment.data[0:3] = b"abc"
    assert segment.populated_bytes == 4096
    done: list[int] = []
    segment.populate(done.append)
    assert segment.populated_bytes == segment.size == done[-1]
    assert bytes(segment.data[0:3]) == b"abc"


def test_populating_ends_when_it_is_told_to() -> None:
    segment = make(4 * MIB)
    segment.stop_populating()
    segment.populate()
    assert segment.populated_bytes == 0
    segment.close()


def test_closing_gives_everything_back() -> None:
    before = os.listdir("/proc/self/fd")
    segment = make(2 * MIB)
    segment.populate_in_background()
    segment.close()
    assert os.listdir("/proc/self/fd") == before


def test_only_what_is_missing_is_populated(monkeypatch: pytest.MonkeyPatch) -> None:
    segment = make(128 * MIB)
    segment.locked = False  # otherwise every page is touched once more, to be locked
    for at in range(40 * MIB, 104 * MIB, 4096):
        segment.data[at] = 7
    pieces: list[tuple[int, int]] = []
    real = syscalls.madvise

    def madvise(address: int, length: int, advice: int) -> None:
        pieces.append(((address - segment.address) // MIB, length // MIB))
        real(address, length, advice)

    monkeypatch.setattr(syscalls, "madvise", madvise)
    segment.populate()
    assert pieces == [(0, 32), (32, 32), (104, 24)]
    assert segment.populated_bytes == segment.size
    pieces.clear()
    done: list[int] = []
    segment.populate(done.append)
    assert pieces == [] and done == [segment.size]
    segment.close()


def test_a_size_that_is_no_whole_number_of_pages_is_cut() -> None:
    segment = make(MIB + 5000)
    assert segment.size == len(segment.data) == MIB + 4096
    segment.close()


def test_huge_pages_that_are_not_to_be_had_are_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "free_huge_pages", lambda: (0, 2 * MIB))
    monkeypatch.setattr(backing, "shmem_huge_policy", lambda: "never")
    segment = make(2 * MIB, huge_pages=True)
    assert segment.describe().startswith("memfd, 4 KiB pages")
    assert any("no huge pages: 0 free" in note for note in segment.notes())
    segment.close()


def test_huge_pages_are_reported_by_what_was_really_given() -> None:
    """Whatever this machine has: the words and the page size agree with the kernel's account."""
    segment = make(4 * MIB, huge_pages=True)
    segment.populate()
    description = segment.describe()
    if segment.info.page_bytes > 4096:
        assert description.startswith("hugetlb memfd, 2 MiB pages")
    elif segment.notes():
        assert description.startswith("memfd, 4 KiB pages")
    else:
        assert "% on huge pages" in description
    segment.close()


def test_huge_pages_that_were_asked_for_and_not_given_are_counted_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "free_huge_pages", lambda: (0, 2 * MIB))
    monkeypatch.setattr(backing, "shmem_huge_policy", lambda: "advise")
    monkeypatch.setattr(module, "_huge_bytes_mapped", lambda address, size: 0)
    segment = make(4 * MIB, huge_pages=True)
    assert "huge pages asked for" in segment.describe()
    segment.populate()
    assert "0 % on huge pages" in segment.describe()
    segment.close()
