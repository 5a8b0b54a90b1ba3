"""One record between the pool and a drive: written, read and checked, or moved.

Bytes go straight from and to the pool; only headers, encoded records and moves pass through a thread's own buffers.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from types import TracebackType

import xxhash

from kvd.failpoints import reach
from kvd.spill import codec
from kvd.spill.drive import Drive, DriveFailed
from kvd.spill.files import read_at, write_at
from kvd.spill.record import HEADER_BYTES, Codec, Header, pack_record, padded, parse_record, record_bytes
from kvd.types import Move, Namespace, Place, Read, Write

#: Longest single transfer. A larger record goes in pieces, its header last.
PIECE_BYTES = 8 << 20
#: Scratch memory that a thread keeps between two orders.
_KEPT_BYTES = 8 << 20


class Corrupt(Exception):
    """What lies at the place is not what the order says; the text says in what."""


class Failed(Exception):
    """The drive did not do it. ``reading``: it failed to give back what lies on it."""

    def __init__(self, drive: Drive, error: Exception, *, reading: bool) -> None:
        super().__init__(str(error))
        self.drive = drive
        self.error = error
        self.reading = reading


class Buffers:
    """Page-aligned memory of one thread: a header, and as much more as its orders need."""

    def __init__(self) -> None:
        self.page = memoryview(mmap.mmap(-1, HEADER_BYTES))
        self._scratch = memoryview(b"")

    def scratch(self, length: int) -> memoryview:
        """Memory of ``length`` bytes, good until the next call."""
        if len(self._scratch) < length:
            self._scratch = memoryview(mmap.mmap(-1, padded(length)))
        return self._scratch[:length]

    def relax(self) -> None:
        """Lets go of what an unusually large order needed."""
        if len(self._scratch) > _KEPT_BYTES:
            self._scratch = memoryview(b"")


def checksum_of(data: memoryview) -> int:
    """xxh3_64; lets go of the interpreter's lock."""
    return xxhash.xxh3_64_intdigest(data)


def write_record(drive: Drive, order: Write, pool: memoryview, buffers: Buffers) -> None:
    """Raises Failed."""
    namespace, place = order.namespace, order.place
    if order.encoded is None:
        stored_bytes, kind, stored_checksum = namespace.chunk_bytes, Codec.RAW, order.checksum
        source = pool[order.offset : order.offset + padded(stored_bytes)]
    else:
        stored_bytes, kind, stored_checksum = len(order.encoded), Codec.PLANES, checksum_of(order.encoded)
        source = order.encoded
    header = Header(
        place.extent,
        place.offset,
        drive.extents.life_of(place),
        place.record_bytes,
        place.sequence,
        namespace.id,
        order.key,
        order.parent,
        namespace.chunk_bytes,
        namespace.identity.num_layers,
        namespace.identity.num_kv_heads,
        kind,
        stored_bytes,
        order.checksum,
        stored_checksum,
    )
    if HEADER_BYTES + len(source) != place.record_bytes:
        raise ValueError(f"{len(source)} bytes for a record of {place.record_bytes}")
    with _Blaming(drive):
        drive.prepare(namespace, place)
        pack_record(buffers.page, header, drive.directory.superblock.secret)
        begin = place.offset + HEADER_BYTES
        with drive.extents.open(place.extent, os.O_RDWR) as fd:
            reach("spill.record.write.before")
            for at in range(PIECE_BYTES, len(source), PIECE_BYTES):
                with drive.operation():
                    write_at(drive.files, fd, [source[at : at + PIECE_BYTES]], begin + at)
            reach("spill.record.header.before")
            with drive.operation():
                write_at(drive.files, fd, [buffers.page, source[:PIECE_BYTES]], place.offset)
            reach("spill.record.write.after")
        drive.extents.wrote(header)


def read_record(drive: Drive, order: Read, pool: memoryview, buffers: Buffers) -> int:
    """The checksum of the chunk that is in the slot now. Raises Corrupt, Failed."""
    namespace, place = order.namespace, order.place
    slot = pool[order.offset : order.offset + padded(namespace.chunk_bytes)]
    # An encoded record is always shorter: otherwise it is not encoded.
    raw = place.record_bytes == record_bytes(namespace.chunk_bytes)
    target = slot if raw else buffers.scratch(place.record_bytes - HEADER_BYTES)
    reach("spill.read.before")
    with _Blaming(drive, reading=True), drive.extents.open(place.extent, os.O_RDONLY) as fd:
        with drive.operation():
            done = read_at(drive.files, fd, [buffers.page, target[:PIECE_BYTES]], place.offset)
        header = _header(buffers.page, drive, namespace, order.key, order.parent, place)
        if (header.codec == Codec.RAW) != raw:
            raise Corrupt("the header contradicts itself")
        for at in range(PIECE_BYTES, len(target), PIECE_BYTES):
            with drive.operation():
                done += read_at(drive.files, fd, [target[at : at + PIECE_BYTES]], place.offset + HEADER_BYTES + at)
    if done != place.record_bytes:
        raise Corrupt("the extent is too short")
    reach("spill.read.after")
    chunk = slot[: namespace.chunk_bytes]
    if not raw:
        try:
            codec.decode(target[: header.stored_bytes], chunk)
        except codec.Undecodable as error:
            raise Corrupt(str(error)) from error
    if checksum_of(chunk) != header.checksum:
        raise Corrupt("the bytes do not have their checksum")
    return header.checksum


def move_record(source: Drive, target: Drive, order: Move, buffers: Buffers) -> None:
    """Copies a record, and checks its stored bytes on the way. Raises Corrupt, Failed.

    The header goes last, so a record that turns out to be corrupt never gets one at its new place.
    """
    if order.target.record_bytes != order.source.record_bytes:
        raise ValueError(f"{order.target.record_bytes} bytes for a record of {order.source.record_bytes}")
    reach("spill.move.before")
    with contextlib.ExitStack() as files:
        with _Blaming(source, reading=True):
            reading = files.enter_context(source.extents.open(order.source.extent, os.O_RDONLY))
            with source.operation():
                read_at(source.files, reading, [buffers.page], order.source.offset)
            header = _header(buffers.page, source, order.namespace, order.key, order.parent, order.source)
        with _Blaming(target):
            target.prepare(order.namespace, order.target)
            writing = files.enter_context(target.extents.open(order.target.extent, os.O_RDWR))
        digest = xxhash.xxh3_64()
        length = order.source.record_bytes - HEADER_BYTES
        for at in range(0, length, PIECE_BYTES):
            piece = buffers.scratch(min(PIECE_BYTES, length - at))
            with _Blaming(source, reading=True), source.operation():
                if read_at(source.files, reading, [piece], order.source.offset + HEADER_BYTES + at) != len(piece):
                    raise Corrupt("the extent is too short")
            digest.update(piece[: header.stored_bytes - at])
            if at + len(piece) == length and digest.intdigest() != header.stored_checksum:
                raise Corrupt("the bytes do not have their checksum")
            with _Blaming(target), target.operation():
                write_at(target.files, writing, [piece], order.target.offset + HEADER_BYTES + at)
        with _Blaming(target):
            reach("spill.move.header.before")
            header = _at(order.target, header, target)
            pack_record(buffers.page, header, target.directory.superblock.secret)
            with target.operation():
                write_at(target.files, writing, [buffers.page], order.target.offset)
            target.extents.wrote(header)
    reach("spill.move.after")


class _Blaming:
    """What fails inside is told as the failure of ``drive``. A class, not a generator: every read passes here."""

    __slots__ = ("_drive", "_reading")

    def __init__(self, drive: Drive, *, reading: bool = False) -> None:
        self._drive = drive
        self._reading = reading

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, (OSError, DriveFailed)):
            raise Failed(self._drive, error, reading=self._reading) from error


def _at(place: Place, header: Header, drive: Drive) -> Header:
    return header._replace(
        extent=place.extent, offset=place.offset, life=drive.extents.life_of(place), sequence=place.sequence
    )


def _header(page: memoryview, drive: Drive, namespace: Namespace, key: bytes, parent: bytes, place: Place) -> Header:
    """The header in ``page``, if it is the one that belongs at ``place``; Corrupt otherwise."""
    header = parse_record(page, drive.directory.superblock.secret)
    if header is None:
        raise Corrupt("there is no intact header")
    identity = namespace.identity
    if (
        header.extent != place.extent
        or header.offset != place.offset
        or header.record_bytes != place.record_bytes
        or header.sequence != place.sequence
        or header.namespace_id != namespace.id
        or header.key != key
        or header.parent != parent
        or header.chunk_bytes != namespace.chunk_bytes
        or header.layers != identity.num_layers
        or header.heads != identity.num_kv_heads
    ):
        raise Corrupt("the header is that of another record")
    raw = header.codec == Codec.RAW
    if record_bytes(header.stored_bytes) != place.record_bytes or raw != (header.stored_bytes == header.chunk_bytes):
        raise Corrupt("the header contradicts itself")
    if not raw and header.codec != Codec.PLANES:
        raise Corrupt(f"codec {header.codec} is not known")
    return header
