"""The shared-memory data path: the pool's own bytes, mapped into this process (``mapping.py``).

**Who may still be writing?** The daemon takes the open lifeline socket for the answer, and a later daemon the lock of
the holder that came with it. Both are closed when nobody holds a view of the pool's bytes on behalf of this lifeline
any more: not the path, not a copy under way, not an engine that asked for a ``view``. References decide, nothing has to
be declared. The path itself lets go as soon as it sees that the daemon has gone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvd.wire.chunks import Location
from kvd.wire.errors import ProtocolMismatch, SessionUnknown, Unavailable
from kvd.wire.lifeline import GRANULE_BYTES, TABLE_HEADER, TABLE_HEADER_BYTES, TABLE_MAGIC, WORD_BYTES
from kvd.wire.spans import Span
from kvd_client.lifeline import Descriptors, Lifeline, ended
from kvd_client.mapping import READ, READ_WRITE, Mapping, housekeeper, map_file
from kvd_client.path import Attachment, Kind, Piece
from kvd_client.prefault import prefault

if TYPE_CHECKING:
    from typing_extensions import Buffer


class _Hold:
    """Why the daemon takes this process for a possible writer. Every view refers to it; it ends with the last one."""

    def __init__(self, connection: socket.socket, holder: int | None) -> None:
        self._finalizer = weakref.finalize(self, _let_go, connection, holder)
        self._finalizer.atexit = False  # other threads may still be copying: the kernel closes when they have stopped


def _let_go(connection: socket.socket, holder: int | None) -> None:
    connection.close()
    if holder is not None:
        os.close(holder)


class _Segment(NamedTuple):
    """A segment of a daemon that lives. ``table``: its generation table, a word for each granule."""

    data: memoryview  # all of it; keeps the mapping and the hold
    address: int
    size: int
    table: memoryview


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
        self._mappings: list[Mapping] = []
        self._memory: list[memoryview] = []
        self._tables: dict[int, memoryview] = {}
        self._segments: dict[int, _Segment] = {}
        self._unfaulted: list[Mapping] = []
        hold = _Hold(lifeline.socket, lifeline.take_holder())
        try:
            for descriptors in lifeline.segments:
                self._map(descriptors, lifeline.daemon_id, hold)
        finally:
            lifeline.drop_descriptors()
        housekeeper.release()  # what was kept for this session it has by now
        housekeeper.watch(self)

    @classmethod
    def attach(cls, attachment: Attachment, timeout_s: float) -> ShmPath:
        """A path of its own for this process. Raises as ``open_path`` does."""
        lifeline = Lifeline.attach(attachment.address, attachment.token, timeout_s)
        if lifeline.daemon_id != attachment.daemon_id:
            lifeline.close()
            raise SessionUnknown("the daemon has been restarted")
        path = cls(lifeline)
        path._prefault()  # who has a path of its own is going to copy
        return path

    @property
    def alive(self) -> bool:
        """See ``DataPath``."""
        if not self._gone and (not self._segments or ended(self._socket)):
            self._segments = {}  # and with them the hold; the tables still tell what was read in time
            self._gone = True  # after that: whoever hears of it finds nothing to write into any more
        return not self._gone

    def memory(self) -> list[memoryview]:
        """See ``DataPath``."""
        return list(self._memory)

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
        tables = self._tables
        return [_published(tables.get(location.segment), location) for location in locations]

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
        self._segments, self._tables, self._memory, self._mappings, self._unfaulted = {}, {}, [], [], []

    def retain(self) -> None:
        """The daemon has gone and may come back: keeps the mappings for the next path of this process, for a while."""
        housekeeper.retain(self._mappings)

    def _map(self, descriptors: Descriptors, daemon_id: int, hold: _Hold) -> None:
        info = descriptors.info
        granules = info.data_bytes // GRANULE_BYTES
        if info.granule_bytes != GRANULE_BYTES or info.table_bytes < TABLE_HEADER_BYTES + granules * WORD_BYTES:
            raise ProtocolMismatch(f"segment {info} is not one that this client can read")
        data = map_file(descriptors.data_fd, info.data_bytes, READ_WRITE)
        words = map_file(descriptors.table_fd, info.table_bytes, READ)
        *header, writer = TABLE_HEADER.unpack(ctypes.string_at(words.address, TABLE_HEADER.size))
        if header != [TABLE_MAGIC, GRANULE_BYTES, info.index, granules]:
            raise ProtocolMismatch(f"the generation table of segment {info.index} says {header}")
        if writer != daemon_id:
            raise Unavailable("the daemon was restarted in between")
        table = words.bytes()[TABLE_HEADER_BYTES:][: granules * WORD_BYTES].cast("Q").toreadonly()
        self._mappings.append(data)
        self._memory.append(data.bytes())
        self._tables[info.index] = table
        self._segments[info.index] = _Segment(data.bytes(on_behalf_of=hold), data.address, data.length, table)
        if info.page_bytes == mmap.PAGESIZE:  # huge pages have few faults, and those of hugetlb may have no memory yet
            self._unfaulted.append(data)

    def _prefault(self) -> None:
        """To be called when it is known that this process is one that copies."""
        while self._unfaulted:
            prefault(self._unfaulted.pop())

    def _copy(self, pieces: Sequence[Piece], deadline: float, *, into_slots: bool) -> list[bool]:
        self._prefault()
        segments = self._segments  # holds the mappings while the copies are under way
        alive = self.alive
        done = []
        known: Span | None = None
        runs: list[tuple[int, int]] = []
        size = end = 0
        for location, span, buffer in pieces:
            if span is not known:  # most often all pieces have one and the same
                well_formed = span.fits(sys.maxsize)
                known, size, end = span, span.size, span.end if well_formed else sys.maxsize
                runs = list(span.runs()) if well_formed else []
            memory = memoryview(buffer)
            if memory.nbytes != size:
                raise ValueError(f"a buffer of {memory.nbytes} bytes for a span of {size}")
            pinned, address = _pin(memory, writable=not into_slots)
            segment = segments.get(location.segment)
            # A slot that does not hold the generation any more is not even touched: the location is an old one.
            good = (
                alive
                and segment is not None
                and _published(segment.table, location)
                and location.offset + end <= segment.size
                and time.monotonic() < deadline
            )
            if good and segment is not None:
                slot = segment.address + location.offset
                for offset, length in runs:
                    if into_slots:
                        ctypes.memmove(slot + offset, address, length)
                    else:
                        ctypes.memmove(address, slot + offset, length)
                    address += length
            del pinned
            done.append(good)
        return done


def _published(table: memoryview | None, location: Location) -> bool:
    """Whether the table says that the slot holds the location's generation. One aligned 8-byte load."""
    if table is None or location.generation == 0:
        return False
    granule, rest = divmod(location.offset, GRANULE_BYTES)
    return not rest and 0 <= granule < len(table) and table[granule] == location.generation


def _pin(memory: memoryview, *, writable: bool) -> tuple[object, int]:
    """The address of a C-contiguous buffer, and what keeps it there. BufferError when it cannot be had."""
    if memory.readonly or not memory.c_contiguous:
        pinned = _Pinned(memory, writable=writable)
        return pinned, pinned.address
    byte = ctypes.c_char.from_buffer(memory)
    return byte, ctypes.addressof(byte)


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
    """A C-contiguous buffer, held as long as this object is. BufferError when it cannot be had.

    This is the only way to the address of read-only memory (``bytes``) that needs nothing but the interpreter.
    """

    def __init__(self, buffer: Buffer, *, writable: bool) -> None:
        self._buffer = _PyBuffer()
        flags = _PYBUF_WRITABLE if writable else _PYBUF_SIMPLE
        ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(self._buffer), ctypes.c_int(flags))
        self.address: int = self._buffer.buf or 0

    def __del__(self) -> None:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(self._buffer))
