"""Calls of an engine: Lookup, Reserve, Commit, Abort, Release and Renew as struct frames over a stream socket.

A gRPC call costs several times as much in Python, whatever it carries (docs/adr/0017). On the daemon's node the channel
comes with the lifeline (``kvd/wire/lifeline.py``); from elsewhere it is a TCP connection of the data plane that has
shown the session's token (``kvd/wire/frames.py``). The version of either is the version of these frames too. Who has
the channel asks in the name of its session, and nothing else has to be shown. Everything means what it means in
``kvd.proto``; all numbers are little-endian::

    client                                                       daemon
    REQUEST  length, op, flags, released, request id, missed; what op asks; the ids that are released ->
                                                              <- ANSWER  length, op, code, request id; what op answers

A length is that of the whole frame. Answers come in the order of the requests. A client that has stopped waiting knows
a late answer by its request id. What follows the header of a request:

=======  ===============================================================================================
LOOKUP   CHUNKS with ``skip``; the keys
RESERVE  CHUNKS with the number of parents; the keys, one byte for each parent (1, or 0 = none), the parents
COMMIT   CHUNKS with the number of stripes; the keys, the stripes (of every key; none = the whole chunk)
ABORT    CHUNKS; the keys (none = all that the lease holds)
RELEASE  the number of lease ids, the ids
RENEW    the same
=======  ===============================================================================================

Keys and parents have 32 bytes each. A Reserve that is CHAINED has one parent, that of its first chunk: each further
chunk's parent is the chunk before it. What follows the header of an answer whose code is OK (otherwise a text):

=======  ===============================================================================================
LOOKUP   FOUND; the slots
RESERVE  RESERVED; one byte for each item (``ReserveStatus``), the slots of those that were granted
COMMIT   a count, one byte for each item (``CommitStatus``)
ABORT    how many there were
RELEASE  how many there were
RENEW    a count, one byte for each lease (1 = alive)
=======  ===============================================================================================

Slots come in columns: all segments (4 bytes each), all offsets, all generations (8 bytes each).

``missed`` in a request's header says how many lookups, and of how many chunks, the client has known to be misses since
its last report and has not asked: the daemon counts them as if it had been asked. ``released`` says how many lease ids
(8 bytes each) follow what is asked: read leases that are over. They end before the request is answered, as by a Release
of its own, of which nobody hears.

Both sides end the channel when the other breaks these rules. A frame longer than a request of the daemon's bound can
need (``max_request_bytes``) breaks them; nobody waits for the rest of it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum, unique
from typing import NamedTuple

from kvd.wire.chunks import ROOT, Location, Stripe, locations
from kvd.wire.errors import BY_REASON, KvdError
from kvd.wire.identity import KEY_BYTES, NAMESPACE_ID_BYTES

LENGTH = struct.Struct("<I")
REQUEST = struct.Struct("<IBBHQII")  # length, Op, flags, released, request id, missed lookups, missed chunks
CHUNKS = struct.Struct(f"<{NAMESPACE_ID_BYTES}sQII")  # namespace id, lease id, number of keys, see above
ANSWER = struct.Struct("<IBBHQ")  # length, Op, Code, reserved, request id
FOUND = struct.Struct("<III")  # number of slots, promoting, writing
RESERVED = struct.Struct("<II")  # number of items, number of slots
COUNT = struct.Struct("<I")

_KEY = struct.Struct(f"{KEY_BYTES}s")
_STRIPE = struct.Struct("<IIII")
_SLOT_BYTES = 4 + 8 + 8
_LEASE_BYTES = 8
_NO_KEY = bytes(KEY_BYTES)

#: Most stripes of a chunk in one Commit; an engine sends one per rank.
MAX_STRIPES = 4096
#: The text of an error is cut to this.
MAX_TEXT_BYTES = 1024
#: Most leases that are released along with a request.
MAX_RELEASED = 1024
#: Most lookups, and most chunks, that one report of misses can name.
MAX_MISSED = 0xFFFFFFFF


@unique
class Op(IntEnum):
    """What a request asks for."""

    LOOKUP = 1
    RESERVE = 2
    COMMIT = 3
    ABORT = 4
    RELEASE = 5
    RENEW = 6


#: Flag of LOOKUP: these keys were looked up before and are only waited for.
AGAIN = 1
#: Flag of RESERVE: see above.
CHAINED = 1

_FLAGS = {Op.LOOKUP: AGAIN, Op.RESERVE: CHAINED}
_NUMBERS = {int(op): op for op in Op}


@unique
class Code(IntEnum):
    """How a call ended: OK, or the ``reason`` of an error of ``kvd/wire/errors.py``."""

    OK = 0
    INTERNAL = 1
    INVALID_REQUEST = 2
    PROTOCOL_MISMATCH = 3
    UNAUTHENTICATED = 4
    SESSION_UNKNOWN = 5
    PERMISSION_DENIED = 6
    NAMESPACE_UNKNOWN = 7
    LIMIT_REACHED = 8
    DRAINING = 9


_ERRORS: dict[int, type[KvdError]] = {code: BY_REASON[code.name] for code in Code if code is not Code.OK}


class BadFrame(ValueError):
    """The other side breaks the rules of this file: the channel ends."""


class Lookup(NamedTuple):
    """See ``LookupRequest``."""

    namespace_id: bytes
    lease_id: int
    keys: Sequence[bytes]
    skip: int = 0
    again: bool = False


class Reserve(NamedTuple):
    """See ``ReserveRequest``; ``items`` are (key, parent or ROOT)."""

    namespace_id: bytes
    lease_id: int
    items: Sequence[tuple[bytes, bytes]]


class Commit(NamedTuple):
    """See ``CommitRequest``; ``stripes`` are those of every key."""

    namespace_id: bytes
    lease_id: int
    keys: Sequence[bytes]
    stripes: Sequence[Stripe] = ()


class Abort(NamedTuple):
    """See ``AbortRequest``."""

    namespace_id: bytes
    lease_id: int
    keys: Sequence[bytes] = ()


class Release(NamedTuple):
    """See ``ReleaseRequest``."""

    lease_ids: Sequence[int]


class Renew(NamedTuple):
    """See ``RenewRequest``."""

    lease_ids: Sequence[int] = ()


Request = Lookup | Reserve | Commit | Abort | Release | Renew

_OPS: dict[type[Request], Op] = {
    Lookup: Op.LOOKUP,
    Reserve: Op.RESERVE,
    Commit: Op.COMMIT,
    Abort: Op.ABORT,
    Release: Op.RELEASE,
    Renew: Op.RENEW,
}


class Head(NamedTuple):
    """What a request's header says beside the length."""

    op: Op
    request_id: int
    missed_lookups: int
    missed_chunks: int
    released: Sequence[int]


def op_of(request: Request) -> Op:
    """What a request asks for."""
    return _OPS[type(request)]


def max_request_bytes(max_chunks: int) -> int:
    """The longest request of a daemon that takes ``max_chunks`` in one. Thousands of lease ids fit as well."""
    asked = CHUNKS.size + max_chunks * (2 * KEY_BYTES + 1) + MAX_STRIPES * _STRIPE.size
    return REQUEST.size + asked + MAX_RELEASED * _LEASE_BYTES


def max_answer_bytes(max_chunks: int) -> int:
    """The longest answer to any of these requests."""
    lease_ids = max_request_bytes(max_chunks) // _LEASE_BYTES
    return ANSWER.size + FOUND.size + max(max_chunks * (1 + _SLOT_BYTES), lease_ids, MAX_TEXT_BYTES)


def frame_length(head: bytes | bytearray) -> int:
    """What the first 4 bytes of a frame say of its length."""
    length: int = LENGTH.unpack_from(head)[0]
    return length


# ---------------------------------------------------------------- requests


def pack_request(
    request: Request, request_id: int, missed: tuple[int, int] = (0, 0), released: Sequence[int] = ()
) -> bytes:
    """A frame. Keys have the length of a key. struct.error when a number does not fit its field."""
    flags = 0
    match request:
        case Lookup(namespace_id, lease_id, keys, skip, again):
            flags = AGAIN if again else 0
            body = CHUNKS.pack(namespace_id, lease_id, len(keys), skip) + b"".join(keys)
        case Reserve(namespace_id, lease_id, items):
            keys, parents = [key for key, _ in items], [parent for _, parent in items]
            if keys and parents[1:] == keys[:-1]:
                flags = CHAINED
                del parents[1:]
            body = b"".join(
                (
                    CHUNKS.pack(namespace_id, lease_id, len(keys), len(parents)),
                    *keys,
                    bytes([parent != ROOT for parent in parents]),
                    *(parent or _NO_KEY for parent in parents),
                )
            )
        case Commit(namespace_id, lease_id, keys, stripes):
            ends = (_STRIPE.pack(*stripe) for stripe in stripes)
            body = b"".join((CHUNKS.pack(namespace_id, lease_id, len(keys), len(stripes)), *keys, *ends))
        case Abort(namespace_id, lease_id, keys):
            body = CHUNKS.pack(namespace_id, lease_id, len(keys), 0) + b"".join(keys)
        case Release(lease_ids) | Renew(lease_ids):
            body = struct.pack(f"<I{len(lease_ids)}Q", len(lease_ids), *lease_ids)
    if released:
        body += struct.pack(f"<{len(released)}Q", *released)
    head = REQUEST.pack(REQUEST.size + len(body), op_of(request), flags, len(released), request_id, *missed)
    return head + body


def unpack_request(frame: bytes | bytearray) -> tuple[Head, Request]:
    """What a whole frame asks. Raises BadFrame; what it does not check, whoever answers must: bounds, doubles."""
    if len(frame) < REQUEST.size:
        raise BadFrame(f"a request of {len(frame)} bytes")
    length, number, flags, leases, request_id, lookups, chunks = REQUEST.unpack_from(frame)
    op = _NUMBERS.get(number)
    if length != len(frame) or op is None:
        raise BadFrame(f"no request: length {length}, op {number}")
    if flags & ~_FLAGS.get(op, 0):
        raise BadFrame(f"flags {flags} of {op.name}")
    rest = memoryview(frame)[REQUEST.size :]
    released: Sequence[int] = ()
    if leases:
        begin = len(rest) - leases * _LEASE_BYTES
        if begin < 0 or leases > MAX_RELEASED:
            raise BadFrame(f"{leases} leases are released in {len(frame)} bytes")
        released = struct.unpack_from(f"<{leases}Q", rest, begin)
        rest = rest[:begin]
    head = Head(op, request_id, lookups, chunks, released)
    if op in (Op.RELEASE, Op.RENEW):
        lease_ids = _lease_ids(rest)
        return head, Release(lease_ids) if op is Op.RELEASE else Renew(lease_ids)
    if len(rest) < CHUNKS.size:
        raise BadFrame(f"{op.name} of {len(frame)} bytes")
    namespace_id, lease_id, count, more = CHUNKS.unpack_from(rest)
    rest = rest[CHUNKS.size :]
    keys_bytes = count * KEY_BYTES
    if op is Op.RESERVE:
        _expect(op, rest, keys_bytes + more * (1 + KEY_BYTES))
        if more != (1 if flags & CHAINED else count) or more > count:
            raise BadFrame(f"{more} parents of {count} chunks")
        keys = _keys(rest[:keys_bytes])
        there, parents = rest[keys_bytes : keys_bytes + more], _keys(rest[keys_bytes + more :])
        parents = [parent if is_there else ROOT for is_there, parent in zip(there, parents, strict=True)]
        if flags & CHAINED:
            parents += keys[:-1]
        return head, Reserve(namespace_id, lease_id, list(zip(keys, parents, strict=True)))
    if op is Op.COMMIT:
        _expect(op, rest, keys_bytes + more * _STRIPE.size)
        stripes = [Stripe(*stripe) for stripe in _STRIPE.iter_unpack(rest[keys_bytes:])]
        return head, Commit(namespace_id, lease_id, _keys(rest[:keys_bytes]), stripes)
    _expect(op, rest, keys_bytes)
    if op is Op.LOOKUP:
        return head, Lookup(namespace_id, lease_id, _keys(rest), more, bool(flags & AGAIN))
    return head, Abort(namespace_id, lease_id, _keys(rest))


def _expect(op: Op, rest: memoryview, size: int) -> None:
    if len(rest) != size:
        raise BadFrame(f"{op.name} says {size} bytes and has {len(rest)}")


def _keys(rest: memoryview) -> list[bytes]:
    return [key for (key,) in _KEY.iter_unpack(rest)]


def _lease_ids(rest: memoryview) -> list[int]:
    count, rest = _count(rest)
    if len(rest) != _LEASE_BYTES * count:
        raise BadFrame(f"{count} lease ids in {len(rest)} bytes")
    return list(struct.unpack(f"<{count}Q", rest))


# ---------------------------------------------------------------- answers


def pack_answer(op: Op, request_id: int, body: bytes, code: Code = Code.OK) -> bytes:
    """A frame: ``body`` is what one of the functions below makes."""
    return ANSWER.pack(ANSWER.size + len(body), op, code, 0, request_id) + body


def pack_failure(op: Op, request_id: int, error: KvdError) -> bytes:
    """A frame that says that, and why, a call has failed."""
    text = str(error).encode()[:MAX_TEXT_BYTES]
    return pack_answer(op, request_id, text, Code.__members__.get(error.reason, Code.INTERNAL))


def unpack_answer(frame: bytes | bytearray) -> tuple[int, Op, memoryview | KvdError]:
    """(request id, op, body) of a whole frame; an error instead of the body when the call has failed.

    Raises BadFrame.
    """
    if len(frame) < ANSWER.size:
        raise BadFrame(f"an answer of {len(frame)} bytes")
    length, number, code, _, request_id = ANSWER.unpack_from(frame)
    op = _NUMBERS.get(number)
    if length != len(frame) or op is None:
        raise BadFrame(f"no answer: length {length}, op {number}")
    body = memoryview(frame)[ANSWER.size :]
    if code == Code.OK:
        return request_id, op, body
    return request_id, op, _ERRORS.get(code, KvdError)(str(body, "utf-8", "replace"))


def pack_found(slots: Sequence[Location], promoting: int, writing: int) -> bytes:
    """The body of the answer to LOOKUP."""
    return FOUND.pack(len(slots), promoting, writing) + _pack_slots(slots)


def unpack_found(body: memoryview) -> tuple[list[Location], int, int]:
    """(slots, promoting, writing). Raises BadFrame."""
    if len(body) < FOUND.size:
        raise BadFrame("an answer to LOOKUP that is too short")
    count, promoting, writing = FOUND.unpack_from(body)
    return _unpack_slots(body[FOUND.size :], count), promoting, writing


def pack_reserved(statuses: Sequence[int], granted: Sequence[Location]) -> bytes:
    """The body of the answer to RESERVE."""
    return RESERVED.pack(len(statuses), len(granted)) + bytes(statuses) + _pack_slots(granted)


def unpack_reserved(body: memoryview) -> tuple[memoryview, list[Location]]:
    """(statuses, slots of those granted); a status may be one that is not known here. Raises BadFrame."""
    if len(body) < RESERVED.size:
        raise BadFrame("an answer to RESERVE that is too short")
    count, granted = RESERVED.unpack_from(body)
    slots_at = RESERVED.size + count
    return body[RESERVED.size : slots_at], _unpack_slots(body[slots_at:], granted)


def pack_bytes(values: Sequence[int]) -> bytes:
    """The body of the answers to COMMIT and RENEW: one byte each."""
    return COUNT.pack(len(values)) + bytes(values)


def unpack_bytes(body: memoryview) -> memoryview:
    """One byte for each item of COMMIT or lease of RENEW. Raises BadFrame."""
    count, rest = _count(body)
    if len(rest) != count:
        raise BadFrame(f"{count} outcomes in {len(rest)} bytes")
    return rest


def pack_count(count: int) -> bytes:
    """The body of the answers to ABORT and RELEASE."""
    return COUNT.pack(count)


def unpack_count(body: memoryview) -> int:
    """How many there were of ABORT or RELEASE. Raises BadFrame."""
    count, rest = _count(body)
    if rest:
        raise BadFrame(f"a count in {len(body)} bytes")
    return count


def _count(body: memoryview) -> tuple[int, memoryview]:
    if len(body) < COUNT.size:
        raise BadFrame(f"no count in {len(body)} bytes")
    return COUNT.unpack_from(body)[0], body[COUNT.size :]


def _pack_slots(slots: Sequence[Location]) -> bytes:
    if not slots:
        return b""
    count = len(slots)
    segments, offsets, generations = zip(*slots, strict=True)
    return struct.pack(f"<{count}I{2 * count}Q", *segments, *offsets, *generations)


def _unpack_slots(rest: memoryview, count: int) -> list[Location]:
    if len(rest) != count * _SLOT_BYTES:
        raise BadFrame(f"{count} slots in {len(rest)} bytes")
    numbers = struct.unpack(f"<{count}I{2 * count}Q", rest)
    return locations(numbers[:count], numbers[count : 2 * count], numbers[2 * count :])
