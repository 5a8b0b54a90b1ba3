"""The data plane: frames that move slot bytes over TCP. Little-endian, fixed sizes, no text.

A connection begins with a handshake, then the client sends requests and reads their answers, which come in the same
order; it may send the next request before the answer to the last has come::

    client                                   daemon
    HELLO  magic, version, purpose, session token ->
                                          <- HELLO_REPLY  magic, version, status
    REQUEST op=READ,  items              ->
                                          <- REPLY; all statuses; per item that is OK: payload, checksum
    REQUEST op=WRITE, items; per item: payload, checksum ->
                                          <- REPLY; all statuses

An item names a slot by (segment, offset, generation) and the bytes inside it by one ``Span``. The session's lease
decides whether it may be touched: a read needs a live read lease on the slot, a write a write lease. The payload of
an item is its runs one after the other; the checksum is XXH3-64 of the payload (https://xxhash.com), 8 bytes.
A daemon that refuses an item of a WRITE still takes its payload off the wire, so the stream stays in step. Once the
first byte of payload has come, the rest of the request or answer follows without waiting for the other side.

A connection whose purpose is CALLS carries none of this after the handshake: it is the session's call channel
(``kvd/wire/calls.py``).
"""

from __future__ import annotations

import struct
from enum import IntEnum, unique
from typing import NamedTuple

from kvd.wire.spans import Span

MAGIC = b"KVDD"
VERSION = 4
TOKEN_BYTES = 16

#: Most items in one request. A longer request is a protocol error: the daemon closes the connection.
MAX_ITEMS = 1024
#: Most payload bytes in one request, all items together.
MAX_REQUEST_BYTES = 1 << 30
#: Most runs in one request, all items together (adjoining runs count as one): bounds the scatter lists that a request
#: can make the daemon build.
MAX_RUNS = 1 << 16

HELLO = struct.Struct("<4sHH16s")  # magic, version, Purpose, session token
HELLO_REPLY = struct.Struct("<4sHH")  # magic, version, HelloStatus
REQUEST = struct.Struct("<BBHIQ")  # op, flags, reserved, number of items, lease id
ITEM = struct.Struct("<IIQQQQQI4x")  # segment, reserved, slot offset, generation, span offset, run, stride, count
REPLY = struct.Struct("<HHI")  # reserved, reserved, number of items
ITEM_STATUS = struct.Struct("<I")
CHECKSUM = struct.Struct("<Q")


@unique
class Purpose(IntEnum):
    """What a connection is for."""

    DATA = 0
    CALLS = 1


@unique
class HelloStatus(IntEnum):
    """Answer to the handshake of a data connection."""

    OK = 0
    BAD_VERSION = 1
    UNKNOWN_SESSION = 2
    TOO_MANY = 3


class Op(IntEnum):
    """What a request asks for."""

    READ = 1
    WRITE = 2


class ItemStatus(IntEnum):
    """Outcome of one item. Anything but OK is a miss for a reader and a failed store for a writer."""

    OK = 0
    GONE = 1  # no lease of this session on that slot and generation (any more)
    BAD_SPAN = 2  # outside the slot
    CHECKSUM = 3  # the payload that arrived is not the one that was sent


#: Request flag: the payload carries no checksums (both directions); for links that check by themselves.
FLAG_NO_CHECKSUM = 1


class Item(NamedTuple):
    """One slot range of a request."""

    segment: int
    offset: int
    generation: int
    span: Span


def pack_request(op: Op, lease_id: int, items: list[Item], flags: int = 0) -> bytearray:
    """Header and item table of a request, ready to send."""
    out = bytearray(REQUEST.size + ITEM.size * len(items))
    REQUEST.pack_into(out, 0, op, flags, 0, len(items), lease_id)
    at = REQUEST.size
    for item in items:
        ITEM.pack_into(out, at, item.segment, 0, item.offset, item.generation, *item.span)
        at += ITEM.size
    return out


def unpack_items(table: bytes | bytearray | memoryview, count: int) -> list[Item]:
    """The item table of a request. Says nothing about whether the items are allowed."""
    items = []
    for i in range(count):
        segment, _, offset, generation, *span = ITEM.unpack_from(table, i * ITEM.size)
        items.append(Item(segment, offset, generation, Span(*span)))
    return items
