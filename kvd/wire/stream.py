"""A TCP connection of the data plane: whole transfers with deadlines, straight from and into memory that is given.

Blocking calls with kernel timeouts (SO_RCVTIMEO, SO_SNDTIMEO) instead of a non-blocking socket: one ``recvmsg_into``
with MSG_WAITALL then fills a whole piece without coming back to Python in between. SO_RCVLOWAT lets the thread sleep
meanwhile: to wake it for every segment costs both sides more than the checksums do.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import xxhash

from kvd.wire.frames import CHECKSUM
from kvd.wire.spans import Span

#: Bytes moved by one call: few enough to stay in the cache between the copy and the checksum, and for both sides to
#: work at the same time; many enough that threads do not spend their time in handing each other the interpreter.
PIECE_BYTES = 1 << 20
#: A receiver sleeps until so much has come, when the peer is bound to send so much. Not more than a piece, so that the
#: copying begins before the kernel's buffer is full and the peer has to wait.
WAKE_BYTES = 1 << 20
#: What may be under way to a peer on this machine, as it is asked for: the kernel counts its own needs and doubles it.
#: All of it passes through the caches of both sides, and out of them if it is more. Between machines the kernel finds
#: out what the way holds.
LOCAL_BUFFER_BYTES = 256 << 10
#: Most buffers in one call; the kernel takes at most 1024.
MAX_VECTORS = 512

_TIMEVAL = struct.Struct("ll")
_SHORTEST_TIMEOUT_S = 0.001  # zero would mean: for ever
_LONGEST_TIMEOUT_S = 1.0  # always the same while the deadline is far away: the kernel need not be told again


class Payload(NamedTuple):
    """The bytes of one item: the runs of ``span`` in ``memory``. Without memory they are received and dropped.

    ``checksum``: their XXH3-64, if whoever sends them knows it already.
    """

    memory: memoryview | None
    span: Span
    checksum: int | None = None


class Arrival(NamedTuple):
    """A payload of which all has come. ``checksum``: its XXH3-64 as it was computed, None where none was sent."""

    intact: bool
    checksum: int | None


class _Place(NamedTuple):
    """Where the next bytes are or go. ``hashed``: the checksum is over them; ``last``: they complete an item."""

    view: memoryview
    hashed: bool
    last: bool


class Stream:
    """A connected TCP socket. Every method moves all the bytes or raises.

    TimeoutError: the deadline passed. OSError: the connection is gone. After either the connection is out of step
    and must be closed. Deadlines are ``time.monotonic()`` values; None waits for as long as the peer lives.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._wake_bytes = 1  # what the kernel was told last; so are these
        self._timeouts_s = {socket.SO_RCVTIMEO: 0.0, socket.SO_SNDTIMEO: 0.0}
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if connection.getpeername()[0] == connection.getsockname()[0]:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOCAL_BUFFER_BYTES)
        # A peer whose machine is gone never closes: find out within about a minute.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)

    def receive(self, length_bytes: int, deadline: float | None) -> bytearray:
        """The next ``length_bytes`` (at least one) in memory of their own: for headers and tables."""
        out = bytearray(length_bytes)
        rest = memoryview(out)
        while rest:
            rest = rest[self._receive_some([rest], deadline) :]
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

    def send_payloads(
        self, head: bytes | bytearray, payloads: Sequence[Payload], deadline: float, *, checked: bool
    ) -> list[int]:
        """Sends ``head``, then the payloads, all with memory, each followed by its XXH3-64 when ``checked``.

        Returns what has been told as checksums.
        """
        trailers = _trailers(len(payloads) if checked else 0)
        checksum = xxhash.xxh3_64()
        known = (payload.checksum for payload in payloads)
        sent: list[int] = []
        first = [memoryview(head)]
        for places in _batches(payloads, trailers):
            for view, hashed, last in places:
                if hashed:
                    checksum.update(view)
                elif checked and last:
                    told = next(known)
                    sent.append(checksum.intdigest() if told is None else told)
                    CHECKSUM.pack_into(view, 0, sent[-1])
                    checksum.reset()
            self.send(first + [place.view for place in places], deadline)
            first = []
        self.send(first, deadline)  # nobody had a payload
        return sent

    def receive_payloads(self, payloads: Sequence[Payload], deadline: float, *, checked: bool) -> Iterator[Arrival]:
        """Receives what ``send_payloads`` sends, and answers for each payload as soon as all of it has come.

        The answer for one without memory means nothing. The stream is out of step until the iterator is exhausted.
        """
        trailers = _trailers(len(payloads) if checked else 0)
        checksum = xxhash.xxh3_64()
        more_bytes = len(trailers) + sum(payload.span.size for payload in payloads)
        number = 0
        for batch in _batches(payloads, trailers):
            places = batch
            more_bytes -= sum(len(place.view) for place in places)
            while places:
                count = self._receive_some([place.view for place in places], deadline, more_bytes)
                for done, (view, hashed, last) in enumerate(places):
                    if hashed:
                        checksum.update(view[:count])
                    if count < len(view):
                        places = [_Place(view[count:], hashed, last), *places[done + 1 :]]
                        break
                    count -= len(view)
                    if last:
                        if checked:
                            found = checksum.intdigest()
                            yield Arrival(CHECKSUM.unpack_from(trailers, number * CHECKSUM.size) == (found,), found)
                        else:
                            yield Arrival(True, None)
                        checksum.reset()
                        number += 1
                else:
                    places = []

    def ended(self) -> bool:
        """Whether the peer has closed, or has spoken out of turn; for a connection on which nothing is awaited."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def release(self) -> socket.socket:
        """The socket, for somebody else to use and to close. Of this stream only ``close`` may be called then."""
        return socket.socket(fileno=self._socket.detach())

    def interrupt(self) -> None:
        """Ends the connection from another thread: whatever waits on it wakes and fails. The descriptor stays."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was faster

    def close(self) -> None:
        """Closes the connection. Only by the thread that uses it."""
        self._socket.close()

    def _receive_some(self, views: Sequence[memoryview], deadline: float | None, more_bytes: int = 0) -> int:
        """One call: fills ``views``, none empty, or begins to; how many bytes have come.

        ``more_bytes``: so many the peer sends after these, without waiting for anything.
        """
        # Bytes that are neither here nor promised must never be waited for, so this also falls towards the end.
        wake_bytes = min(WAKE_BYTES, more_bytes) or 1
        if wake_bytes != self._wake_bytes:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wake_bytes)
            self._wake_bytes = wake_bytes
        while True:
            self._set_timeout(socket.SO_RCVTIMEO, deadline)
            try:
                count = self._socket.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
            except BlockingIOError:
                continue  # the kernel's timeout: _set_timeout raises when it was the last
            if count == 0:
                raise ConnectionResetError("closed by the peer")
            return count

    def _set_timeout(self, option: int, deadline: float | None) -> None:
        timeout_s = 0.0
        if deadline is not None:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise TimeoutError("the deadline has passed")
            timeout_s = min(max(remaining_s, _SHORTEST_TIMEOUT_S), _LONGEST_TIMEOUT_S)
        if timeout_s != self._timeouts_s[option]:
            seconds = int(timeout_s)
            value = _TIMEVAL.pack(seconds, int((timeout_s - seconds) * 1_000_000))
            self._socket.setsockopt(socket.SOL_SOCKET, option, value)
            self._timeouts_s[option] = timeout_s


def _trailers(count: int) -> memoryview:
    """Room for ``count`` checksums."""
    return memoryview(bytearray(CHECKSUM.size * count))


def _batches(payloads: Sequence[Payload], trailers: memoryview) -> Iterator[list[_Place]]:
    """All payloads, in order, each followed by its part of ``trailers`` if there are any, cut for one call each.

    At most PIECE_BYTES of payload and MAX_VECTORS - 1 places: there is room for a header.
    """
    drops = any(payload.memory is None for payload in payloads)
    dropped = memoryview(bytearray(PIECE_BYTES if drops else 0))
    places: list[_Place] = []
    room = PIECE_BYTES
    for number, (memory, span, known) in enumerate(payloads):
        left = span.size
        hashed = memory is not None and known is None and bool(trailers)
        for offset, length in span.runs():
            while length:
                if not room or len(places) >= MAX_VECTORS - 2:
                    yield places
                    places, room = [], PIECE_BYTES
                part = min(length, room)
                view = dropped[:part] if memory is None else memory[offset : offset + part]
                offset += part
                length -= part
                room -= part
                left -= part
                places.append(_Place(view, hashed, not (left or trailers)))
        if trailers:
            places.append(_Place(trailers[number * CHECKSUM.size : (number + 1) * CHECKSUM.size], False, True))
    if places:
        yield places


def _rest(views: Sequence[memoryview], done_bytes: int) -> Sequence[memoryview]:
    for i, view in enumerate(views):
        if done_bytes < len(view):
            return [view[done_bytes:], *views[i + 1 :]]
        done_bytes -= len(view)
    return []
