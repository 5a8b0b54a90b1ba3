"""One request of the data plane: taken off the wire and bounded, allowed by the books, answered."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple, Protocol

from kvd.types import LeaseId, SessionId
from kvd.wire.frames import (
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
from kvd.wire.stream import Payload, Stream

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
        """A ticket and one status per item. The slots of OK items serve nobody else until ``end_io``.

        ``checksums`` of the ticket of a READ: per item the XXH3-64 of its bytes where it is known, else None.
        """

    def end_io(self, ticket: Any, failed: Collection[int], checksums: Mapping[int, int]) -> None:
        """Nothing moves any more under ``ticket``. ``failed``: indices of items whose bytes did not arrive intact.

        ``checksums``: by index, the XXH3-64 of an item's bytes, where it was computed on the way.
        """


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

    def answer(self, request: Request) -> None:
        """Carries ``request`` out. Raises KvdError (the books refuse the session), TimeoutError or OSError; then the
        connection is out of step. When this returns or raises, nothing moves any more and the books know."""
        begun = time.monotonic()
        ticket, given = self._authority.begin_io(self._session, request.op, request.lease_id, request.items)
        failed: set[int] = set()
        checksums: dict[int, int] = {}
        try:
            # What is known is not computed again; were the bytes not those any more, the client would see it.
            known = ticket.checksums if request.op == Op.READ else repeat(None, len(given))
            payloads = [
                Payload(self._memory(item) if status == ItemStatus.OK else None, item.span, checksum)
                for item, status, checksum in zip(request.items, given, known, strict=True)
            ]
            statuses = [
                ItemStatus.BAD_SPAN if status == ItemStatus.OK and payload.memory is None else status
                for status, payload in zip(given, payloads, strict=True)
            ]
            if request.op == Op.READ:
                there = [i for i, payload in enumerate(payloads) if payload.memory is not None]
                coming = [payloads[i] for i in there]
                told = self._stream.send_payloads(_reply(statuses), coming, request.deadline, checked=request.checked)
                checksums.update(zip(there, told, strict=False))
            else:
                # Until an item has arrived whole it has failed.
                failed.update(i for i, payload in enumerate(payloads) if payload.memory is not None)
                self._receive(request, payloads, statuses, failed, checksums)
        finally:
            self._authority.end_io(ticket, failed, checksums)
        if request.op == Op.WRITE:
            self._stream.send([memoryview(_reply(statuses))], request.deadline)
        moved_bytes = sum(payload.span.size for payload in payloads if payload.memory is not None)
        self._observer(request.op.name.lower(), moved_bytes, time.monotonic() - begun)

    def _memory(self, item: Item) -> memoryview | None:
        """The slot's bytes up to the end of the span; None when they are not inside the segment."""
        if item.segment >= len(self._segments):
            return None
        segment = self._segments[item.segment]
        if item.offset > len(segment) or not item.span.fits(len(segment) - item.offset):
            return None
        return segment[item.offset : item.offset + item.span.end]

    def _receive(
        self,
        request: Request,
        payloads: Sequence[Payload],
        statuses: list[ItemStatus],
        failed: set[int],
        checksums: dict[int, int],
    ) -> None:
        arriving = self._stream.receive_payloads(payloads, request.deadline, checked=request.checked)
        for i, (intact, checksum) in enumerate(arriving):
            if i not in failed:
                continue  # refused, and dropped
            if intact:
                failed.remove(i)
                if checksum is not None:
                    checksums[i] = checksum
            else:
                statuses[i] = ItemStatus.CHECKSUM
                log.warning("checksum mismatch in a write of %d bytes: the chunk is refused", payloads[i].span.size)


def _reply(statuses: Sequence[ItemStatus]) -> bytes:
    return REPLY.pack(0, 0, len(statuses)) + b"".join(map(ITEM_STATUS.pack, statuses))
