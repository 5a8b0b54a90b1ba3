"""The daemon's end of the lifeline: hands out the pool's descriptors, and hears from the kernel who has died.

Protocol: ``kvd/wire/lifeline.py``. One SOCK_SEQPACKET connection per process that maps the pool. The daemon never
closes a lifeline whose process may still be writing: only its end of file proves anything.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Sequence
from typing import Protocol

from kvd.calls import CallChannel, CallServer
from kvd.memory.holders import Holders
from kvd.memory.segment import Segment
from kvd.peers import Access, Credentials, credentials_of
from kvd.session import Lifeline, Sessions
from kvd.wire.errors import LimitReached, SessionUnknown
from kvd.wire.lifeline import HELLO, MAGIC, MAX_MESSAGE_BYTES, SEGMENT, VERSION, WELCOME, Kind, Status

log = logging.getLogger(__name__)

#: A connection that has not said HELLO by then is closed.
HELLO_TIMEOUT_S = 5.0
#: Connections that have not said HELLO yet.
MAX_STRANGERS = 64
_BACKLOG = 128
#: Pause in accepting when the process has no descriptor left.
_RETRY_S = 0.5


class Presence(Protocol):
    """The presence table: a file that every client may read."""

    @property
    def fd(self) -> int:
        """Read-only descriptor."""

    @property
    def size_bytes(self) -> int:
        """Size of the file."""


class LifelineServer:
    """Listens at ``path``. Lives on the event loop; everything it does is short and never blocks."""

    def __init__(
        self,
        path: str,
        *,
        sessions: Sessions,
        access: Access,
        segments: Sequence[Segment],
        daemon_id: int,
        calls: CallServer,
        holders: Holders | None = None,
        presence: Presence | None = None,
    ) -> None:
        """``calls`` makes the call channels. ``holders``: of a pool that outlives the daemon."""
        self.path = path
        self.sessions = sessions
        self.access = access
        self._segments = segments
        self._daemon_id = daemon_id
        self._calls = calls
        self._holders = holders
        self._presence = presence
        self._listener: socket.socket | None = None
        self._connections: set[_Connection] = set()
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Binds and listens. The caller has removed a stale socket and set the umask. Raises OSError."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            listener.bind(self.path)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        self._loop.add_reader(listener.fileno(), self._accept)

    def stop_listening(self) -> None:
        """Takes no further connections; those that exist stay."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)

    def close(self) -> None:
        """Ends everything. The clients see the end of file and stop using the pool."""
        self.stop_listening()
        for connection in list(self._connections):
            connection.close()

    def forget(self, connection: _Connection) -> None:
        """A connection has ended."""
        self._connections.discard(connection)

    def refuse(self, to: socket.socket, status: Status) -> None:
        """Answers HELLO with anything but OK. Raises OSError."""
        to.sendmsg([WELCOME.pack(MAGIC, VERSION, status, self._daemon_id, b"", 0, 0, 0)])

    def welcome(self, to: socket.socket, lifeline: Lifeline) -> CallChannel:
        """Answers HELLO with OK and the descriptors; the daemon's end of the call channel. Raises OSError."""
        channel, theirs = self._calls.open(lambda: lifeline.session)
        holder = None
        try:
            descriptors = [fd for segment in self._segments for fd in (segment.data_fd, segment.table_fd)]
            descriptors.append(theirs.fileno())
            presence_bytes = 0
            if self._presence is not None:
                descriptors.append(self._presence.fd)
                presence_bytes = self._presence.size_bytes
            if self._holders is not None:
                holder = self._holders.hand_out(self._daemon_id)
                descriptors.append(holder)
            counts = (len(self._segments), 0 if holder is None else 1, presence_bytes)
            message = WELCOME.pack(MAGIC, VERSION, Status.OK, self._daemon_id, lifeline.ticket, *counts)
            message += b"".join(SEGMENT.pack(*segment.info) for segment in self._segments)
            to.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])
        except BaseException:
            channel.close()
            raise
        finally:  # the client's copies alone must hold the lock, and the other end of the channel
            theirs.close()
            if holder is not None:
                os.close(holder)
        return channel

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            accepted, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log.error("lifeline: accept: %s", error.strerror)
            self._loop.remove_reader(self._listener.fileno())
            self._loop.call_later(_RETRY_S, self._resume)
            return
        if sum(connection.lifeline is None for connection in self._connections) >= MAX_STRANGERS:
            accepted.close()
            return
        accepted.setblocking(False)
        self._connections.add(_Connection(self, accepted))

    def _resume(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener.fileno(), self._accept)


class _Connection:
    """One connected process; ``lifeline`` is set once it has been welcomed."""

    def __init__(self, server: LifelineServer, connection: socket.socket) -> None:
        self.lifeline: Lifeline | None = None
        self._server = server
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._impatience = self._loop.call_later(HELLO_TIMEOUT_S, self.close)
        self._closed = False
        self._calls: CallChannel | None = None
        self._loop.add_reader(connection.fileno(), self._readable)

    def close(self) -> None:
        """Closes the socket. For a welcomed process only after its end of file, or when it holds nothing."""
        if self._closed:
            return
        self._closed = True
        self._impatience.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        if self._calls is not None:
            self._calls.close()
        self._server.forget(self)
        if self.lifeline is not None:
            self._server.sessions.lifeline_closed(self.lifeline)

    def _readable(self) -> None:
        try:
            message = self._socket.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self.close()
        elif self.lifeline is None:
            self._hello(message)
        # Later messages mean nothing yet, and closing because of them would prove nothing.

    def _hello(self, message: bytes) -> None:
        self._impatience.cancel()
        admitted = self._admit(message)
        if admitted is None:
            self.close()
            return
        try:
            if isinstance(admitted, Lifeline):
                self.lifeline = admitted
                self._calls = self._server.welcome(self._socket, admitted)
                return
            self._server.refuse(self._socket, admitted)
        except OSError as error:
            log.warning("lifeline: the answer could not be sent: %s", error)
        self.close()

    def _admit(self, message: bytes) -> Lifeline | Status | None:
        """The lifeline of a client that is let in, or why it is not; None: this is no client of ours."""
        if len(message) != HELLO.size:
            return None
        magic, version, kind, token = HELLO.unpack(message)
        if magic != MAGIC:
            return None
        if version != VERSION:
            return Status.BAD_VERSION
        if kind not in (Kind.OPEN, Kind.ATTACH):
            return None
        try:
            credentials = credentials_of(self._socket)
        except OSError:
            return None
        if not self._server.access.admits(credentials):
            log.warning("lifeline: user %d (pid %d) is not let in", credentials.uid, credentials.pid)
            return Status.REFUSED_USER
        return self._join(Kind(kind), credentials, token)

    def _join(self, kind: Kind, credentials: Credentials, token: bytes) -> Lifeline | Status:
        sessions = self._server.sessions
        try:
            if kind is Kind.OPEN:
                return sessions.lifeline_opened(credentials, self.close)
            return sessions.lifeline_attached(credentials, token, self.close)
        except SessionUnknown:
            return Status.UNKNOWN_SESSION
        except LimitReached as error:
            log.warning("lifeline: %s", error)
            return Status.TOO_MANY
