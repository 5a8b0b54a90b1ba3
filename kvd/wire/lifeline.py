"""The lifeline: the Unix socket over which a client gets the pool's descriptors and proves that it lives.

One SOCK_SEQPACKET connection per process that maps the pool. The client sends HELLO, the daemon answers WELCOME with
the descriptors (SCM_RIGHTS), and then both keep the connection open and silent. When the client's process ends,
however it ends, the kernel closes the socket: only then do the write leases of its session end. When the daemon ends,
the client sees the end of file at once.

``OPEN`` comes first and yields a ticket, to be shown in the gRPC ``Hello``: it ties the session to the user and
process that the kernel reports for this socket. ``ATTACH`` joins a further process (a tensor-parallel worker, say) to a
session that exists: its write leases end only when the lifelines of *all* its processes are closed.

The descriptors come in this order:

1. two per segment: the data (read-write), then the generation table (read-only);
2. the call channel: one end of a stream socket for the frames of ``kvd/wire/calls.py``. Who has it asks in the name of
   this lifeline's session. Before the lifeline is in a session calls are answered SESSION_UNKNOWN;
3. when the daemon has one (WELCOME gives its size, otherwise 0), the presence table, read-only;
4. when the pool can outlive the daemon, the holder.

The kernel closes the channel with the lifeline when the process ends, but the lifeline's end of file alone is the
proof that it has ended.

**The holder** is an open file description with a read lock on the byte
``lock_offset(daemon id)`` of a file beside the pool. The client never maps or reads it. It keeps it open exactly as
long as the lifeline: until nothing in this process refers to the pool's bytes on behalf of this connection. With the
daemon the lifeline's proof is lost; the lock is not: the kernel keeps it until the last process that has the
description has closed it or ended, and the next daemon asks for it (F_OFD_GETLK) before it gives away what was being
written.

**Generation table.** A header of 64 bytes, then one unsigned 64-bit little-endian word per granule of the segment. The
word of the granule in which a slot begins holds the slot's generation while the slot's bytes may be used, and 0
otherwise. Generations are never reused. A reader that finds its generation there *after* its copy has copied the right
bytes; otherwise it has a miss.
"""

from __future__ import annotations

import struct
from enum import IntEnum, unique
from typing import NamedTuple

MAGIC = b"KVDL"
VERSION = 4
#: Largest message in either direction.
MAX_MESSAGE_BYTES = 4096
#: Most segments in one WELCOME: two descriptors each and three more, and the kernel passes at most 253 at a time.
MAX_SEGMENTS = 64
MAX_DESCRIPTORS = 2 * MAX_SEGMENTS + 3

HELLO = struct.Struct("<4sHH16s")  # magic, version, Kind, session token (ATTACH) or zeros (OPEN)
# What a WELCOME of any version begins with: magic, version, Status.
PREFIX = struct.Struct("<4sHH")
# The prefix, daemon id, ticket, number of segments, number of holders (0 or 1), bytes of the presence table (0 = none).
WELCOME = struct.Struct("<4sHHQ16sIIQ")
SEGMENT = struct.Struct("<IIQQQ")  # index, granule bytes, data bytes, table bytes, page size of the backing

TABLE_MAGIC = b"KVDGENS1"
TABLE_HEADER_BYTES = 64
TABLE_HEADER = struct.Struct("<8sIIQQ")  # magic, granule bytes, segment index, number of granules, daemon id
WORD_BYTES = 8

#: Slots begin at multiples of this, so every slot has a word of its own. Bytes.
GRANULE_BYTES = 4096


@unique
class Kind(IntEnum):
    """Why a client connects."""

    OPEN = 1
    ATTACH = 2


@unique
class Status(IntEnum):
    """Answer to HELLO; anything but OK comes without descriptors and ends the connection."""

    OK = 0
    BAD_VERSION = 1
    REFUSED_USER = 2
    UNKNOWN_SESSION = 3
    TOO_MANY = 4


class SegmentInfo(NamedTuple):
    """What a client needs to know to map a segment."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs of this
    granule_bytes: int
    data_bytes: int
    table_bytes: int
    page_bytes: int


def lock_offset(daemon_id: int) -> int:
    """The byte of the holders' file that stands for one life of the daemon."""
    return daemon_id >> 2  # offsets have a sign


def socket_path(grpc_socket: str) -> str:
    """Path of the lifeline socket that belongs to a gRPC socket."""
    return grpc_socket + ".shm"
