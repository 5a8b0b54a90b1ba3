"""A spill directory on a file system: ``DIR/kvd-spill`` with its lock, superblock, namespaces, extents, their indexes.

Only files whose names are ours are ever removed.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import re
import stat
import struct
from dataclasses import dataclass

from kvd.lock import PathLock
from kvd.spill import superblock as superblocks
from kvd.spill.extents import extent_bytes_for, extents_in, index_bytes_in
from kvd.spill.files import Files
from kvd.spill.record import PAGE_BYTES
from kvd.spill.superblock import Superblock, Unusable

log = logging.getLogger(__name__)

NAME = "kvd-spill"
_LOCK = "lock"
_NAMESPACES = "namespaces"
_PROBE = "probe"
_EXTENT = re.compile(r"(\d{8})\.extent")
_INDEX = re.compile(r"(\d{8})\.index")
#: A directory of another size keeps its extents, and what is in them, unless it would have fewer than this.
_MIN_EXTENTS = 4


@dataclass(slots=True)
class Directory:
    """An opened and locked spill directory. ``direct``: its files can be read and written past the page cache."""

    path: str
    lock: PathLock
    identity: tuple[int, int]  # device and inode of the lock file
    superblock: Superblock
    extents: int
    index_bytes: int  # at most, of one extent's index
    direct: bool

    @property
    def namespaces(self) -> str:
        """Where the descriptions of namespaces lie."""
        return os.path.join(self.path, _NAMESPACES)

    def extent_path(self, number: int) -> str:
        """The file of an extent."""
        return _extent_path(self.path, number)

    def index_path(self, number: int) -> str:
        """The file of an extent's index."""
        return _index_path(self.path, number)


def open_directory(parent: str, size_bytes: int, files: Files) -> Directory:
    """Opens or makes the spill directory in ``parent``, which must exist.

    Raises OSError, ``kvd.lock.AlreadyLocked``, and ValueError for a size too small to be of use.
    """
    wanted = extent_bytes_for(size_bytes)
    path = os.path.join(os.path.abspath(parent), NAME)
    _make(path)
    lock_path = os.path.join(path, _LOCK)
    lock = PathLock(lock_path)
    try:
        superblock = _superblock(path, wanted, size_bytes, files)
        extents = extents_in(size_bytes, superblock.extent_bytes)
        _make_way(path)
        for number in existing_extents(path, files):
            if number >= extents:  # the tier was larger once
                files.remove(_extent_path(path, number))
        for number in _existing_indexes(path, files).difference(existing_extents(path, files)):
            files.remove(_index_path(path, number))  # of an extent that is gone
        direct = _takes_direct(os.path.join(path, superblocks.FILES[0]))
        if not direct:
            log.warning("%s: this file system has no direct I/O; the page cache will hold what is spilled too", path)
        index_bytes = index_bytes_in(size_bytes, superblock.extent_bytes)
        return Directory(path, lock, _identity(lock_path), superblock, extents, index_bytes, direct)
    except BaseException:
        lock.release()
        raise


def look_again(directory: Directory) -> None:
    """After a failure: makes ``directory`` whole again, as far as it is still the one that was opened.

    Extents that are gone stay gone. Raises OSError when it cannot be used, or when something else is there now, and
    ``kvd.lock.AlreadyLocked``.
    """
    parent = os.stat(os.path.dirname(directory.path))
    if parent.st_dev != directory.identity[0]:
        raise OSError(errno.ENODEV, "another file system is there now")
    _make(directory.path)
    lock_path = os.path.join(directory.path, _LOCK)
    if not os.path.exists(lock_path) or _identity(lock_path) != directory.identity:
        lock = PathLock(lock_path)
        directory.lock.release()
        directory.lock, directory.identity = lock, _identity(lock_path)
    try:
        found = superblocks.load(directory.path)
    except Unusable as error:
        log.warning("%s: %s; written anew", directory.path, error)
        found = None
    if found is None:
        superblocks.write(directory.path, directory.superblock)
    elif found != directory.superblock:
        raise OSError(errno.ENODEV, "another spill directory is there now")


def is_there(directory: Directory) -> bool:
    """Whether its path still leads to the directory that was opened."""
    try:
        return _identity(os.path.join(directory.path, _LOCK)) == directory.identity
    except FileNotFoundError:
        return False


def existing_extents(path: str, files: Files) -> list[int]:
    """Numbers of the extent files in a spill directory. Raises OSError."""
    matches = (_EXTENT.fullmatch(name) for name in files.names(path))
    return sorted(int(found[1]) for found in matches if found)


def _existing_indexes(path: str, files: Files) -> set[int]:
    return {int(found[1]) for name in files.names(path) if (found := _INDEX.fullmatch(name))}


def _extent_path(path: str, number: int) -> str:
    return os.path.join(path, f"{number:08d}.extent")


def _index_path(path: str, number: int) -> str:
    return os.path.join(path, f"{number:08d}.index")


def probe(directory: Directory, files: Files) -> None:
    """Writes a page, and reads it back. Raises OSError when the drive does not do that."""
    path = os.path.join(directory.path, _PROBE)
    flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if directory.direct else 0)
    token = os.urandom(16)
    with mmap.mmap(-1, PAGE_BYTES) as page, memoryview(page) as view:
        struct.pack_into("16s", page, 0, token)
        fd = files.open(path, flags)
        try:
            written = files.pwritev(fd, [view], 0)
            files.sync(fd)
            struct.pack_into("16s", page, 0, bytes(16))
            read = files.preadv(fd, [view], 0)
        finally:
            files.close(fd)
        if written != PAGE_BYTES or read != PAGE_BYTES or page[:16] != token:
            raise OSError(errno.EIO, "it gives back other bytes than were written")
    files.remove(path)


def _make(path: str) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise OSError(errno.EPERM, f"{path} is not a directory of this user") from None
        if stat.S_IMODE(found.st_mode) & 0o077:
            os.chmod(path, 0o700)


def _make_way(path: str) -> None:
    """Only plain files may have the names of extents and indexes: of anything else the name is taken away, a directory
    is kept."""
    with os.scandir(path) as entries:
        named = [one for one in entries if _EXTENT.fullmatch(one.name) or _INDEX.fullmatch(one.name)]
    foreign = [one for one in named if not one.is_file(follow_symlinks=False)]
    for entry in foreign:
        log.warning("%s is no plain file; out of the way", entry.path)
        if entry.is_dir(follow_symlinks=False):
            os.rename(entry.path, f"{entry.path}.aside-{os.urandom(4).hex()}")
        else:
            os.unlink(entry.path)


def _superblock(path: str, wanted: int, size_bytes: int, files: Files) -> Superblock:
    why = ""
    try:
        found = superblocks.load(path)
        if found is not None:
            kept = extents_in(size_bytes, found.extent_bytes)
            if kept >= _MIN_EXTENTS or found.extent_bytes == wanted:
                return found
            why = f"its extents of {found.extent_bytes} bytes are too large for {size_bytes} bytes"
    except Unusable as error:
        why = str(error)
    if why:
        log.warning("%s: %s; it starts anew, empty", path, why)
    for number in existing_extents(path, files):  # nobody can read them any more
        files.remove(_extent_path(path, number))
    return superblocks.create(path, wanted)


def _takes_direct(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    try:
        with mmap.mmap(-1, PAGE_BYTES) as page:
            return os.preadv(fd, [page], 0) == PAGE_BYTES
    except OSError as error:
        if error.errno == errno.EINVAL:  # it wants larger pieces than ours
            return False
        raise
    finally:
        os.close(fd)


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino
