"""The index files of a drive's extents: written behind the records, given up when that fails, removed.

What is to be written waits in memory until the drive's keeper comes by: 121 bytes a record. On the disk these come to
0.006 % of records of 2 MiB, 0.1 % of records of 128 KiB. An index has its part of what a drive keeps for other things
than extents (``kvd.spill.extents``), and ends where that is full: then headers say the rest.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from typing import NamedTuple

from kvd.failpoints import reach
from kvd.spill.directory import Directory
from kvd.spill.files import Files, write_at
from kvd.spill.index import BATCH_BYTES, ENTRY_BYTES, MAX_ENTRIES, Run, pack_batch
from kvd.spill.record import Header

log = logging.getLogger(__name__)


class Complete(NamedTuple):
    """So many bytes of entries of a run are of records that have been written."""

    extent: int
    run: Run
    length: int


class IndexFiles:
    """What is known of each extent's run of records, and is to come into its index.

    ``begin``, ``go_on``, ``add``, ``complete`` and ``forget`` wait for nothing. ``write`` and ``remove`` wait for the
    disk, and are for one thread only: the drive's keeper. Neither fails: an index that cannot be written is given up.
    """

    def __init__(self, directory: Directory, files: Files, floor_bytes: int) -> None:
        self._directory = directory
        self._files = files
        self._floor_bytes = floor_bytes
        self._lock = threading.Lock()  # of the runs
        self._runs: dict[int, Run] = {}

    def begin(self, extent: int, life: bytes) -> None:
        """A new life of an extent has begun; nothing has been written in it."""
        with self._lock:
            self._runs[extent] = Run(life)

    def go_on(self, extent: int, run: Run) -> None:
        """What a scan has found in an extent; unless that was given a new life meanwhile."""
        with self._lock:
            self._runs.setdefault(extent, run)

    def add(self, header: Header) -> None:
        """A record has been written."""
        with self._lock:
            run = self._runs.get(header.extent)
            if run is not None and run.life == header.life:
                run.add(header)

    def forget(self, extent: int) -> None:
        """The extent has no file any more."""
        with self._lock:
            self._runs.pop(extent, None)

    def complete(self) -> list[Complete]:
        """What may be written once the extents are synced that are dirty now."""
        with self._lock:
            return [Complete(extent, run, len(run.entries)) for extent, run in self._runs.items() if run.entries]

    def write(self, complete: list[Complete]) -> None:
        """Writes these; their records are on the disk."""
        for extent, run, length in complete:
            try:
                self._write(extent, run, length)
            except OSError as error:
                path = self._directory.index_path(extent)
                log.warning("%s cannot be written, the next start reads headers instead: %s", path, error)
                self._give_up(extent, run)

    def remove(self, extent: int) -> None:
        """Removes the index of an extent, if there is one. If that fails it counts for nothing all the same."""
        try:
            self._remove(extent)
        except OSError as error:
            log.warning("%s cannot be removed: %s", self._directory.index_path(extent), error)

    def _write(self, extent: int, run: Run, length: int) -> None:
        if not run.size_bytes:
            self._remove(extent)  # that of a former life, or one that is damaged from its begin on
        flags = os.O_RDWR | os.O_NONBLOCK | (0 if run.size_bytes else os.O_CREAT | os.O_EXCL)
        fd = self._files.open(self._directory.index_path(extent), flags)
        try:
            if os.fstat(fd).st_size > run.size_bytes:
                self._files.truncate(fd, run.size_bytes)  # what followed does not count, and must never count again
            while length > 0:
                room = (self._directory.index_bytes - run.size_bytes - BATCH_BYTES) // ENTRY_BYTES
                if room <= 0:
                    self._give_up(extent, run)
                    return
                with self._lock:
                    entries = run.entries[: min(length, room * ENTRY_BYTES, MAX_ENTRIES * ENTRY_BYTES)]
                self._append(fd, extent, run, entries)
                length -= len(entries)
        finally:
            self._files.close(fd)

    def _append(self, fd: int, extent: int, run: Run, entries: bytearray) -> None:
        batch = pack_batch(extent, run.life, run.begin, entries, self._directory.superblock.secret)
        if self._files.free_bytes(self._directory.path) - len(batch) < self._floor_bytes:
            raise OSError(errno.ENOSPC, "the file system would have less free than its floor")
        reach("spill.index.write.before")
        write_at(self._files, fd, [memoryview(batch)], run.size_bytes)
        reach("spill.index.write.after")
        with self._lock:
            run.wrote(entries, len(batch))

    def _remove(self, extent: int) -> None:
        reach("spill.index.remove.before")
        try:
            self._files.remove(self._directory.index_path(extent))
        except FileNotFoundError:
            return
        reach("spill.index.remove.after")

    def _give_up(self, extent: int, run: Run) -> None:
        with self._lock:
            if self._runs.get(extent) is run:
                del self._runs[extent]
