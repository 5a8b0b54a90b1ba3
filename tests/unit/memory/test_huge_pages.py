"""Huge pages are taken where the machine gives them unasked, and what was given is what is said."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.memory import backing, host, segment
from kvd.memory.backing import anonymous_backing, named_backing
from kvd.memory.generations import GenerationTable
from kvd.memory.segment import Segment
from kvd.memory.syscalls import MADV_HUGEPAGE

MIB = 1 << 20


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What the kernel is told about mappings; it gives huge pages for half of a segment of 4 MiB."""
    heard: list[int] = []
    monkeypatch.setattr(segment.syscalls, "madvise", lambda address, length, what: heard.append(what))
    monkeypatch.setattr(segment, "_huge_bytes_mapped", lambda address, size: 2 * MIB)
    yield heard


def life(memory: backing.Backing) -> tuple[str, list[str]]:
    """How a segment on ``memory`` describes itself after it was populated, and its notes on pages."""
    made = Segment(memory, GenerationTable.anonymous(memory.size, 1))
    made.populate()
    said = made.describe(), [note for note in made.notes() if "huge" in note]
    made.close()
    return said


@pytest.mark.parametrize("policy", ["advise", "within_size", "always"])
@pytest.mark.parametrize("named", [False, True])
def test_what_the_kernel_gives_is_asked_for_without_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, advice: list[int], policy: str, named: bool
) -> None:
    monkeypatch.setattr(backing, "shmem_huge_policy", lambda: policy)
    monkeypatch.setattr(backing, "tmpfs_huge_policy", lambda directory: policy)
    described, notes = life(of_file(tmp_path) if named else anonymous_backing(4 * MIB))
    assert MADV_HUGEPAGE in advice
    assert "50 % on huge pages" in described
    assert not notes


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_where_there_are_none_ordinary_pages_do_and_only_who_asked_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, advice: list[int], named: bool, asked: bool
) -> None:
    monkeypatch.setattr(backing, "shmem_huge_policy", lambda: "never")
    monkeypatch.setattr(backing, "tmpfs_huge_policy", lambda directory: "never")
    monkeypatch.setattr(backing, "free_huge_pages", lambda: (0, 2 * MIB))
    memory = of_file(tmp_path, asked) if named else anonymous_backing(4 * MIB, huge_pages=asked)
    described, notes = life(memory)
    assert MADV_HUGEPAGE not in advice
    assert "4 KiB pages" in described
    assert bool(notes) == asked


def test_pages_of_the_hugetlb_pool_are_not_taken_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "free_huge_pages", lambda: (1 << 20, 2 * MIB))
    memory = anonymous_backing(4 * MIB)
    os.close(memory.fd)
    assert memory.kind == "memfd"
    assert memory.page_bytes == backing.PAGE_BYTES


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ("rw,size=1024k,huge=within_size,inode64", "within_size"),
        ("rw,huge=always", "always"),
        ("rw,size=1024k", "never"),
    ],
)
def test_the_mount_of_a_directory_says_what_it_gives(tmp_path: Path, options: str, policy: str) -> None:
    device = os.stat(tmp_path).st_dev
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(
        f"22 1 {os.major(device)}:{os.minor(device) + 1} / /elsewhere rw - tmpfs tmpfs rw,huge=advise\n"
        f"23 1 {os.major(device)}:{os.minor(device)} / /here rw,nosuid shared:4 - tmpfs tmpfs {options}\n"
    )
    assert host.tmpfs_huge_policy(str(tmp_path), proc=str(tmp_path)) == policy


@pytest.mark.parametrize(
    ("text", "policy"), [("always [advise] never deny force", "advise"), ("[deny] x", "never"), ("x [force]", "always")]
)
def test_the_switch_of_the_kernel_is_understood(tmp_path: Path, text: str, policy: str) -> None:
    (tmp_path / "switch").write_text(text)
    assert host.shmem_huge_policy(str(tmp_path / "switch")) == policy


def test_a_machine_that_says_nothing_gives_nothing(tmp_path: Path) -> None:
    assert host.tmpfs_huge_policy(str(tmp_path), proc=str(tmp_path)) == "never"
    assert host.shmem_huge_policy(str(tmp_path / "absent")) == "never"


def of_file(directory: Path, asked: bool = False) -> backing.Backing:
    path = str(directory / "kvd-pool")
    return named_backing(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC), 4 * MIB, huge_pages=asked)
