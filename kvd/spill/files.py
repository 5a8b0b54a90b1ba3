"""The system calls on a spill directory. Tests put failures between by giving another object of this shape."""

from __future__ import annotations

import os
from collections.abc import Sequence


class Files:
    """What the kernel does with files. All of it lets go of the interpreter's lock; all of it raises OSError."""

    def open(self, path: str, flags: int) -> int:
        """open(2); a new file is its user's alone."""
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def close(self, fd: int) -> None:
        """close(2)."""
        os.close(fd)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """preadv(2): bytes read, 0 at the end of the file."""
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """pwritev(2): bytes written."""
        return os.pwritev(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        """fdatasync(2)."""
        os.fdatasync(fd)

    def allocate(self, fd: int, length: int) -> None:
        """Gives the file ``length`` bytes on the disk; what it has of them already it keeps."""
        os.posix_fallocate(fd, 0, length)

    def truncate(self, fd: int, length: int) -> None:
        """ftruncate(2)."""
        os.ftruncate(fd, length)

    def free_bytes(self, path: str) -> int:
        """Bytes free on the file system of ``path``, for this user."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    def names(self, path: str) -> list[str]:
        """The names of the plain files in a directory."""
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]

    def remove(self, path: str) -> None:
        """unlink(2)."""
        os.unlink(path)


def read_at(files: Files, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Fills ``buffers`` from ``offset`` on; bytes read, fewer than asked only at the end of the file."""
    wanted = sum(len(buffer) for buffer in buffers)
    done = files.preadv(fd, buffers, offset)
    while 0 < done < wanted:
        more = files.preadv(fd, _rest(buffers, done), offset + done)
        if more == 0:
            break
        done += more
    return done


def write_at(files: Files, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Writes all of ``buffers`` from ``offset`` on."""
    wanted = sum(len(buffer) for buffer in buffers)
    done = files.pwritev(fd, buffers, offset)
    while done < wanted:
        more = files.pwritev(fd, _rest(buffers, done), offset + done)
        if more == 0:
            raise OSError(5, "the disk takes no more bytes and does not say why")
        done += more


def _rest(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    rest = []
    for buffer in buffers:
        if done < len(buffer):
            rest.append(buffer[done:])
        done = max(0, done - len(buffer))
    return rest
