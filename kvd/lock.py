"""One daemon per socket and per pool directory: an advisory lock that the kernel releases however its holder ends."""

from __future__ import annotations

import contextlib
import fcntl
import os


class AlreadyLocked(Exception):
    """Another process holds the lock; ``holder`` is its process id as far as is known, or 0."""

    def __init__(self, path: str, holder: int) -> None:
        super().__init__(f"{path} is locked by " + (f"process {holder}" if holder else "another process"))
        self.holder = holder


class PathLock:
    """Holds ``path`` (a file made for this, never removed: a removed lock file can be held twice)."""

    def __init__(self, path: str) -> None:
        """Takes the lock or raises ``AlreadyLocked``; OSError when the file cannot be made."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_pid(self._fd)
            os.close(self._fd)
            raise AlreadyLocked(path, holder) from None
        with contextlib.suppress(OSError):  # hugetlbfs takes no writes: then the holder stays unnamed
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Lets go."""
        os.close(self._fd)


def _read_pid(fd: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(os.pread(fd, 32, 0))
    return 0
