"""A segment: the shared memory that holds the slots."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import resource
import threading
from collections.abc import Callable, Iterator

from kvd.memory import syscalls
from kvd.memory.backing import PAGE_BYTES, Backing
from kvd.memory.generations import GenerationTable
from kvd.types import Location
from kvd.wire.lifeline import GRANULE_BYTES, SegmentInfo

log = logging.getLogger(__name__)

#: The pool is populated in pieces of this size, so that a stop is heard soon and nobody waits long for the kernel.
POPULATE_PIECE_BYTES = 32 << 20


class Segment:
    """One file of pool memory, mapped, with its generation table (``kvd/wire/lifeline.py``).

    ``data``: the mapped bytes. ``data_fd``, ``table_fd``: what clients receive.
    """

    def __init__(self, backing: Backing, generations: GenerationTable) -> None:
        """Maps ``backing`` and takes it over, and ``generations``; none of its memory is taken yet. Raises OSError."""
        self._backing = backing
        self.generations = generations
        self.index = generations.segment
        self.size = backing.size
        self.data_fd = backing.fd
        self.table_fd = generations.fd
        self._huge_bytes: int | None = None  # not known before the kernel was asked
        self._stop = threading.Event()
        self._populating: threading.Thread | None = None
        self._map = mmap.mmap(self.data_fd, self.size)
        self.data = memoryview(self._map)
        self.address = _address(self._map)
        self._advise()
        self.locked, self._lock_note = self._lock()

    # -- what clients are told

    @property
    def info(self) -> SegmentInfo:
        """What a client needs to know to map this segment."""
        return SegmentInfo(self.index, GRANULE_BYTES, self.size, self.generations.bytes, self._backing.page_bytes)

    def describe(self) -> str:
        """What the memory really is, for people: ``memfd, 4 KiB pages, locked``."""
        pages = f"{self._backing.page_bytes >> 10} KiB pages"
        if self._backing.page_bytes >= 1 << 20:
            pages = f"{self._backing.page_bytes >> 20} MiB pages"
        if self._backing.advise_huge:
            share = None if self._huge_bytes is None else self._huge_bytes * 100 // self.size
            pages = "huge pages asked for" if share is None else f"{share} % on huge pages"
        return f"{self._backing.kind}, {pages}, {'locked' if self.locked else 'not locked'}"

    def notes(self) -> list[str]:
        """What was asked for or wished for and not given, and why."""
        return [note for note in (self._backing.note, self._lock_note) if note]

    @property
    def populated_bytes(self) -> int:
        """Memory that the segment has taken from the system so far."""
        return min(os.fstat(self.data_fd).st_blocks * 512, self.size)

    # -- the generation table

    def publish(self, location: Location) -> None:
        """From now on the slot's bytes count as those of this generation."""
        self.generations.publish(location)

    def retract(self, location: Location) -> None:
        """The slot may be used for something else from now on: whoever copied from it must notice."""
        self.generations.retract(location)

    def word(self, segment: int, offset: int) -> int:
        """What the table says of the slot at ``offset`` bytes; for the audit. ``segment`` is this one's index."""
        return self.generations.word(segment, offset)

    # -- memory

    def populate(self, progress: Callable[[int], None] | None = None) -> None:
        """Takes the memory from the system that the segment has not taken yet; about 0.8 s per GiB of 4 KiB pages.

        Blocks; safe while the segment is in use. ``progress`` hears how many bytes are there. Ends early at ``close``.
        """
        for start, end in self._pieces():
            if self._stop.is_set():
                return
            try:
                syscalls.madvise(self.address + start, end - start, syscalls.MADV_POPULATE_WRITE)
            except OSError as error:
                log.warning("the pool is not populated (%s): its memory is taken as it is used", error.strerror)
                return
            if progress is not None:
                progress(end)
        if progress is not None:
            progress(self.size)
        if self._backing.advise_huge:
            self._huge_bytes = _huge_bytes_mapped(self.address, self.size)
            log.info("the pool has %d of %d bytes on huge pages", self._huge_bytes, self.size)

    def populate_in_background(self) -> None:
        """Starts a thread that populates the segment while it is used already."""
        self._populating = threading.Thread(target=self._populate_politely, name="kvd-populate", daemon=True)
        self._populating.start()

    def stop_populating(self) -> None:
        """Ends a ``populate`` early; it stops within one piece."""
        self._stop.set()

    def close(self) -> None:
        """Unmaps and closes. Nobody may hold a view of ``data`` any more: BufferError otherwise."""
        self._stop.set()
        if self._populating is not None:
            self._populating.join(timeout=5)
        self.data.release()
        self._map.close()
        self.generations.close()
        os.close(self.data_fd)

    # -- inside

    def _populate_politely(self) -> None:
        # Requests come first: the thread's own priority is lowered, not the process's.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        self.populate()

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """What is to be populated, begin and end: the holes, or everything where only touching a page locks it."""
        start = 0
        while start < self.size:
            end = min(start + POPULATE_PIECE_BYTES, self.size)
            if not self.locked:
                start = self._first_hole(start)
                if start >= self.size:
                    return
                end = min(start + POPULATE_PIECE_BYTES, self.size)
            yield start, end
            start = end

    def _first_hole(self, start: int) -> int:
        try:
            return os.lseek(self.data_fd, start, os.SEEK_HOLE) // PAGE_BYTES * PAGE_BYTES
        except OSError:  # hugetlbfs does not say; what is there already costs nothing
            return start

    def _advise(self) -> None:
        if self._backing.advise_huge:
            try:
                syscalls.madvise(self.address, self.size, syscalls.MADV_HUGEPAGE)
            except OSError as error:
                log.warning("huge pages were asked for and refused: %s", error.strerror)

    def _lock(self) -> tuple[bool, str]:
        """Keeps the pool out of swap if the limit allows; (locked, why not)."""
        soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
        try:
            syscalls.mlock_on_fault(self.address, self.size)
        except OSError as error:
            limit = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard >> 10} KiB"
            return False, f"not locked in memory ({error.strerror}): the memlock limit is {limit} (see ulimit -l)"
        return True, ""


def _address(mapping: mmap.mmap) -> int:
    # The object that tells the address must not outlive this call: it would keep the mapping from being closed.
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def _huge_bytes_mapped(address: int, size: int, smaps: str = "/proc/self/smaps") -> int:
    """Bytes of the mapping at ``address`` that this process sees through huge pages, by the kernel's account.

    Where the pool lies on several memory nodes, the kernel counts it in pieces. The path is there for tests.
    """
    found = 0
    inside = False
    with open(smaps) as file:
        for line in file:
            head = line.split(" ", 1)[0]
            if "-" in head:
                inside = address <= int(head.split("-")[0], 16) < address + size
            elif inside and line.startswith(("ShmemPmdMapped:", "FilePmdMapped:")):
                found += int(line.split()[1]) * 1024
    return found
