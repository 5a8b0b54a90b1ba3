"""The files of a pool that outlives its daemon: where they lie, and whether what lies there is this user's own.

In the directory of the pool: ``kvd-pool`` (the bytes), ``kvd-generations`` (the table that clients map read-only),
``kvd-slots`` (the slot table, the daemon's alone), ``kvd-holders`` (locks of those who may write) and
``kvd-namespaces/``. A hugetlbfs takes no write(2) and gives nothing smaller than a huge page: there the directory has
the bytes only, and the rest lies below /dev/shm in a directory named after it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from typing import NamedTuple

from kvd.memory.syscalls import HUGETLBFS_MAGIC, TMPFS_MAGIC, filesystem_magic

#: The tmpfs that holds the tables of a pool in a hugetlbfs.
SHARED_MEMORY = "/dev/shm"


class Unusable(Exception):
    """What a former life left cannot be used; the text says why, for people."""


class PoolFiles(NamedTuple):
    """Paths. ``namespaces`` is a directory."""

    pool: str
    generations: str
    slots: str
    holders: str
    namespaces: str


def files_in(directory: str) -> PoolFiles:
    """The files of the pool in ``directory``; directories that are missing are made, for this user alone.

    Raises OSError, PermissionError also when somebody else could put files there in place of these.
    """
    directory = os.path.realpath(directory)
    own_directory(directory)
    tables = directory
    if filesystem_magic(directory) == HUGETLBFS_MAGIC:
        if filesystem_magic(SHARED_MEMORY) != TMPFS_MAGIC:
            raise OSError(0, f"a pool in a hugetlbfs keeps its tables in {SHARED_MEMORY}, which is no tmpfs", directory)
        own = os.path.join(SHARED_MEMORY, f"kvd-{os.geteuid()}")
        tables = os.path.join(own, "tables-" + hashlib.sha256(os.fsencode(directory)).hexdigest()[:16])
        for path in (own, tables):
            own_directory(path)
    names = [os.path.join(tables, f"kvd-{name}") for name in ("generations", "slots", "holders", "namespaces")]
    return PoolFiles(os.path.join(directory, "kvd-pool"), *names)


def own_directory(directory: str) -> None:
    """Makes ``directory`` for this user alone when it is missing. Raises OSError, also when others can write there."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    found = os.lstat(directory)
    # Where others can write, a sticky bit at least keeps them from replacing what is ours.
    exposed = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.geteuid(), 0) or exposed:
        raise PermissionError(1, f"others can write to {directory}: give the pool a directory of its own", directory)


def open_own(path: str, flags: int) -> int:
    """A descriptor of a file that only this user can have written. Raises Unusable when there is no such file."""
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Unusable(f"{os.path.basename(path)} cannot be opened: {error.strerror}") from None
    found = os.fstat(fd)
    problem = ""
    if not stat.S_ISREG(found.st_mode):
        problem = "is no plain file"
    elif found.st_uid != os.geteuid():
        problem = f"belongs to user {found.st_uid}"
    elif found.st_mode & 0o077:
        problem = f"has mode {found.st_mode & 0o777:o}: others could have changed it"
    elif found.st_nlink != 1:
        problem = f"has {found.st_nlink} names"
    if problem:
        os.close(fd)
        raise Unusable(f"{os.path.basename(path)} {problem}")
    return fd


def create_own(path: str) -> int:
    """A descriptor of a new, empty file for this user alone. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def discard(files: PoolFiles) -> None:
    """Removes what there is of a pool, the slot table first: without it the rest means nothing. Raises OSError.

    Whoever has mapped the files keeps the memory until it lets go. A directory in the place of a file is moved aside.
    """
    for path in (files.slots, files.slots + ".new", files.pool, files.generations, files.holders):
        _remove(path)
    try:
        listing = os.open(files.namespaces, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    except OSError:  # something else has its name
        _remove(files.namespaces)
        return
    try:
        for name in os.listdir(listing):
            with contextlib.suppress(IsADirectoryError):
                os.unlink(name, dir_fd=listing)
    finally:
        os.close(listing)
    with contextlib.suppress(OSError):  # somebody else has something there
        os.rmdir(files.namespaces)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        os.rename(path, f"{path}.aside-{os.urandom(4).hex()}")
