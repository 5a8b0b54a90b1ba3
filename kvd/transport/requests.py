"""One request of the data plane: taken off the wire and bounded, allowed by the books, answered."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol

from kvd.types import LeaseId, SessionId
from kvd.wire.frames import (
    CHECKSUM,
    FLAG_NO_CHECKSUM,
    ITEM,
    ITEM_STATUS,
    MAX_ITEMS,
    MAX_REQUEST_BYTES,
    MAX_RUNS,
    REPLY,
    REQUEST,
    Item,
    ItemStatus,
    Op,
    unpack_items,
)
from kvd.wire.stream import PIECE_BYTES, Stream

log = logging.getLogger(__name__)

#: A request may take the I/O timeout, and on top of it as long as its payload needs at this rate.
SLOWEST_BYTES_PER_S = 4 << 20

#: Called after every request: "read" or "write", payload bytes that were moved, seconds.
Observer = Callable[[str, int, float], None]


class Authority(Protocol):
    """The books, as the connection threads see them. Every call returns or raises within a deadline of its own."""

    def admit(self, token: bytes) -> SessionId | None:
        """The session of this token, or None."""

    def begin_io(
        self, session: SessionId, op: Op, lease_id: LeaseId, items: Sequence[Item]
    ) -> tuple[Any, Sequence[ItemStatus]]:
        """A ticket and one status per item. The slots of OK items serve nobody else until ``end_io``."""

    def end_io(self, ticket: Any, failed: Collection[int]) -> None:
        """Nothing moves any more under ``ticket``. ``failed``: indices of items whose bytes did not arrive intact."""


class MalformedRequest(Exception):
    """The client breaks the rules of the frames: its connection is closed."""


class Request(NamedTuple):
    """A request whose sizes have been checked against the bounds of the protocol, and nothing else."""

    op: Op
    lease_id: LeaseId
    checked: bool  # payloads carry checksums
    items: list[Item]
    payload_bytes: int
    deadline: float  # of the whole exchange, time.monotonic()


def receive_request(stream: Stream, io_timeout_s: float) -> Request:
    """Waits for the next request, as long as the peer lives, and takes its item table off the wire.

    Raises MalformedRequest, TimeoutError (the table did not follow its header in time) or OSError.
    """
    op, flags, _, count, lease_id = REQUEST.unpack(stream.receive(REQUEST.size, None))
    if op not in (Op.READ, Op.WRITE) or flags & ~FLAG_NO_CHECKSUM or not 1 <= count <= MAX_ITEMS:
        raise MalformedRequest(f"op {op}, flags {flags}, {count} items")
    table = stream.receive(ITEM.size * count, time.monotonic() + io_timeout_s)
    items = unpack_items(table, count)
    payload_bytes = runs = 0
    for item in items:
        if not item.span.fits(1 << 64):
            raise MalformedRequest(f"{item.span}")
        payload_bytes += item.span.size
        runs += 1 if item.span.stride == item.span.run else item.span.count
    if payload_bytes > MAX_REQUEST_BYTES or runs > MAX_RUNS:
        raise MalformedRequest(f"{payload_bytes} bytes in {runs} runs")
    deadline = time.monotonic() + io_timeout_s + payload_bytes / SLOWEST_BYTES_PER_S
    return Request(Op(op), lease_id, not flags & FLAG_NO_CHECKSUM, items, payload_bytes, deadline)


class Answerer:
    """Answers the requests of one connection of ``session``; ``segments`` are the writable bytes of the pool."""

    def __init__(
        self,
        stream: Stream,
        session: SessionId,
        segments: Sequence[memoryview],
        authority: Authority,
        observer: Observer,
    ) -> None:
        self._stream = stream
        self._session = session
        self._segments = segments
        self._authority = authority
        self._observer = observer
        self._scratch = memoryview(b"")

    def answer(self, request: Request) -> None:
        """Carries ``request`` out. Raises KvdError (the books refuse the session), TimeoutError or OSError; then the
        connection is out of step. When this returns or raises, nothing moves any more and the books know."""
        begun = time.monotonic()
        ticket, given = self._authority.begin_io(self._session, request.op, request.lease_id, request.items)
        failed: set[int] = set()
        moved_bytes = 0
        try:
            memories = [
                self._memory(item) if status == ItemStatus.OK else None
                for item, status in zip(request.items, given, strict=True)
            ]
            statuses = [
                ItemStatus.BAD_SPAN if status == ItemStatus.OK and memory is None else status
                for status, memory in zip(given, memories, strict=True)
            ]
            if request.op == Op.READ:
                moved_bytes = self._send(request, statuses, memories)
            else:
                # Until an item has arrived whole it has failed.
                failed.update(i for i, memory in enumerate(memories) if memory is not None)
                moved_bytes = self._receive(request, statuses, memories, failed)
        finally:
            self._authority.end_io(ticket, failed)
        if request.op == Op.WRITE:
            reply = bytearray(REPLY.pack(0, 0, len(statuses)))
            for status in statuses:
                reply += ITEM_STATUS.pack(status)
            self._stream.send([memoryview(reply)], request.deadline)
        self._observer(request.op.name.lower(), moved_bytes, time.monotonic() - begun)

    def _memory(self, item: Item) -> memoryview | None:
        """The slot's bytes up to the end of the span; None when they are not inside the segment."""
        if item.segment >= len(self._segments):
            return None
        segment = self._segments[item.segment]
        if item.offset > len(segment) or not item.span.fits(len(segment) - item.offset):
            return None
        return segment[item.offset : item.offset + item.span.end]

    def _send(self, request: Request, statuses: Sequence[ItemStatus], memories: Sequence[memoryview | None]) -> int:
        moved_bytes = 0
        head = bytearray(REPLY.pack(0, 0, len(statuses)))
        for item, status, memory in zip(request.items, statuses, memories, strict=True):
            head += ITEM_STATUS.pack(status)
            if memory is None:
                continue
            checksum = self._stream.send_payload(head, memory, item.span, request.deadline)
            head = bytearray(CHECKSUM.pack(checksum) if request.checked else b"")
            moved_bytes += item.span.size
        if head:
            self._stream.send([memoryview(head)], request.deadline)
        return moved_bytes

    def _receive(
        self,
        request: Request,
        statuses: list[ItemStatus],
        memories: Sequence[memoryview | None],
        failed: set[int],
    ) -> int:
        moved_bytes = 0
        for i, (item, memory) in enumerate(zip(request.items, memories, strict=True)):
            if memory is None:
                self._discard(item.span.size, request.deadline)
            else:
                checksum = self._stream.receive_payload(memory, item.span, request.deadline)
                moved_bytes += item.span.size
            if request.checked:
                (sent,) = CHECKSUM.unpack(self._stream.receive(CHECKSUM.size, request.deadline))
                if memory is not None and sent != checksum:
                    statuses[i] = ItemStatus.CHECKSUM
                    log.warning("checksum mismatch in a write of %d bytes: the chunk is refused", item.span.size)
                    continue
            failed.discard(i)
        return moved_bytes

    def _discard(self, length_bytes: int, deadline: float) -> None:
        """Takes the payload of a refused item off the wire."""
        if not self._scratch:
            self._scratch = memoryview(bytearray(PIECE_BYTES))
        while length_bytes:
            part = min(length_bytes, PIECE_BYTES)
            self._stream.receive_into([self._scratch[:part]], deadline)
            length_bytes -= part
