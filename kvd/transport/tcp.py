"""The TCP data plane: slot bytes between the pool and the network. Frames: ``kvd/wire/frames.py``.

One thread per connection, blocking sockets: a thread moves bytes in calls that release the GIL, straight into and out
of pool memory. What may be touched the books decide: every request asks the ``Authority`` before its first payload byte
and tells it when the last one has been moved. Everything a client sends is bounded before it is believed; whatever
breaks the rules of the frames closes its connection and nothing else.

A connection that is to carry calls is let in here like any other, and handed on.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence

from kvd.transport.requests import Answerer, Authority, MalformedRequest, Observer, receive_request
from kvd.types import SessionId
from kvd.wire.endpoints import format_host_port
from kvd.wire.errors import KvdError
from kvd.wire.frames import HELLO, HELLO_REPLY, MAGIC, VERSION, HelloStatus, Purpose
from kvd.wire.stream import Stream

__all__ = ["Authority", "DataPlane", "Observer"]

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
#: So that one session cannot take all connections.
MAX_CONNECTIONS_PER_SESSION = 64
#: How long ``close`` waits for the threads.
CLOSE_TIMEOUT_S = 5.0


class _Connection:
    """What the plane knows of a connection; its thread owns the stream."""

    def __init__(self, stream: Stream, peer: str) -> None:
        self.stream = stream
        self.peer = peer
        self.session: SessionId | None = None  # after the handshake
        self.thread: threading.Thread | None = None


def _ignore(op: str, moved_bytes: int, seconds: float) -> None:
    """The observer of those who want none."""


def _refuse(session: SessionId, connection: socket.socket) -> None:
    """Where no calls are taken."""
    connection.close()


class DataPlane:
    """Listener and connections. ``segments``: the writable bytes of the pool's segments, by index.

    ``port`` may be 0: then the kernel chooses, and ``port`` says what after ``start``. ``calls`` takes over, in a
    thread, the connections that sessions have made for their calls.
    """

    def __init__(
        self,
        host: str,
        port: int,
        segments: Sequence[memoryview],
        authority: Authority,
        *,
        max_connections: int = 256,
        io_timeout_s: float = 30.0,
        observer: Observer = _ignore,
        calls: Callable[[SessionId, socket.socket], None] = _refuse,
    ) -> None:
        self.host = host
        self.port = port
        self._segments = [segment.cast("B") for segment in segments]
        self._authority = authority
        self._max_connections = max_connections
        self._io_timeout_s = io_timeout_s
        self._observer = observer
        self._calls = calls
        self._lock = threading.Lock()  # guards the two below; held for moments only
        self._connections: set[_Connection] = set()
        self._closing = threading.Event()
        self._listener: socket.socket | None = None
        self._acceptor = threading.Thread(target=self._accept, name="kvd-data-accept", daemon=True)

    def start(self) -> None:
        """Binds and begins to accept. Raises OSError when the address cannot be bound."""
        family, _, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(self._max_connections)
        except OSError:
            listener.close()
            raise
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._acceptor.start()

    @property
    def connections(self) -> int:
        """Connections open now."""
        with self._lock:
            return len(self._connections)

    def close_session(self, session: SessionId) -> None:
        """Breaks this session's connections. Does not wait: the books hear of the end of every transfer."""
        with self._lock:
            mine = [connection for connection in self._connections if connection.session == session]
            for connection in mine:
                connection.stream.interrupt()

    def close(self) -> None:
        """Stops listening, breaks every connection and waits a bounded time for the threads.

        Not to be called on the loop that answers the authority's questions: the threads may be waiting for it.
        """
        self._closing.set()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        if self._listener is not None:
            try:
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
            except OSError:
                pass
            self._acceptor.join(CLOSE_TIMEOUT_S)
            self._listener.close()
            self._listener = None
        with self._lock:
            threads = [connection.thread for connection in self._connections]
            for connection in self._connections:
                connection.stream.interrupt()
        for thread in threads:
            if thread is not None and thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        self._segments.clear()  # whoever owns the memory may want to unmap it

    def _accept(self) -> None:
        listener = self._listener
        assert listener is not None
        while not self._closing.is_set():
            try:
                accepted, address = listener.accept()
            except OSError as error:
                if not self._closing.is_set():
                    log.warning("data plane cannot accept: %s", error)
                    self._closing.wait(0.1)  # out of descriptors, most likely: others must close first
                continue
            try:
                self._begin(accepted, format_host_port(address[0], address[1]))
            except OSError:
                accepted.close()  # the peer was gone before it began
            except RuntimeError as error:
                log.warning("data plane cannot serve another connection: %s", error)

    def _begin(self, accepted: socket.socket, peer: str) -> None:
        connection = _Connection(Stream(accepted), peer)
        with self._lock:
            full = len(self._connections) >= self._max_connections
            if not full:
                self._connections.add(connection)
        if full:
            _answer_hello(connection.stream, HelloStatus.TOO_MANY)
            connection.stream.close()
            return
        connection.thread = threading.Thread(target=self._serve, args=(connection,), name="kvd-data", daemon=True)
        try:
            connection.thread.start()
        except RuntimeError:  # the system gives no further thread
            self._forget(connection)
            raise

    def _serve(self, connection: _Connection) -> None:
        """A connection's thread, from handshake to close."""
        try:
            session, purpose = self._handshake(connection)
            if session is None:
                return
            if purpose == Purpose.CALLS:
                self._calls(session, self._hand_on(connection))
                return
            answerer = Answerer(connection.stream, session, self._segments, self._authority, self._observer)
            while not self._closing.is_set():
                answerer.answer(receive_request(connection.stream, self._io_timeout_s))
        except MalformedRequest as error:
            log.warning("data connection from %s closed: malformed request: %s", connection.peer, error)
        except (OSError, KvdError) as error:  # TimeoutError is an OSError
            log.debug("data connection from %s ended: %s", connection.peer, error)
        except Exception:
            log.exception("data connection from %s failed", connection.peer)
        finally:
            self._forget(connection)

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)
            connection.stream.close()  # under the lock: nobody interrupts a descriptor that serves somebody else

    def _hand_on(self, connection: _Connection) -> socket.socket:
        with self._lock:  # nobody interrupts a descriptor that serves somebody else
            self._connections.discard(connection)
            return connection.stream.release()

    def _handshake(self, connection: _Connection) -> tuple[SessionId | None, int]:
        """Who is let in, if anybody is, and what for."""
        hello = connection.stream.receive(HELLO.size, time.monotonic() + HANDSHAKE_TIMEOUT_S)
        magic, version, purpose, token = HELLO.unpack(hello)
        if magic != MAGIC or purpose not in set(Purpose):
            return None, purpose
        status = HelloStatus.OK if version == VERSION else HelloStatus.BAD_VERSION
        session = self._authority.admit(token) if status == HelloStatus.OK else None
        if status == HelloStatus.OK:
            status = HelloStatus.UNKNOWN_SESSION if session is None else self._tie(connection, session)
        _answer_hello(connection.stream, status)
        return session if status == HelloStatus.OK else None, purpose

    def _tie(self, connection: _Connection, session: SessionId) -> HelloStatus:
        with self._lock:
            if sum(other.session == session for other in self._connections) >= MAX_CONNECTIONS_PER_SESSION:
                return HelloStatus.TOO_MANY
            connection.session = session
            return HelloStatus.OK


def _answer_hello(stream: Stream, status: HelloStatus) -> None:
    reply = HELLO_REPLY.pack(MAGIC, VERSION, status)
    stream.send([memoryview(reply)], time.monotonic() + HANDSHAKE_TIMEOUT_S)
