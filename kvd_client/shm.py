"""The shared-memory data path: the pool's own bytes, mapped into this process.

Mappings are made and ended through libc, which releases the GIL: unmapping a large pool takes long.

**Who may still be writing?** The daemon takes the open lifeline socket for the answer, so the socket is closed only
after the memory has been unmapped, and that happens when nobody holds a view of it any more: not the path, not a copy
under way, not an engine that asked for a ``view``. References decide, nothing has to be declared.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kvd.wire.chunks import Location
from kvd.wire.errors import ProtocolMismatch, SessionUnknown, Unavailable
from kvd.wire.lifeline import GRANULE_BYTES, TABLE_HEADER, TABLE_HEADER_BYTES, TABLE_MAGIC, WORD_BYTES, SegmentInfo
from kvd_client.lifeline import Descriptors, Lifeline, ended
from kvd_client.path import Attachment, Kind, Piece

if TYPE_CHECKING:
    from typing_extensions import Buffer

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
_MAP_FAILED = ctypes.c_void_p(-1).value


class _Segment(NamedTuple):
    data: memoryview  # all of it; keeps the mapping alive
    address: int
    table_address: int
    granules: int


class _Mapped:
    """The mappings of one lifeline, and the lifeline itself. Every view refers to it; when the last one is gone the
    memory is unmapped, and after that the lifeline closed."""

    def __init__(self, connection: socket.socket) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._finalizer = weakref.finalize(self, _release, self._ranges, connection)
        # At exit other threads may still be copying; the kernel does all of this in the right order.
        self._finalizer.atexit = False

    def map(self, descriptor: int, length_bytes: int, protection: int) -> int:
        """Address of a new shared mapping. Raises Unavailable."""
        if os.fstat(descriptor).st_size < length_bytes:
            raise ProtocolMismatch("a segment is smaller than the daemon says")
        address = _libc.mmap(None, length_bytes, protection, mmap.MAP_SHARED, descriptor, 0)
        if address is None or address == _MAP_FAILED:
            raise Unavailable(f"{length_bytes} bytes of the pool cannot be mapped: {os.strerror(ctypes.get_errno())}")
        self._ranges.append((address, length_bytes))
        return int(address)

    def bytes_at(self, address: int, length_bytes: int) -> memoryview:
        """Writable bytes of a mapping; as long as the view or a part of it lives, so does the mapping."""
        pool_bytes: Any = type("PoolBytes", (ctypes.c_ubyte * length_bytes,), {})
        array = pool_bytes.from_address(address)
        array.mapped = self
        return memoryview(array).cast("B")


def _release(ranges: list[tuple[int, int]], connection: socket.socket) -> None:
    for address, length_bytes in ranges:
        _libc.munmap(address, length_bytes)
    connection.close()


class ShmPath:
    """A data path through mapped memory; see ``DataPath``. Takes the lifeline over."""

    kind: Kind = "shm"
    #: Memory does not corrupt bytes on their way.
    checksum_failures = 0

    def __init__(self, lifeline: Lifeline) -> None:
        """Maps the segments of ``lifeline``. Raises ProtocolMismatch or Unavailable; the lifeline is closed then."""
        self._socket = lifeline.socket
        self._gone = False
        self._fence = threading.Lock()
        self._segments: dict[int, _Segment] = {}
        mapped = _Mapped(lifeline.socket)
        try:
            for descriptors in lifeline.segments:
                self._segments[descriptors.info.index] = _map_segment(mapped, descriptors, lifeline.daemon_id)
        finally:
            lifeline.drop_descriptors()

    @classmethod
    def attach(cls, attachment: Attachment, timeout_s: float) -> ShmPath:
        """A path of its own for this process. Raises as ``open_path`` does."""
        lifeline = Lifeline.attach(attachment.address, attachment.token, timeout_s)
        if lifeline.daemon_id != attachment.daemon_id:
            lifeline.close()
            raise SessionUnknown("the daemon has been restarted")
        return cls(lifeline)

    @property
    def alive(self) -> bool:
        """See ``DataPath``."""
        if not self._gone and (not self._segments or ended(self._socket)):
            self._gone = True
        return not self._gone

    def memory(self) -> list[memoryview]:
        """See ``DataPath``."""
        return [segment.data for segment in self._segments.values()]

    def view(self, location: Location, length: int) -> memoryview | None:
        """See ``DataPath``."""
        segment = self._segments.get(location.segment)
        if segment is None or length < 0 or not 0 <= location.offset <= len(segment.data) - length:
            return None
        return segment.data[location.offset : location.offset + length]

    def intact(self, locations: Sequence[Location]) -> list[bool]:
        """See ``DataPath``."""
        # An unlock and then a lock order the loads of the copy before the loads of the table, on every processor.
        for _ in range(2):
            with self._fence:
                pass
        segments = self._segments
        return [_holds(segments.get(location.segment), location) for location in locations]

    def read(self, lease_id: int, pieces: Sequence[Piece], deadline: float) -> list[bool]:
        """See ``DataPath``."""
        copied = self._copy(pieces, deadline, into_slots=False)
        intact = self.intact([piece.location for piece in pieces])
        return [done and good for done, good in zip(copied, intact, strict=True)]

    def write(self, lease_id: int, pieces: Sequence[Piece], deadline: float) -> list[bool]:
        """See ``DataPath``."""
        return self._copy(pieces, deadline, into_slots=True)

    def close(self) -> None:
        """See ``DataPath``."""
        self._gone = True
        self._segments = {}

    def _copy(self, pieces: Sequence[Piece], deadline: float, *, into_slots: bool) -> list[bool]:
        segments = self._segments  # holds the mappings while the copies are under way
        alive = self.alive
        done = []
        for location, span, buffer in pieces:
            with _Pinned(buffer, writable=not into_slots) as (address, length_bytes):
                if length_bytes != span.size:
                    raise ValueError(f"a buffer of {length_bytes} bytes for a span of {span.size}")
                segment = segments.get(location.segment)
                # A slot that does not hold the generation any more is not even touched: the location is an old one.
                good = (
                    alive
                    and segment is not None
                    and _holds(segment, location)
                    and span.fits(len(segment.data) - location.offset)
                    and time.monotonic() < deadline
                )
                if good and segment is not None:
                    slot = segment.address + location.offset
                    for offset, length in span.runs():
                        if into_slots:
                            ctypes.memmove(slot + offset, address, length)
                        else:
                            ctypes.memmove(address, slot + offset, length)
                        address += length
                done.append(good)
        return done


def _map_segment(mapped: _Mapped, descriptors: Descriptors, daemon_id: int) -> _Segment:
    info: SegmentInfo = descriptors.info
    granules = info.data_bytes // GRANULE_BYTES
    if info.granule_bytes != GRANULE_BYTES or info.table_bytes < TABLE_HEADER_BYTES + granules * WORD_BYTES:
        raise ProtocolMismatch(f"segment {info} is not one that this client can read")
    address = mapped.map(descriptors.data_fd, info.data_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
    table_address = mapped.map(descriptors.table_fd, info.table_bytes, mmap.PROT_READ)
    header = TABLE_HEADER.unpack(ctypes.string_at(table_address, TABLE_HEADER.size))
    if header != (TABLE_MAGIC, GRANULE_BYTES, info.index, granules, daemon_id):
        raise ProtocolMismatch(f"the generation table of segment {info.index} says {header}")
    return _Segment(mapped.bytes_at(address, info.data_bytes), address, table_address + TABLE_HEADER_BYTES, granules)


def _holds(segment: _Segment | None, location: Location) -> bool:
    """Whether the table says that the slot holds the location's generation. One aligned 8-byte load."""
    if segment is None or location.generation == 0:
        return False
    granule, rest = divmod(location.offset, GRANULE_BYTES)
    if rest or not 0 <= granule < segment.granules:
        return False
    word = ctypes.c_uint64.from_address(segment.table_address + granule * WORD_BYTES).value
    return word == location.generation


class _PyBuffer(ctypes.Structure):
    """CPython's ``Py_buffer``."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_PYBUF_SIMPLE = 0
_PYBUF_WRITABLE = 1


class _Pinned:
    """Address and length of a C-contiguous buffer, held while the block lasts. BufferError when it cannot be had.

    This is the only way to the address of read-only memory (``bytes``) that needs nothing but the interpreter.
    """

    def __init__(self, buffer: Buffer, *, writable: bool) -> None:
        self._buffer = _PyBuffer()
        flags = _PYBUF_WRITABLE if writable else _PYBUF_SIMPLE
        ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(self._buffer), ctypes.c_int(flags))

    def __enter__(self) -> tuple[int, int]:
        return self._buffer.buf or 0, self._buffer.len

    def __exit__(self, *_: object) -> None:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(self._buffer))
