"""One spill directory in use: extents opened life by life, namespaces described, and what becomes of it when it fails.

A drive works or is degraded. It becomes degraded when an operation fails, hangs or takes far too long, or when its
files are gone; then everything asked of it fails at once, and a probe every few seconds finds out when it works again.
Every change is logged once and told to the ``Watcher``.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from enum import Enum
from typing import NamedTuple, Protocol

from kvd import names
from kvd.failpoints import reach
from kvd.lock import AlreadyLocked
from kvd.spill import directory as directories
from kvd.spill.directory import Directory
from kvd.spill.extent_files import ExtentFiles, Outlived
from kvd.spill.extents import Spare
from kvd.spill.files import Files
from kvd.spill.health import Health, Operation, Patience
from kvd.types import Namespace, Place

log = logging.getLogger(__name__)

#: The pace of a drive's keeper, and of its duties, seconds.
TICK_S = 0.5
SYNC_S = 5.0
LOOK_S = 5.0
PROBE_S = 3.0
_UNOPENED = "not opened yet"
#: Errors that say that there is no room, not that the drive is broken.
NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT))


class DriveState(Enum):
    """Whether a drive can be used."""

    WORKING = "working"
    DEGRADED = "degraded"
    CLOSED = "closed"


class Attachment(NamedTuple):
    """The geometry of a drive that has been opened, and the extents that a former daemon left in it."""

    extent_bytes: int
    extents: int
    existing: tuple[int, ...]


class Watcher(Protocol):
    """Who is told what changes. Called from threads; must not wait for anything."""

    def attached(self, drive: int, attachment: Attachment) -> None:
        """The drive was opened for the first time: at the start, or when it had been missing then."""

    def state_changed(self, drive: int, state: DriveState, reason: str) -> None:
        """The drive works again, or does not, and why."""

    def available(self, drive: int, extents: int) -> None:
        """The file system has room for this many extents, those that exist included."""

    def lost(self, drive: int, extents: list[int]) -> None:
        """These extents are gone, and what lay in them."""


class DriveFailed(Exception):
    """The drive does not do it, now."""


class Drive:
    """The spill directory in ``parent``, of at most ``size_bytes``; ``floor_bytes`` of its file system stay free.

    ``open`` and ``run`` do not return while the file system hangs: they belong in a thread.
    """

    def __init__(
        self,
        index: int,
        parent: str,
        size_bytes: int,
        *,
        floor_bytes: int = 1 << 30,
        files: Files | None = None,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.index = index
        self.parent = parent
        self.size_bytes = size_bytes
        self.files = files or Files()
        self.health = Health(patience or Patience())
        self._floor_bytes = floor_bytes
        self._clock = clock
        self._watcher: Watcher | None = None
        self._state = DriveState.DEGRADED
        self._reason = _UNOPENED
        self._directory: Directory | None = None
        self._extents: ExtentFiles | None = None
        self._state_lock = threading.Lock()
        self._available: int | None = None
        self._spares: list[Spare] = []
        self._described: set[bytes] = set()
        self._describing = threading.Lock()
        self._stop = threading.Event()
        self._wake = threading.Event()

    # -- what it is

    @property
    def state(self) -> DriveState:
        """Whether it can be used."""
        return self._state

    @property
    def reason(self) -> str:
        """Why it cannot be used; empty when it can."""
        return self._reason

    @property
    def path(self) -> str:
        """The directory, for people."""
        return os.path.join(self.parent, directories.NAME)

    @property
    def direct(self) -> bool:
        """Whether it bypasses the page cache."""
        return self._directory is not None and self._directory.direct

    @property
    def directory(self) -> Directory:
        """The directory on the file system. DriveFailed before it is opened."""
        if self._directory is None:
            raise DriveFailed(self._reason)
        return self._directory

    @property
    def extents(self) -> ExtentFiles:
        """Its extents. DriveFailed before it is opened."""
        if self._extents is None:
            raise DriveFailed(self._reason)
        return self._extents

    # -- opening and closing

    def watch(self, watcher: Watcher) -> None:
        """Who is told from now on."""
        self._watcher = watcher

    def open(self) -> Attachment | None:
        """Opens or makes the directory. None when that fails: the drive is degraded then, and ``run`` tries again."""
        directory: Directory | None = None
        try:
            with self.operation(long=True):
                directory = directories.open_directory(self.parent, self.size_bytes, self.files)
                self._extents = ExtentFiles(directory, self.files, self._floor_bytes)
        except (OSError, AlreadyLocked, ValueError) as error:
            if directory is not None:
                directory.lock.release()
            self._set_state(DriveState.DEGRADED, _words(error))
            return None
        self._directory = directory
        attachment = Attachment(directory.superblock.extent_bytes, directory.extents, self._extents.existing)
        self._tell(lambda watcher: watcher.attached(self.index, attachment))
        self._set_state(DriveState.WORKING, "")
        return attachment

    def run(self) -> None:
        """Keeps the drive until ``close``: syncs, looks after room and files, probes while it is degraded."""
        due = dict.fromkeys(("sync", "look", "probe"), self._clock())
        while not self._stop.is_set():
            woken = self._wake.wait(TICK_S)
            self._wake.clear()
            try:
                self._keep(due, woken)
            except (OSError, AlreadyLocked, DriveFailed) as error:
                self.failed(error)
            except Exception:
                log.exception("%s: its keeper has made a mistake", self.path)
        with contextlib.suppress(OSError):
            if self._state is DriveState.WORKING and self._extents is not None:
                self._extents.sync()
        self._set_state(DriveState.CLOSED, "closed")
        if self._directory is not None:
            self._directory.lock.release()

    def close(self) -> None:
        """``run`` ends soon, once what was written is on the disk."""
        self._stop.set()
        self._wake.set()

    # -- what the movers need

    def operation(self, *, long: bool = False) -> Operation:
        """Around everything that may wait for the disk: the watch sees how long it takes."""
        return Operation(self.health, self._clock, long=long)

    def prepare(self, namespace: Namespace, place: Place) -> None:
        """Before a record is written: its namespace is described, the life of its extent has begun.

        Raises OSError, DriveFailed.
        """
        if namespace.id not in self._described:
            self._describe(namespace)
        try:
            if self.extents.is_ready(place):
                return
            with self.operation(long=True):
                begun = self.extents.prepare(place)
        except Outlived as error:
            raise DriveFailed(str(error)) from error
        except OSError as error:
            if error.errno in NO_ROOM:
                self._tell(lambda watcher: watcher.lost(self.index, [place.extent]))
            raise
        if begun:
            self.sync()  # the extent before it is probably full

    def namespaces(self) -> dict[bytes, Namespace]:
        """The namespaces that are described here. Raises OSError, DriveFailed."""
        with self._describing, self.operation(long=True):
            found = names.load(self.directory.namespaces)
            self._described.update(found)
        return found

    def give_back(self, spares: Iterable[Spare]) -> None:
        """Free extents whose files the keeper may remove while the file system has too little room."""
        self._spares = list(spares)
        self._wake.set()

    def sync(self) -> None:
        """What was written is on the disk, and in the indexes, soon."""
        self._wake.set()

    def failed(self, error: BaseException) -> None:
        """An operation failed: the drive is degraded, or the keeper finds out what it lacks."""
        if isinstance(error, DriveFailed):
            return
        if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno in NO_ROOM):
            self._wake.set()
        else:
            self._set_state(DriveState.DEGRADED, _words(error))

    def judge(self) -> None:
        """Looks at the clock only; degrades the drive when something takes too long. For a thread that never waits."""
        if self._state is DriveState.WORKING:
            verdict = self.health.verdict(self._clock())
            if verdict is not None:
                self._set_state(DriveState.DEGRADED, verdict)

    # -- the keeper

    def _keep(self, due: dict[str, float], woken: bool) -> None:
        now = self._clock()
        if self._state is DriveState.DEGRADED:
            if now >= due["probe"]:
                due["probe"] = now + PROBE_S
                self._probe()
            return
        due["probe"] = now
        if woken or now >= due["sync"]:
            due["sync"] = now + SYNC_S
            with self.operation(long=True):
                self.extents.sync()
        if woken or now >= due["look"]:
            due["look"] = now + LOOK_S
            with self.operation(long=True):
                self._look()

    def _probe(self) -> None:
        if self._directory is None:
            self.open()
            return
        if self.health.hangs(self._clock()) is not None:
            return
        begin = self._clock()
        try:
            with self.operation():
                directories.look_again(self._directory)
                self._described.clear()  # the descriptions may be gone: each is saved again before its next record
                self._miss(self.extents.gone())
                directories.probe(self._directory, self.files)
        except (OSError, AlreadyLocked) as error:
            self._reason = _words(error)
            return
        if self._clock() - begin < PROBE_S:
            self.health.heal()
            self._set_state(DriveState.WORKING, "")

    def _look(self) -> None:
        if not directories.is_there(self.directory):
            self._set_state(DriveState.DEGRADED, "the directory is gone")
            return
        self._miss(self.extents.gone())
        spares, self._spares = self._spares, []
        removed = self.extents.give_back(spares)
        if removed:
            log.info("%s: gave %d free extents back to the file system", self.path, len(removed))
            self._tell(lambda watcher: watcher.lost(self.index, removed))
        available, all_of_them = self.extents.affordable(), self.directory.extents
        if available != self._available:
            if available < all_of_them:
                log.warning("%s: the file system has room for %d of %d extents", self.path, available, all_of_them)
            elif self._available is not None:
                log.info("%s: the file system has room for all extents again", self.path)
            self._available = available
            self._tell(lambda watcher: watcher.available(self.index, available))

    def _miss(self, lost: list[int]) -> None:
        if lost:
            log.error("%s: %d extents are gone, and what lay in them", self.path, len(lost))
            self._tell(lambda watcher: watcher.lost(self.index, lost))

    # -- inside

    def _describe(self, namespace: Namespace) -> None:
        with self._describing, self.operation(long=True):
            if namespace.id not in self._described:
                reach("spill.namespace.before")
                names.save(self.directory.namespaces, namespace)
                reach("spill.namespace.after")
                self._described.add(namespace.id)

    def _tell(self, what: Callable[[Watcher], None]) -> None:
        if self._watcher is not None:
            what(self._watcher)

    def _set_state(self, state: DriveState, reason: str) -> None:
        with self._state_lock:
            first = self._reason == _UNOPENED
            if self._state is DriveState.CLOSED or (state is self._state and not first):
                return
            self._state, self._reason = state, reason
        if state is DriveState.DEGRADED:
            log.error("%s does not work and is left alone for now: %s", self.path, reason)
        elif state is DriveState.WORKING and not first:
            log.warning("%s works again", self.path)
        self._tell(lambda watcher: watcher.state_changed(self.index, state, reason))


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
