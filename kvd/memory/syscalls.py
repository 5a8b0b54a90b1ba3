"""The system calls that Python either lacks or makes with the interpreter's lock held.

All of them go through ctypes, which lets other threads run meanwhile.
"""

from __future__ import annotations

import ctypes
import os

MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23
MLOCK_ONFAULT = 1
F_SEAL_FUTURE_WRITE = 0x0010
TMPFS_MAGIC = 0x01021994
HUGETLBFS_MAGIC = 0x958458F6

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.statfs.argtypes = [ctypes.c_char_p, ctypes.c_void_p]


def madvise(address: int, length: int, advice: int) -> None:
    """madvise(2). Raises OSError."""
    if _libc.madvise(address, length, advice) != 0:
        raise _last_error()


def mlock_on_fault(address: int, length: int) -> None:
    """mlock2(2): pages stay in memory from the moment they are first used. Raises OSError."""
    try:
        function = _libc.mlock2
    except AttributeError:
        raise OSError("this system's C library has no mlock2") from None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
    if function(address, length, MLOCK_ONFAULT) != 0:
        raise _last_error()


def filesystem_magic(path: str) -> int:
    """The kernel's number for the type of the filesystem that holds ``path``. Raises OSError."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        raise _last_error()
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
