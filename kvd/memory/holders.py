"""Which former lives of the daemon still have processes that may write into the pool.

Every process that maps the pool holds a descriptor of ``kvd-holders`` with a read lock on one byte, that of the life
of the daemon that gave it (``lock_offset``, ``kvd/wire/lifeline.py``). The lock belongs to the open file description,
so every process that inherits the descriptor holds it too, and the kernel drops it when the last of them has closed it
or ended. The file stays empty: locks may lie beyond its end.
"""

from __future__ import annotations

import fcntl
import os
import struct

from kvd.memory.files import create_own, open_own
from kvd.wire.lifeline import lock_offset

_FLOCK = struct.Struct("hhqqi4x")  # type, whence, start, length, pid
#: Locks of any life.
_ALL = (0, 0)


class Holders:
    """The locks of the processes of this daemon's life and of former ones."""

    def __init__(self, path: str, fd: int) -> None:
        """Takes ``fd`` over; see ``create`` and ``open``."""
        self._path = path
        self._fd = fd

    @classmethod
    def create(cls, path: str) -> Holders:
        """Nobody holds anything yet. Raises OSError."""
        return cls(path, create_own(path))

    @classmethod
    def open(cls, path: str) -> Holders:
        """The file that a former life left. Raises Unusable."""
        return cls(path, open_own(path, os.O_RDWR))

    @property
    def inode(self) -> int:
        """Number of the file."""
        return os.fstat(self._fd).st_ino

    def hand_out(self, life: int) -> int:
        """A descriptor for one process of a client of ``life``, locked. To be closed here once it is sent.

        Raises OSError.
        """
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if os.fstat(fd).st_ino != self.inode:
                raise FileNotFoundError(2, "another file lies there", self._path)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, lock_offset(life), 1, 0))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def gone(self, life: int) -> bool:
        """Whether no process is left that got its descriptor from ``life``. Once so, always so. Raises OSError."""
        return not self._locked(lock_offset(life), 1)

    def anybody(self) -> bool:
        """Whether there is a process left of any life. Raises OSError."""
        return self._locked(*_ALL)

    def close(self) -> None:
        """Closes the file; what was handed out stays."""
        os.close(self._fd)

    def _locked(self, start: int, length: int) -> bool:
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0))
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
