"""A TCP connection of the data plane: whole transfers with deadlines, straight from and into memory that is given.

Blocking calls with kernel timeouts (SO_RCVTIMEO, SO_SNDTIMEO) instead of a non-blocking socket: one ``recvmsg_into``
with MSG_WAITALL then fills a whole piece without coming back to Python in between, which is twice as fast.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator, Sequence

import xxhash

from kvd.wire.spans import Span

#: Bytes moved by one call: small enough to stay in the cache between the copy and the checksum.
PIECE_BYTES = 1 << 20
#: Most buffers in one call; the kernel takes at most 1024.
MAX_VECTORS = 512

_TIMEVAL = struct.Struct("ll")
_SHORTEST_TIMEOUT_S = 0.001  # zero would mean: for ever


class Stream:
    """A connected TCP socket. Every method moves all the bytes or raises.

    TimeoutError: the deadline passed. OSError: the connection is gone. After either the connection is out of step
    and must be closed. Deadlines are ``time.monotonic()`` values; None waits for as long as the peer lives.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A peer whose machine is gone never closes: find out within about a minute.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)

    def receive_into(self, views: Sequence[memoryview], deadline: float | None) -> None:
        """Fills ``views``, at most MAX_VECTORS of them, none empty."""
        while views:
            self._set_timeout(socket.SO_RCVTIMEO, deadline)
            try:
                count = self._socket.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
            except BlockingIOError:
                continue  # the kernel's timeout: _set_timeout raises when it was the last
            if count == 0:
                raise ConnectionResetError("closed by the peer")
            views = _rest(views, count)

    def receive(self, length_bytes: int, deadline: float | None) -> bytearray:
        """The next ``length_bytes`` (at least one) in memory of their own: for headers and tables."""
        out = bytearray(length_bytes)
        self.receive_into([memoryview(out)], deadline)
        return out

    def send(self, views: Sequence[memoryview], deadline: float | None) -> None:
        """Sends ``views``, at most MAX_VECTORS of them."""
        while views:
            self._set_timeout(socket.SO_SNDTIMEO, deadline)
            try:
                count = self._socket.sendmsg(views)
            except BlockingIOError:
                continue
            views = _rest(views, count)

    def receive_payload(self, memory: memoryview, span: Span, deadline: float) -> int:
        """Receives the runs of ``span`` into their places in ``memory``; their XXH3-64."""
        checksum = xxhash.xxh3_64()
        for views in batches(memory, span):
            self.receive_into(views, deadline)
            for view in views:
                checksum.update(view)
        return checksum.intdigest()

    def send_payload(self, head: bytes | bytearray, memory: memoryview, span: Span, deadline: float) -> int:
        """Sends ``head``, then the runs of ``span`` in ``memory``; the XXH3-64 of the latter."""
        checksum = xxhash.xxh3_64()
        first = [memoryview(head)] if head else []
        for views in batches(memory, span):
            for view in views:
                checksum.update(view)
            self.send(first + views, deadline)
            first = []
        return checksum.intdigest()

    def ended(self) -> bool:
        """Whether the peer has closed, or has spoken out of turn; for a connection on which nothing is awaited."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def interrupt(self) -> None:
        """Ends the connection from another thread: whatever waits on it wakes and fails. The descriptor stays."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was faster

    def close(self) -> None:
        """Closes the connection. Only by the thread that uses it."""
        self._socket.close()

    def _set_timeout(self, option: int, deadline: float | None) -> None:
        remaining_s = 0.0
        if deadline is not None:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise TimeoutError("the deadline has passed")
            remaining_s = max(remaining_s, _SHORTEST_TIMEOUT_S)
        seconds = int(remaining_s)
        self._socket.setsockopt(
            socket.SOL_SOCKET, option, _TIMEVAL.pack(seconds, int((remaining_s - seconds) * 1_000_000))
        )


def batches(memory: memoryview, span: Span) -> Iterator[list[memoryview]]:
    """The runs of ``span`` in ``memory`` (bytes), in order, cut for one call each.

    At most PIECE_BYTES and MAX_VECTORS - 1 views: there is room for a header.
    """
    views: list[memoryview] = []
    room = PIECE_BYTES
    for offset, length in span.runs():
        while length:
            part = min(length, room)
            views.append(memory[offset : offset + part])
            offset += part
            length -= part
            room -= part
            if not room or len(views) == MAX_VECTORS - 1:
                yield views
                views, room = [], PIECE_BYTES
    if views:
        yield views


def _rest(views: Sequence[memoryview], done_bytes: int) -> Sequence[memoryview]:
    for i, view in enumerate(views):
        if done_bytes < len(view):
            return [view[done_bytes:], *views[i + 1 :]]
        done_bytes -= len(view)
    return []
