"""The layout of a record and of an extent's first page, and how both are believed.

    extent:  [extent header, 4 KiB][record][record]...
    record:  [record header, 4 KiB][stored bytes][padding to 4 KiB]

A header says all there is to say of its record, and where it lies; an index beside the extent (``kvd.spill.index``) is
a shortcut only. Its last 16 bytes are a BLAKE2b of what comes before, keyed with the secret of the directory: payload
is chosen by clients, and a scan that looks for the next header after a damaged one must never take payload for it.
``life`` is new each time an extent is filled anew; a record counts only in the life that the extent's header names.
"""

from __future__ import annotations

import hashlib
import struct
from enum import IntEnum
from typing import NamedTuple

from kvd.wire.identity import KEY_BYTES

#: Everything begins at multiples of this, and direct I/O asks for it.
PAGE_BYTES = 4096
HEADER_BYTES = PAGE_BYTES
#: Of everything in a spill directory. Another one is not read.
FORMAT_VERSION = 1

SECRET_BYTES = 32
LIFE_BYTES = 16
CHECK_BYTES = 16
_RECORD_MAGIC = b"kvd:rec\x01"
_EXTENT_MAGIC = b"kvd:ext\x01"
#: The magic of a record header as a native 64-bit word.
RECORD_WORD = int.from_bytes(_RECORD_MAGIC, "little")

_RECORD = struct.Struct("<8sHBBIIIQQQQQQQ16s32s32s32s")
_EXTENT = struct.Struct("<8sHHIQ16s")


class Codec(IntEnum):
    """How the stored bytes become the chunk's."""

    RAW = 0
    PLANES = 1


class Header(NamedTuple):
    """What a record's header says."""

    extent: int
    offset: int  # of the header in the extent, bytes
    life: bytes
    record_bytes: int
    sequence: int
    namespace_id: bytes
    key: bytes
    parent: bytes  # ROOT for the first chunk of a prefix
    chunk_bytes: int
    layers: int
    heads: int
    codec: int
    stored_bytes: int
    checksum: int  # of the chunk's bytes, xxh3_64
    stored_checksum: int  # of the stored bytes, xxh3_64


def padded(length: int) -> int:
    """``length`` bytes rounded up to whole pages."""
    return -(-length // PAGE_BYTES) * PAGE_BYTES


def record_bytes(stored_bytes: int) -> int:
    """Size on disk of a record with so many stored bytes."""
    return HEADER_BYTES + padded(stored_bytes)


def pack_record(page: memoryview, header: Header, secret: bytes) -> None:
    """Writes ``header`` to the begin of ``page``."""
    if len(header.key) != KEY_BYTES or len(header.parent) not in (0, KEY_BYTES) or len(header.life) != LIFE_BYTES:
        raise ValueError("a key, a parent or a life of the wrong length")
    _RECORD.pack_into(
        page,
        0,
        _RECORD_MAGIC,
        FORMAT_VERSION,
        header.codec,
        len(header.parent),
        header.extent,
        header.layers,
        header.heads,
        header.offset,
        header.record_bytes,
        header.sequence,
        header.chunk_bytes,
        header.stored_bytes,
        header.checksum,
        header.stored_checksum,
        header.life,
        header.namespace_id,
        header.key,
        header.parent,
    )
    struct.pack_into("16s", page, _RECORD.size, check_of(page[: _RECORD.size], secret))


def parse_record(page: memoryview, secret: bytes, at: int = 0) -> Header | None:
    """The header that begins at byte ``at`` of ``page``; None when there is none that is intact."""
    fields = _RECORD.unpack_from(page, at)
    if fields[0] != _RECORD_MAGIC or fields[1] != FORMAT_VERSION:
        return None
    view = page[at : at + _RECORD.size + CHECK_BYTES]
    if check_of(view[: _RECORD.size], secret) != view[_RECORD.size :]:
        return None
    (_, _, codec, parent_bytes, extent, layers, heads, offset, size, sequence, chunk_bytes, stored_bytes) = fields[:12]
    (checksum, stored_checksum, life, namespace_id, key, parent) = fields[12:]
    return Header(
        extent,
        offset,
        life,
        size,
        sequence,
        namespace_id,
        key,
        parent[:parent_bytes],
        chunk_bytes,
        layers,
        heads,
        codec,
        stored_bytes,
        checksum,
        stored_checksum,
    )


def pack_extent(page: memoryview, extent: int, extent_bytes: int, life: bytes, secret: bytes) -> None:
    """Writes the header of an extent to the begin of ``page``."""
    _EXTENT.pack_into(page, 0, _EXTENT_MAGIC, FORMAT_VERSION, 0, extent, extent_bytes, life)
    struct.pack_into("16s", page, _EXTENT.size, check_of(page[: _EXTENT.size], secret))


def parse_extent(page: memoryview, extent: int, secret: bytes) -> bytes | None:
    """The life that the header of extent number ``extent`` names; None when there is none that is intact."""
    magic, version, _, number, _, life = _EXTENT.unpack_from(page, 0)
    if magic != _EXTENT_MAGIC or version != FORMAT_VERSION or number != extent:
        return None
    if check_of(page[: _EXTENT.size], secret) != page[_EXTENT.size : _EXTENT.size + CHECK_BYTES]:
        return None
    return life  # type: ignore[no-any-return]


def check_of(content: bytes | memoryview, secret: bytes) -> bytes:
    """What is written behind ``content``, so that it is believed to have been written here. ``CHECK_BYTES`` long."""
    return hashlib.blake2b(content, digest_size=CHECK_BYTES, key=secret).digest()
