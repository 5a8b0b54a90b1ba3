"""The files of a drive's extents: given their bytes and a new life when they are filled anew, synced, removed."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvd.failpoints import reach
from kvd.spill.directory import Directory, existing_extents
from kvd.spill.extents import Spare
from kvd.spill.files import Files, write_at
from kvd.spill.index import Run
from kvd.spill.index_files import IndexFiles
from kvd.spill.record import PAGE_BYTES, Header, pack_extent
from kvd.types import Place

_RUN_BYTES = 8


class Outlived(Exception):
    """The place belongs to a life of its extent that is over."""


class OpenFile:
    """An open file, as a ``with`` statement. A class, not a generator: every read passes here."""

    __slots__ = ("_fd", "_files", "_flags", "_path")

    def __init__(self, files: Files, path: str, flags: int) -> None:
        self._files = files
        self._path = path
        self._flags = flags
        self._fd = -1

    def __enter__(self) -> int:
        self._fd = self._files.open(self._path, self._flags)
        return self._fd

    def __exit__(self, *_: object) -> None:
        self._files.close(self._fd)


@dataclass(slots=True)
class _Life:
    """One filling of an extent. ``lock`` is held while its file is made ready."""

    number: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    ready: bool = False


class ExtentFiles:
    """The extents of one opened directory. Any thread may call; all of it may wait for the disk and raises OSError."""

    def __init__(self, directory: Directory, files: Files, floor_bytes: int) -> None:
        self._directory = directory
        self._files = files
        self._floor_bytes = floor_bytes
        self._extent_bytes = directory.superblock.extent_bytes
        # A life is named by this run of the daemon and its number: no two runs can mean the same.
        self._run = os.urandom(_RUN_BYTES)
        self._lock = threading.Lock()  # of what follows; who holds the lock of a life may take it, not the other way
        self._known = set(existing_extents(directory.path, files))  # those that have a file
        self._lives: dict[int, _Life] = {}
        self._former: dict[int, bytes] = {}  # the lives that a former daemon has begun
        self._dirty: set[int] = set()
        self._indexes = IndexFiles(directory, files, floor_bytes)

    @property
    def existing(self) -> tuple[int, ...]:
        """The extents that have a file."""
        return tuple(sorted(self._known))

    def life_of(self, place: Place) -> bytes:
        """What the headers of an extent and of its records name its life."""
        number = place.life.to_bytes(8, "little")
        former = self._former.get(place.extent, b"")
        return former if former[_RUN_BYTES:] == number else self._run + number

    def found(self, number: int, life: bytes) -> None:
        """The life that the extent has, begun by a former daemon: it may be continued."""
        self._former[number] = life

    def index(self, number: int, run: Run) -> None:
        """What a scan has found of a life that may be continued: the index shall have all of it, and what follows."""
        if run.entries:
            with self._lock:
                self._dirty.add(number)  # the former daemon may not have synced what it wrote
        self._indexes.go_on(number, run)

    def open(self, number: int, flags: int) -> OpenFile:
        """The file of an extent, for a ``with`` statement. FileNotFoundError when it is gone."""
        direct = os.O_DIRECT if self._directory.direct else 0
        return OpenFile(self._files, self._directory.extent_path(number), flags | direct)

    def open_index(self, number: int) -> OpenFile:
        """The index of an extent, to be read, for a ``with`` statement. FileNotFoundError when there is none."""
        return OpenFile(self._files, self._directory.index_path(number), os.O_RDONLY | os.O_NONBLOCK)

    def is_ready(self, place: Place) -> bool:
        """Whether records of this life of the extent may be written. Raises Outlived when it is over."""
        life = self._lives.get(place.extent)
        if life is not None and life.number > place.life:
            raise Outlived(f"extent {place.extent} has been filled anew meanwhile")
        if life is None:
            return self._former.get(place.extent, b"")[_RUN_BYTES:] == place.life.to_bytes(8, "little")
        return life.number == place.life and life.ready

    def prepare(self, place: Place) -> bool:
        """Begins the life of ``place``; False when another thread has done so. Raises Outlived.

        When this returns, the new life is on the disk: nothing of a former one can come back.
        """
        with self._lock:
            life = self._lives.get(place.extent)
            if life is None or life.number < place.life:
                life = self._lives[place.extent] = _Life(place.life)
        with life.lock:
            if self.is_ready(place):
                return False
            self._allocate(place.extent)
            self._write_header(place)
            self._indexes.begin(place.extent, self.life_of(place))
            life.ready = True
        return True

    def wrote(self, header: Header) -> None:
        """The record with this header has been written."""
        if header.extent not in self._dirty:
            with self._lock:
                self._dirty.add(header.extent)
        self._indexes.add(header)

    def sync(self) -> None:
        """Everything written so far is on the disk when this returns, and then in the indexes."""
        complete = self._indexes.complete()  # its extents are dirty, or have been synced
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        try:
            for number in list(dirty):
                with contextlib.suppress(FileNotFoundError), self.open(number, os.O_RDWR) as fd:
                    reach("spill.extent.sync.before")
                    self._files.sync(fd)
                    reach("spill.extent.sync.after")
                dirty.discard(number)
        finally:
            with self._lock:
                self._dirty |= dirty
        self._indexes.write(complete)

    def gone(self) -> list[int]:
        """Extents whose files have been removed by somebody else; each is said once."""
        with self._lock:  # no file is made or removed here meanwhile
            lost = sorted(self._known.difference(existing_extents(self._directory.path, self._files)))
            for number in lost:
                self._forget(number)
        for number in lost:
            self._indexes.remove(number)
        return lost

    def affordable(self) -> int:
        """How many extents the file system has room for, those that exist included."""
        spare_bytes = self._files.free_bytes(self._directory.path) - self._floor_bytes
        return max(0, min(len(self._known) + spare_bytes // self._extent_bytes, self._directory.extents))

    def give_back(self, spares: Iterable[Spare]) -> list[int]:
        """Removes files of free extents until the file system has its floor again; those that were removed.

        One that has been given a new life meanwhile stays.
        """
        removed = []
        for number, last_life in spares:
            if self._files.free_bytes(self._directory.path) >= self._floor_bytes:
                break
            with self._lock:  # no new life of it can begin meanwhile
                life = self._lives.get(number)
                if number in self._known and (life is None or life.number == last_life):
                    reach("spill.extent.remove.before")
                    self._indexes.remove(number)
                    self._files.remove(self._directory.extent_path(number))
                    reach("spill.extent.remove.after")
                    self._forget(number)
                    removed.append(number)
        return removed

    def _forget(self, number: int) -> None:
        self._known.discard(number)
        self._dirty.discard(number)
        self._lives.pop(number, None)
        self._former.pop(number, None)
        self._indexes.forget(number)

    def _allocate(self, number: int) -> None:
        path = self._directory.extent_path(number)
        with self._lock:
            new = number not in self._known
            if new and self._files.free_bytes(self._directory.path) - self._extent_bytes < self._floor_bytes:
                raise OSError(errno.ENOSPC, "the file system would have less free than its floor")
            fd = self._files.open(path, os.O_RDWR | os.O_CREAT)
            self._known.add(number)
        try:
            reach("spill.extent.allocate.before")
            self._files.allocate(fd, self._extent_bytes)
            reach("spill.extent.allocate.after")
        except OSError:
            if new:
                with self._lock, contextlib.suppress(OSError):
                    self._files.remove(path)
                    self._known.discard(number)
            raise
        finally:
            self._files.close(fd)

    def _write_header(self, place: Place) -> None:
        with mmap.mmap(-1, PAGE_BYTES) as page, memoryview(page) as view, self.open(place.extent, os.O_RDWR) as fd:
            secret = self._directory.superblock.secret
            pack_extent(view, place.extent, self._extent_bytes, self.life_of(place), secret)
            reach("spill.extent.open.before")
            write_at(self._files, fd, [view], 0)
            self._files.sync(fd)
            reach("spill.extent.open.after")
