"""The system calls that Python either lacks or makes with the interpreter's lock held.

All of them go through ctypes, which lets other threads run meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform

MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23
MLOCK_ONFAULT = 1
F_SEAL_FUTURE_WRITE = 0x0010
TMPFS_MAGIC = 0x01021994
HUGETLBFS_MAGIC = 0x958458F6
MPOL_PREFERRED = 1

#: mbind(2) by machine: it is in no C library.
_MBIND = {"x86_64": 237, "aarch64": 235}.get(platform.machine())

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.statfs.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
_libc.syscall.restype = ctypes.c_long


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


def mbind_preferred(address: int, length: int, node: int) -> None:
    """mbind(2): the memory comes from ``node`` while that has some, else from another. Raises OSError."""
    if _MBIND is None:
        raise OSError(errno.ENOSYS, "mbind is not known on this kind of machine")
    word_bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (node // word_bits + 1))()
    mask[node // word_bits] = 1 << node % word_bits
    bits = ctypes.c_ulong(len(mask) * word_bits + 1)  # the kernel looks at one bit less than it is told
    start, size, flags = ctypes.c_void_p(address), ctypes.c_ulong(length), ctypes.c_ulong(0)
    if _libc.syscall(ctypes.c_long(_MBIND), start, size, ctypes.c_long(MPOL_PREFERRED), mask, bits, flags) != 0:
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
