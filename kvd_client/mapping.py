"""Mapped files of the pool, shared by every session of this process.

A mapping belongs to the file, not to the session: a client that comes back to a daemon that has taken its pool over
maps nothing anew, and what was registered with a device stays registered. Mappings are made and ended through libc,
which releases the GIL: unmapping a large pool takes long.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

from kvd.wire.errors import ProtocolMismatch, Unavailable

#: How long the mapping of a file that still has a name is kept for the next session after the daemon has gone.
RETAIN_S = 120.0
#: How often the paths and the retained mappings of the process are looked at.
TICK_S = 1.0

READ = mmap.PROT_READ
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MADV_POPULATE_READ = 22  # on shared memory what is mapped to be read can be written as well
_MAP_FAILED = ctypes.c_void_p(-1).value

_Key = tuple[int, int, int, int]  # device, inode, length, protection
_lock = threading.Lock()
_known: weakref.WeakValueDictionary[_Key, Mapping] = weakref.WeakValueDictionary()


class Mapping:
    """``length`` bytes of a file, mapped at ``address`` until nobody refers to this object. See ``map_file``."""

    def __init__(self, key: _Key, descriptor: int) -> None:
        length = key[2]
        address = _libc.mmap(None, length, key[3], mmap.MAP_SHARED, descriptor, 0)
        if address is None or address == _MAP_FAILED:
            raise Unavailable(f"{length} bytes of the pool cannot be mapped: {os.strerror(ctypes.get_errno())}")
        self.address: int = address
        self.length = length
        self._descriptor = os.dup(descriptor)  # as long as it is open, no other file gets this inode's number
        self._finalizer = weakref.finalize(self, _release, address, length, self._descriptor)
        # At exit other threads may still be copying; the kernel does all of this in the right order.
        self._finalizer.atexit = False

    @property
    def named(self) -> bool:
        """Whether the file still has a name, so that a daemon can find it again."""
        return os.fstat(self._descriptor).st_nlink > 0

    def bytes(self, *, on_behalf_of: object = None) -> memoryview:
        """All bytes, writable. The view and every part of it keep the mapping, and ``on_behalf_of``."""
        pool_bytes: Any = type("PoolBytes", (ctypes.c_ubyte * self.length,), {})
        array = pool_bytes.from_address(self.address)
        array.kept = (on_behalf_of, self)
        return memoryview(array).cast("B")

    def filled(self, start: int) -> tuple[int, int] | None:
        """Begin and end of what the file has memory for next, from byte ``start`` on; None: nothing. Raises OSError."""
        try:
            begin = os.lseek(self._descriptor, start, os.SEEK_DATA)
            end = min(os.lseek(self._descriptor, begin, os.SEEK_HOLE), self.length)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise
        return (begin, end) if begin < end else None

    def fault_in(self, start: int, length: int) -> None:
        """Fills this process's page tables for ``length`` bytes from ``start`` on. Raises OSError."""
        if _libc.madvise(self.address + start, length, _MADV_POPULATE_READ) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def map_file(descriptor: int, length: int, protection: int) -> Mapping:
    """The mapping of a file, the one that there is already if there is one. ``descriptor`` stays the caller's.

    Raises ProtocolMismatch when the file is shorter, Unavailable when it cannot be mapped.
    """
    found = os.fstat(descriptor)
    if found.st_size < length:
        raise ProtocolMismatch("a segment is smaller than the daemon says")
    key = (found.st_dev, found.st_ino, length, protection)
    with _lock:
        mapping = _known.get(key)
        if mapping is None:
            mapping = _known[key] = Mapping(key, descriptor)
    return mapping


def _release(address: int, length: int, descriptor: int) -> None:
    _libc.munmap(address, length)
    os.close(descriptor)


class Watched(Protocol):
    """What notices by itself, when it is asked, that the daemon has gone."""

    @property
    def alive(self) -> bool:
        """False once it has."""


class Housekeeper:
    """One thread per process, while there is anything to do: it asks idle paths whether they live, so that the next
    daemon need not wait for a process that has nothing to write; and it ends what was retained for long enough."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: weakref.WeakSet[Watched] = weakref.WeakSet()
        self._retained: dict[Mapping, float] = {}  # until when, ``time.monotonic()``
        self._thread: threading.Thread | None = None

    def watch(self, path: Watched) -> None:
        """Asks ``path`` now and then, until it is dead or forgotten."""
        with self._lock:
            self._watched.add(path)
            self._start()

    def retain(self, mappings: Iterable[Mapping]) -> None:
        """Keeps mappings of files with a name for ``RETAIN_S``; others are nobody's any more."""
        until = time.monotonic() + RETAIN_S
        kept = {mapping: until for mapping in mappings if mapping.named}
        with self._lock:
            self._retained |= kept
            if kept:
                self._start()

    def release(self) -> None:
        """Lets everything go that was retained; what somebody uses stays."""
        with self._lock:
            released, self._retained = self._retained, {}
        released.clear()  # without the lock: unmapping takes long

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="kvd-mappings", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while self._round():
            time.sleep(TICK_S)

    def _round(self) -> bool:
        """Looks around; False, and the thread is over, when there is nothing to look at any more."""
        with self._lock:
            paths = list(self._watched)
        dead = [path for path in paths if not path.alive]
        now = time.monotonic()
        with self._lock:
            over = [mapping for mapping, until in self._retained.items() if until <= now or not mapping.named]
            for mapping in over:
                del self._retained[mapping]
            self._watched.difference_update(dead)
            if idle := not self._watched and not self._retained:
                self._thread = None
        return not idle


#: Of this process.
housekeeper = Housekeeper()
