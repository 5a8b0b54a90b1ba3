"""What a former daemon left on a drive: the records of all its extents, found by several threads at once.

An extent's index says what its headers say, up to some record. From there on a walk goes from header to header, and
what it finds comes into the index as well. Where a header is damaged it looks for the next at every 4 KiB; only a
header that was written here, for this place and in this life of the extent can be found. Payload is not read: it is
checked when it is promoted.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvd.spill.drive import Drive, DriveFailed, DriveState
from kvd.spill.files import Files, read_at
from kvd.spill.index import Part, Run, parse_batch
from kvd.spill.record import HEADER_BYTES, PAGE_BYTES, RECORD_WORD, Header, parse_extent, parse_record
from kvd.types import Found, Place

log = logging.getLogger(__name__)

THREADS = 8
BATCH_RECORDS = 256
#: What is read at once of an index, where records are short, or where a header is looked for.
_WINDOW_BYTES = 512 << 10
#: From this length on records are passed over instead of read through.
_LONG_BYTES = 64 << 10
#: Pages that cannot be read before an extent is given up.
_BAD_PAGES = 16
_WAIT_S = 0.1


class Batch(NamedTuple):
    """Records found in one extent. ``last``: there are no more, all of the extent has been told."""

    drive: int
    extent: int
    found: list[Found]
    last: bool


@dataclass(slots=True)
class Progress:
    """How far a scan has come. ``skipped``: what could not be used, by reason."""

    extents: int
    extents_done: int = 0
    records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


class Scan:
    """Reads the headers of ``extents`` of an open drive.

    ``found`` hears batches in order within an extent, from several threads; while it waits, so does the scan. A drive
    that is degraded is waited for. ``ended`` hears once that all is done, not when the scan was stopped.
    """

    def __init__(
        self,
        drive: Drive,
        extents: Sequence[int],
        found: Callable[[Batch], None],
        ended: Callable[[], None] = lambda: None,
        *,
        threads: int = THREADS,
    ) -> None:
        self.progress = Progress(len(extents))
        self._drive = drive
        self._found = found
        self._ended = ended
        self._left = iter(extents)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._begun = time.monotonic()
        self._threads = [
            threading.Thread(target=self._run, name=f"kvd-scan-{drive.index}.{number}", daemon=True)
            for number in range(max(1, min(threads, len(extents))))
        ]
        self._running = len(self._threads)

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Nothing more is read; what is being told is told to its end."""
        self._stop.set()

    def join(self, timeout_s: float) -> bool:
        """Waits for the threads; whether they have ended."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        try:
            with (
                mmap.mmap(-1, _WINDOW_BYTES) as memory,
                memoryview(memory) as window,
                mmap.mmap(-1, _WINDOW_BYTES) as other_memory,
                memoryview(other_memory) as index_window,
            ):
                while (extent := self._next()) is not None:
                    self._scan(extent, window, index_window)
        except Exception:
            log.exception("%s: a thread of the scan has made a mistake", self._drive.path)
            self._stop.set()
        finally:
            with self._lock:
                self._running -= 1
                last = not self._running
                self.progress.seconds = time.monotonic() - self._begun
            if last and not self._stop.is_set():
                self._drive.sync()  # what a walk has found comes into the indexes
                self._ended()

    def _next(self) -> int | None:
        while not self._stop.is_set():
            if self._drive.state is DriveState.WORKING:
                with self._lock:
                    return next(self._left, None)
            self._stop.wait(_WAIT_S)
        return None

    def _scan(self, extent: int, window: memoryview, index_window: memoryview) -> None:
        skipped: Counter[str] = Counter()
        waiting: list[Found] = []
        records = 0
        for found in self._all_of(extent, window, index_window, skipped):
            records += len(found)
            waiting += found
            while len(waiting) >= BATCH_RECORDS and not self._stop.is_set():
                self._found(Batch(self._drive.index, extent, waiting[:BATCH_RECORDS], False))
                del waiting[:BATCH_RECORDS]
        if self._stop.is_set():
            return
        self._found(Batch(self._drive.index, extent, waiting, True))
        with self._lock:
            self.progress.extents_done += 1
            self.progress.records += records
            self.progress.skipped += skipped

    def _all_of(
        self, extent: int, window: memoryview, index_window: memoryview, skipped: Counter[str]
    ) -> Iterator[list[Found]]:
        """The records of an extent, in the order of their places."""
        extents, secret = self._drive.extents, self._drive.directory.superblock.secret
        try:
            with extents.open(extent, os.O_RDONLY) as fd:
                reader = _Reader(self._drive, fd, window)
                life = _life(reader, extent, secret)
                if life is None:
                    skipped["extent without a header"] += 1
                    return
                extents.found(extent, life)
                run = Run(life)
                for part in self._indexed(extent, run, reader, index_window, skipped):
                    yield part.found
                for header in _walk(reader, extent, run.end, life, secret, skipped, self._stop):
                    run.add(header)
                    yield [_found(self._drive.index, header)]
                extents.index(extent, run)
        except FileNotFoundError:
            skipped["extent gone"] += 1
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            skipped["unreadable extent"] += 1
        except DriveFailed:
            return

    def _indexed(
        self, extent: int, run: Run, reader: _Reader, window: memoryview, skipped: Counter[str]
    ) -> Iterator[Part]:
        """What the index of an extent says, as far as it can be believed. ``run`` is what has been told of it."""
        drive, secret = self._drive, self._drive.directory.superblock.secret
        try:
            with drive.extents.open_index(extent) as fd:
                while not self._stop.is_set():
                    with drive.operation():
                        length = read_at(drive.files, fd, [window], run.size_bytes)
                    parts = []
                    at, begin = 0, run.end
                    while part := parse_batch(window[at:length], drive.index, extent, run.life, begin, secret):
                        parts.append(part)
                        at, begin = at + part.size_bytes, part.end
                    if not parts or not _is_there(reader, parts[-1].found[-1], run.life, secret):
                        return
                    for part in parts:
                        run.skip(part)
                        yield part
        except FileNotFoundError:
            return
        except OSError:
            skipped["unreadable index"] += 1


class _Reader:
    """Pages of one extent file through a window of memory. Bad pages are skipped, up to a bound."""

    def __init__(self, drive: Drive, fd: int, window: memoryview) -> None:
        self.end = os.fstat(fd).st_size // PAGE_BYTES * PAGE_BYTES
        self._files: Files = drive.files
        self._drive = drive
        self._fd = fd
        self._window = window
        self._begin = 0
        self._length = 0
        self._bad = 0

    def page(self, at: int, *, ahead: bool) -> memoryview | None:
        """The page at ``at``; None when it cannot be read. ``ahead``: those that follow are wanted next."""
        if not self._begin <= at < self._begin + self._length:
            self._fill(at, _WINDOW_BYTES if ahead else PAGE_BYTES)
        if not self._length:
            return None
        begin = at - self._begin
        return self._window[begin : begin + PAGE_BYTES]

    def find(self, at: int) -> int:
        """Where the next page from ``at`` on lies that begins like a header; ``end`` when there is none."""
        while at < self.end:
            if self.page(at, ahead=True) is None:
                at += PAGE_BYTES
                continue
            begin = (at - self._begin) // 8
            words = self._window[: self._length].cast("Q")[begin :: PAGE_BYTES // 8]
            for number, word in enumerate(words):
                if word == RECORD_WORD:
                    return at + number * PAGE_BYTES
            at = self._begin + self._length
        return self.end

    def _fill(self, at: int, length: int) -> None:
        length = min(length, self.end - at)
        try:
            with self._drive.operation():
                done = self._files.preadv(self._fd, [self._window[:length]], at)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            if length > PAGE_BYTES:
                self._fill(at, PAGE_BYTES)
                return
            self._bad += 1
            if self._bad > _BAD_PAGES:
                raise
            done = 0
        self._begin, self._length = at, done // PAGE_BYTES * PAGE_BYTES


def _life(reader: _Reader, extent: int, secret: bytes) -> bytes | None:
    """The present life of an extent; None when its header does not say it."""
    first = reader.page(0, ahead=False) if reader.end else None
    return None if first is None else parse_extent(first, extent, secret)


def _is_there(reader: _Reader, record: Found, life: bytes, secret: bytes) -> bool:
    """Whether the header of a record says the same as the index does.

    An index that is older than the extent, or on the disk without the records that should have been there before it,
    does not get any further than to such a record.
    """
    place = record.place
    page = reader.page(place.offset, ahead=False) if place.offset < reader.end else None
    header = None if page is None else parse_record(page, secret)
    unfit = _unfit(header, page, place.extent, place.offset, life, reader.end)
    return header is not None and unfit is None and _found(place.drive, header) == record


def _walk(
    reader: _Reader,
    extent: int,
    at: int,
    life: bytes,
    secret: bytes,
    skipped: Counter[str],
    stop: threading.Event,
) -> Iterator[Header]:
    """The headers of an extent's present life from ``at`` on, in the order of their places."""
    expected, ahead = True, False
    while at < reader.end and not stop.is_set():
        page = reader.page(at, ahead=ahead or not expected)
        header = None if page is None else parse_record(page, secret)
        why = _unfit(header, page, extent, at, life, reader.end)
        if header is not None and why is None:
            if not expected:
                skipped["gap after a damaged record"] += 1
            yield header
            at += header.record_bytes
            expected, ahead = True, header.record_bytes < _LONG_BYTES
            continue
        if why is not None:
            skipped[why] += 1
        expected = False
        at = reader.find(at + PAGE_BYTES)


def _unfit(header: Header | None, page: memoryview | None, extent: int, at: int, life: bytes, end: int) -> str | None:
    """Why what lies at ``at`` is no record of this life; None when it is one, or when nothing claims to be one."""
    if page is None:
        return "unreadable header"
    if header is None:
        return "damaged header" if page[:8].cast("Q")[0] == RECORD_WORD else None
    if header.extent != extent or header.offset != at:
        return "misplaced record"
    if header.life != life:
        return "record of a former life"
    if header.record_bytes <= HEADER_BYTES or header.record_bytes % PAGE_BYTES:
        return "damaged header"
    return "record cut short" if at + header.record_bytes > end else None


def _found(drive: int, header: Header) -> Found:
    life = int.from_bytes(header.life[8:], "little")
    place = Place(drive, header.extent, header.offset, header.record_bytes, header.sequence, life)
    return Found(header.namespace_id, header.key, header.parent, header.chunk_bytes, place)
