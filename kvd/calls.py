"""The daemon's end of the call channels: frames in, the desk asked, frames out. Protocol: ``kvd/wire/calls.py``.

A channel comes with a lifeline, or is a TCP connection that the data plane has let in for a session.

Everything happens on the event loop and nothing blocks. A channel holds one request that has not arrived whole and what
came with it, and one answer that has not gone: while its client does not take that, nothing more is read from it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from kvd.desk import Desk
from kvd.session import Session, Sessions
from kvd.types import SessionId
from kvd.wire import calls as wire
from kvd.wire.errors import KvdError

log = logging.getLogger(__name__)

#: Read at a time; most requests are shorter.
_READ_BYTES = 64 << 10
#: So many requests of one channel are answered, then others get their turn.
_TURN = 16

#: As the gRPC service calls them.
_METHODS = {op: op.name.title() for op in wire.Op}


class CallServer:
    """Makes call channels. Lives on the event loop."""

    def __init__(self, desk: Desk, sessions: Sessions, max_chunks_per_request: int) -> None:
        self.desk = desk
        self.max_request_bytes = wire.max_request_bytes(max_chunks_per_request)
        self._sessions = sessions
        self._loop = asyncio.get_running_loop()
        self._adopted: dict[SessionId, CallChannel] = {}  # those over TCP

    def open(self, whose: Callable[[], Session | None]) -> tuple[CallChannel, socket.socket]:
        """A channel and the client's end of it. ``whose``: the session that asks, None before there is one.

        Raises OSError.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return CallChannel(self, ours, whose), theirs

    def adopt(self, session: SessionId, connection: socket.socket) -> None:
        """Takes over a connection that was made for the calls of ``session``; from any thread. It is closed with the
        session, and when the session makes another."""
        try:
            self._loop.call_soon_threadsafe(self._adopt, session, connection)
        except RuntimeError:  # the loop is closed: the daemon has ended around this thread
            connection.close()

    def close_session(self, session: SessionId) -> None:
        """The session has ended."""
        channel = self._adopted.pop(session, None)
        if channel is not None:
            channel.close()

    def _adopt(self, number: SessionId, connection: socket.socket) -> None:
        session = self._sessions.by_id(number)
        if session is None or session.ended:
            connection.close()
            return
        self.close_session(number)
        self._adopted[number] = CallChannel(self, connection, lambda: session)


class CallChannel:
    """One channel, until ``close``, the client's end, or a breach of the protocol. It proves nothing about its client's
    life: a breach is answered by closing this channel, and nothing else."""

    def __init__(self, server: CallServer, connection: socket.socket, whose: Callable[[], Session | None]) -> None:
        connection.setblocking(False)
        self._desk = server.desk
        self._max_request_bytes = server.max_request_bytes
        self._socket = connection
        self._whose = whose
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()  # the beginning of a request, or requests that wait for their turn
        self._unsent = b""  # the rest of an answer
        self._reading = False
        self._closed = False
        self._read(True)

    def close(self) -> None:
        """Ends it; twice is nothing."""
        if self._closed:
            return
        self._read(False)
        if self._unsent:
            self._loop.remove_writer(self._socket.fileno())
        self._closed = True
        self._socket.close()

    def _read(self, wanted: bool) -> None:
        if wanted == self._reading or self._closed:
            return
        self._reading = wanted
        if wanted:
            self._loop.add_reader(self._socket.fileno(), self._readable)
        else:
            self._loop.remove_reader(self._socket.fileno())

    def _readable(self) -> None:
        try:
            arrived = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            arrived = b""
        if not arrived:
            self.close()
            return
        self._received += arrived
        self._serve()

    def _serve(self) -> None:
        """Answers what has arrived, as long as it is this channel's turn and the client takes the answers."""
        if self._closed:
            return
        try:
            for _ in range(_TURN):
                frame = self._next_frame()
                if frame is None:
                    self._read(True)
                    return
                self._send(self._answer(frame))
                if self._closed:
                    return
                if self._unsent:
                    self._read(False)
                    self._loop.add_writer(self._socket.fileno(), self._writable)
                    return
        except wire.BadFrame as breach:
            log.warning("a call channel is closed: %s", breach)
            self.close()
            return
        self._read(False)
        self._loop.call_soon(self._serve)

    def _next_frame(self) -> bytes | bytearray | None:
        """A whole request, taken out of what has arrived. Raises BadFrame."""
        if len(self._received) < wire.LENGTH.size:
            return None
        length = wire.frame_length(self._received)
        if not wire.REQUEST.size <= length <= self._max_request_bytes:
            raise wire.BadFrame(f"a request of {length} bytes")
        if len(self._received) < length:
            return None
        if len(self._received) == length:
            frame, self._received = self._received, bytearray()
            return frame
        with memoryview(self._received) as received:
            first = bytes(received[:length])
        del self._received[:length]
        return first

    def _answer(self, frame: bytes | bytearray) -> bytes:
        head, request = wire.unpack_request(frame)
        try:
            with self._desk.answering(_METHODS[head.op]):
                session = self._desk.admit(self._whose())
                self._desk.missed(head.missed_lookups, head.missed_chunks)
                if head.released:
                    self._desk.release(session, head.released)
                return wire.pack_answer(head.op, head.request_id, self._ask(session, request))
        except KvdError as error:
            return wire.pack_failure(head.op, head.request_id, error)

    def _ask(self, session: Session, request: wire.Request) -> bytes:
        """The body of the answer. Raises as the desk does."""
        desk = self._desk
        match request:
            case wire.Lookup():
                return wire.pack_found(*desk.lookup(session, *request))
            case wire.Reserve():
                results = desk.reserve(session, *request)
                granted = [result.location for result in results if result.location is not None]
                return wire.pack_reserved([result.status for result in results], granted)
            case wire.Commit(namespace_id, lease_id, keys, stripes):
                items = [(key, stripes) for key in keys]
                return wire.pack_bytes(desk.commit(session, namespace_id, lease_id, items))
            case wire.Abort():
                return wire.pack_count(desk.abort(session, *request))
            case wire.Release(lease_ids):
                return wire.pack_count(desk.release(session, lease_ids))
            case wire.Renew(lease_ids):
                return wire.pack_bytes(desk.renew(session, lease_ids))

    def _send(self, answer: bytes) -> None:
        """Sends what the client takes now; the rest is ``_unsent``."""
        try:
            sent = self._socket.send(answer)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        self._unsent = answer[sent:]

    def _writable(self) -> None:
        self._send(self._unsent)
        if not self._unsent and not self._closed:
            self._loop.remove_writer(self._socket.fileno())
            self._serve()
