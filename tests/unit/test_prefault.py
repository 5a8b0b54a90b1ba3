"""The page tables of a mapped pool are filled in the background, and nothing else is taken."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from kvd_client import prefault
from kvd_client.mapping import READ_WRITE, Mapping, map_file
from tests.wait import wait_until

MIB = 1 << 20


@pytest.fixture
def file() -> Iterator[int]:
    descriptor = os.memfd_create("kvd-test")
    os.ftruncate(descriptor, 8 * MIB)
    yield descriptor
    os.close(descriptor)
    gc.collect()
    wait_until(lambda: not threads(), what="the threads to end")


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kvd-prefault"]


def fill(descriptor: int, begin: int, length: int) -> None:
    """Gives the file memory, as a daemon does that populates its pool."""
    assert os.pwrite(descriptor, b"\1" * length, begin) == length


def taken(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


def mapped_bytes(mapping: Mapping) -> int:
    """What this process has of the mapping in its page tables."""
    with open("/proc/self/smaps") as smaps:
        lines = iter(smaps)
        next(line for line in lines if line.startswith(f"{mapping.address:x}-"))
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefault, "PAUSE_S", 0.001)
    monkeypatch.setattr(prefault, "PIECE_BYTES", MIB)


def test_what_the_file_has_is_mapped_and_its_holes_stay_holes(file: int) -> None:
    fill(file, 0, 3 * MIB)
    fill(file, 6 * MIB, MIB)
    mapping = map_file(file, 8 * MIB, READ_WRITE)
    assert mapped_bytes(mapping) == 0
    prefault.prefault(mapping)
    wait_until(lambda: mapped_bytes(mapping) == 4 * MIB, what="the pages to be mapped")
    wait_until(lambda: not threads(), what="the thread to end")
    assert taken(file) == 4 * MIB
    mapping.bytes()[6 * MIB] = 2  # mapped to be written too
    assert os.pread(file, 1, 6 * MIB) == b"\2"


def test_a_pool_that_is_still_being_populated_is_followed(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(file, 0, MIB)
    filled = iter(range(1, 4))

    def pause(_: float) -> None:
        if (number := next(filled, None)) is not None:
            fill(file, number * MIB, MIB)

    monkeypatch.setattr(prefault, "time", SimpleNamespace(sleep=pause))
    mapping = map_file(file, 8 * MIB, READ_WRITE)
    prefault.prefault(mapping)
    wait_until(lambda: not threads(), what="the thread to end")
    assert mapped_bytes(mapping) == 4 * MIB == taken(file)


def test_the_thread_is_no_reason_to_keep_a_mapping(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(file, 0, 8 * MIB)
    in_piece, go_on = threading.Event(), threading.Event()
    pieces: list[int] = []

    def slow(mapping: Mapping, start: int, length: int) -> None:
        pieces.append(start)
        in_piece.set()
        assert go_on.wait(10)

    monkeypatch.setattr(Mapping, "fault_in", slow)
    mapping = map_file(file, 8 * MIB, READ_WRITE)
    prefault.prefault(mapping)
    assert in_piece.wait(10)
    address = mapping.address
    del mapping
    go_on.set()
    wait_until(lambda: not threads(), what="the thread to end")
    gc.collect()
    with open("/proc/self/maps") as maps:
        assert not any(line.startswith(f"{address:x}-") for line in maps)
    assert pieces == [0]


def test_a_mapping_is_gone_through_once_for_all_sessions(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(file, 0, MIB)
    starts: list[int] = []
    monkeypatch.setattr(Mapping, "fault_in", lambda mapping, start, length: starts.append(start))
    for _ in range(3):
        mapping = map_file(file, 8 * MIB, READ_WRITE)
        prefault.prefault(mapping)
        wait_until(lambda: not threads(), what="the thread to end")
    assert starts == [0]


def test_a_kernel_that_cannot_is_no_failure(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(file, 0, MIB)

    def refuse(mapping: Mapping, start: int, length: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(Mapping, "fault_in", refuse)
    mapping = map_file(file, 8 * MIB, READ_WRITE)
    prefault.prefault(mapping)
    wait_until(lambda: not threads(), what="the thread to end")
