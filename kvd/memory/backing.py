"""Where the pool's bytes come from: a file in memory, on the largest pages that are really to be had."""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass

from kvd.memory.host import Available, available_memory, free_huge_pages, shmem_huge_policy, tmpfs_huge_policy
from kvd.memory.syscalls import F_SEAL_FUTURE_WRITE, HUGETLBFS_MAGIC, TMPFS_MAGIC, filesystem_magic

PAGE_BYTES = mmap.PAGESIZE


@dataclass(frozen=True)
class Backing:
    """An open file of ``size`` bytes in memory. ``advise_huge``: the mapping should ask for huge pages.

    ``kind`` and ``note`` are for people; ``note`` says why something that was asked for was not given.
    """

    fd: int
    size: int
    page_bytes: int
    kind: str
    advise_huge: bool = False
    note: str = ""


def is_memory_filesystem(directory: str) -> bool:
    """Whether files in ``directory`` live in memory, where a pool belongs."""
    return filesystem_magic(directory) in (TMPFS_MAGIC, HUGETLBFS_MAGIC)


def available_bytes(directory: str | None, huge_pages: bool, size: int) -> Available:
    """What a new pool with these arguments could get at most."""
    if directory is not None and filesystem_magic(directory) == HUGETLBFS_MAGIC:
        pages, page_bytes = free_huge_pages(os.statvfs(directory).f_bsize)
        return Available(pages * page_bytes, f"free for {directory} in the hugetlb pool")
    pages, page_bytes = free_huge_pages()
    if directory is None and huge_pages and pages * page_bytes >= size:
        return Available(pages * page_bytes, "free in the hugetlb pool")  # not part of the memory that is available
    memory = available_memory()
    if directory is None:
        return memory
    found = os.statvfs(directory)
    return min(memory, Available(found.f_bavail * found.f_frsize, f"free in {directory}"))


def anonymous_backing(size: int, *, huge_pages: bool = False) -> Backing:
    """A memfd of ``size`` bytes, cut to whole pages. Nothing of it outlives its last user.

    On transparent huge pages where the kernel gives them to shared memory, else on ordinary pages. With ``huge_pages``
    it lies in the hugetlb pool if that has room, and ``note`` says so when there are no huge pages at all: those of the
    hugetlb pool were set aside for somebody, so they are not taken unasked. Raises OSError.
    """
    free, huge_bytes = free_huge_pages()
    if huge_pages and huge_bytes and huge_bytes <= size <= free * huge_bytes:
        try:
            return _memfd(size, huge_bytes, os.MFD_HUGETLB, kind="hugetlb memfd")
        except OSError:
            pass  # somebody else took them: ordinary pages, said below
    if shmem_huge_policy() != "never":
        return _memfd(size, PAGE_BYTES, advise_huge=True)
    if not huge_pages:
        return _memfd(size, PAGE_BYTES)
    note = (
        f"no huge pages: {free} free in the hugetlb pool (see vm.nr_hugepages) "
        "and transparent ones are off for shared memory (see transparent_hugepage/shmem_enabled)"
    )
    return _memfd(size, PAGE_BYTES, note=note)


def _memfd(
    size: int, page_bytes: int, flags: int = 0, *, kind: str = "memfd", advise_huge: bool = False, note: str = ""
) -> Backing:
    fd = os.memfd_create("kvd-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        size = _set_size(fd, size, page_bytes)
        # A client that cut the file short would make every other process fault on its next access.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        if flags & os.MFD_HUGETLB:
            _reserve(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return Backing(fd, size, page_bytes, kind, advise_huge, note)


def published_memory(name: str, size: int) -> tuple[int, mmap.mmap]:
    """``size`` bytes that this process writes and everybody else can only read: a descriptor for them, and the mapping.

    Raises OSError.
    """
    writable = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(writable, size)
        mapping = mmap.mmap(writable, size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        # After this no descriptor of the file, however it was opened, gives a writable mapping or takes a write.
        fcntl.fcntl(writable, fcntl.F_ADD_SEALS, seals)
        return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC), mapping
    finally:
        os.close(writable)


def whole_pages(size: int, directory: str) -> tuple[int, int]:
    """``size`` cut to whole pages of the file system of ``directory``, and the bytes of such a page."""
    huge = filesystem_magic(directory) == HUGETLBFS_MAGIC
    page_bytes = os.statvfs(directory).f_bsize if huge else PAGE_BYTES
    return size - size % page_bytes, page_bytes


def named_backing(path: str, fd: int, size: int, *, huge_pages: bool = False) -> Backing:
    """The file ``path``, open as ``fd``, as memory of ``size`` bytes; it is made so large when it is empty.

    Its file system decides about the pages: a hugetlbfs has huge ones, and a tmpfs gives them when it was mounted with
    "huge="; ``note`` says so when it was not and ``huge_pages`` asks for them. Raises OSError.
    """
    directory = os.path.dirname(path)
    size, page_bytes = whole_pages(size, directory)
    huge = page_bytes > PAGE_BYTES
    if not os.fstat(fd).st_size:
        os.ftruncate(fd, size)
        if huge:
            _reserve(fd, size)
    if huge:
        return Backing(fd, size, page_bytes, f"hugetlbfs file in {directory}")
    given = tmpfs_huge_policy(directory) != "never"
    note = "" if given or not huge_pages else f"no huge pages: {directory} lies on a tmpfs mounted without huge=advise"
    return Backing(fd, size, page_bytes, f"file in {directory}", advise_huge=given, note=note)


def _reserve(fd: int, size: int) -> None:
    # The kernel sets huge pages aside when they are mapped, not before: try it while there is a way back.
    mmap.mmap(fd, size).close()


def _set_size(fd: int, size: int, page_bytes: int) -> int:
    size -= size % page_bytes
    os.ftruncate(fd, size)
    return size
