"""What a run of the tests has left behind: processes that still live, directories that still exist.

Every process that a test starts inherits a mark in its environment, so that even one whose parent is gone is found, and
the processes of another run on the same machine are not taken for ours.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import NamedTuple

_MARK = "RUN_OF_KVD_TESTS"

#: Where daemons keep pools that outlive them: files there are memory, and nobody else would ever give it back.
SHARED_MEMORY = Path("/dev/shm")

#: Python's own helper: it ends when the process does that it serves.
_BELONGS_TO_US = "multiprocessing.resource_tracker"


class Process(NamedTuple):
    """A process that still lives."""

    pid: int
    command: str


class Leftovers:
    """Begins to watch when it is made. One for a process, for all of its life."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        os.environ[_MARK] = self._mark
        self._directories: list[Path] = []
        self._pools_before = set(_pools())
        sys.addaudithook(self._heard)

    def directories(self) -> list[Path]:
        """Temporary directories called ``kvd-...`` that this process has made and nobody has removed."""
        return [directory for directory in self._directories if directory.exists()]

    def pools(self) -> list[Path]:
        """Directories of pools that were not there at first and that no process uses, whoever has made them.

        Those of test daemons are not among them: each run watches its own as ``directories``.
        """
        new = [pool for pool in _pools() if pool not in self._pools_before and not pool.name.startswith("kvd-test-")]
        return [pool for pool in new if not _in_use(pool)]

    def processes(self) -> list[Process]:
        """Processes that this one has started, directly or not, and that have not ended."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                parent, state = _parent_and_state(entry)
                marked = f"{_MARK}={self._mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue  # it has just ended, or is not ours to look at
            if state in "ZX" or _BELONGS_TO_US in command:
                continue
            if marked or parent == os.getpid():
                found.append(Process(int(entry.name), command))
        return found

    def after(self, grace_s: float) -> list[Process]:
        """``processes``, once those that are about to end have had ``grace_s`` for it."""
        deadline = time.monotonic() + grace_s
        while (found := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    @staticmethod
    def end(processes: list[Process]) -> None:
        """Kills what was found."""
        for process in processes:
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def _heard(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "tempfile.mkdtemp":
            path = Path(str(arguments[0]))
            if path.name.startswith("kvd-"):
                self._directories.append(path)


def _parent_and_state(entry: Path) -> tuple[int, str]:
    # The command's name stands in brackets and may hold anything, brackets too.
    fields = (entry / "stat").read_text().rpartition(")")[2].split()
    return int(fields[1]), fields[0]


def _pools() -> list[Path]:
    """``/dev/shm/kvd-...``; where that is a user's own (``kvd-1000``), its directories, one for each daemon."""
    found = []
    for path in SHARED_MEMORY.glob("kvd-*"):
        found += list(path.iterdir()) if path.name == f"kvd-{os.getuid()}" else [path]
    return found


def _in_use(directory: Path) -> bool:
    """Whether a process has a file of ``directory`` mapped: then it belongs to a daemon of somebody else."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f" {directory}/" in (process / "maps").read_text():
                return True
        except OSError:
            continue  # it has just ended, or is not ours to look at
    return False
