"""The client's end of the lifeline: the handshake that brings the pool's descriptors. See ``kvd/wire/lifeline.py``."""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

from kvd.wire import lifeline as wire
from kvd.wire.errors import (
    DeadlineExceeded,
    KvdError,
    LimitReached,
    PermissionDenied,
    ProtocolMismatch,
    SessionUnknown,
    Unauthenticated,
    Unavailable,
)
from kvd.wire.frames import TOKEN_BYTES

_REFUSALS: dict[int, type[KvdError]] = {
    wire.Status.BAD_VERSION: ProtocolMismatch,
    wire.Status.REFUSED_USER: Unauthenticated,
    wire.Status.UNKNOWN_SESSION: SessionUnknown,
    wire.Status.TOO_MANY: LimitReached,
}


class Descriptors(NamedTuple):
    """One segment as it came: what it is, its bytes, its generation table (read-only)."""

    info: wire.SegmentInfo
    data_fd: int
    table_fd: int


class Lifeline:
    """An open lifeline. While its socket is open the daemon takes this process for a possible writer.

    Made by ``open`` (a new session: ``ticket`` goes into Hello) or ``attach`` (joins a session). Both raise
    Unavailable, DeadlineExceeded, Unauthenticated, PermissionDenied, SessionUnknown, LimitReached or ProtocolMismatch.
    """

    def __init__(
        self,
        connection: socket.socket,
        daemon_id: int,
        ticket: bytes,
        segments: list[Descriptors],
        channel: socket.socket,
        presence: tuple[int, int] | None = None,
        holder: int | None = None,
    ) -> None:
        """``presence``: descriptor and bytes of the presence table."""
        self.socket = connection
        self.daemon_id = daemon_id
        self.ticket = ticket
        self.segments = segments
        self.presence = presence
        self._channel: socket.socket | None = channel
        self._holder = holder

    @classmethod
    def open(cls, path: str, timeout_s: float) -> Lifeline:
        """A lifeline for a session that is yet to be opened. ``path``: of the lifeline socket."""
        return cls._connect(path, wire.Kind.OPEN, bytes(TOKEN_BYTES), timeout_s)

    @classmethod
    def attach(cls, path: str, token: bytes, timeout_s: float) -> Lifeline:
        """A further lifeline of the session with this token."""
        return cls._connect(path, wire.Kind.ATTACH, token, timeout_s)

    def take_channel(self) -> socket.socket:
        """The call channel, the caller's from now on; once."""
        assert self._channel is not None, "it was taken or dropped"
        channel, self._channel = self._channel, None
        return channel

    def take_presence(self) -> tuple[int, int] | None:
        """Descriptor and bytes of the presence table, the caller's from now on, if one came."""
        presence, self.presence = self.presence, None
        return presence

    def take_holder(self) -> int | None:
        """The holder's descriptor, the caller's from now on, if one came: to be kept as long as the socket."""
        holder, self._holder = self._holder, None
        return holder

    def drop_descriptors(self) -> None:
        """Closes the received descriptors that nobody has taken; mappings made of them stay."""
        if self._channel is not None:
            self.take_channel().close()
        if (presence := self.take_presence()) is not None:
            os.close(presence[0])
        if (holder := self.take_holder()) is not None:
            os.close(holder)
        while self.segments:
            _, data_fd, table_fd = self.segments.pop()
            os.close(data_fd)
            os.close(table_fd)

    def ended(self) -> bool:
        """Whether the daemon has gone."""
        return ended(self.socket)

    def close(self) -> None:
        """Tells the daemon that this process writes nothing any more. Only when that is so."""
        self.drop_descriptors()
        self.socket.close()

    @classmethod
    def _connect(cls, path: str, kind: wire.Kind, token: bytes, timeout_s: float) -> Lifeline:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            if timeout_s <= 0:
                raise TimeoutError("the deadline has passed")
            connection.settimeout(timeout_s)
            connection.connect(path)
            connection.send(wire.HELLO.pack(wire.MAGIC, wire.VERSION, kind, token))
            message, descriptors, flags, _ = socket.recv_fds(
                connection, wire.MAX_MESSAGE_BYTES, wire.MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
            try:
                lifeline = _welcomed(cls, connection, message, descriptors, bool(flags & socket.MSG_CTRUNC))
            except BaseException:
                for descriptor in descriptors:
                    os.close(descriptor)
                raise
            connection.settimeout(None)
            return lifeline
        except TimeoutError as error:
            connection.close()
            raise DeadlineExceeded(f"{path}: {error}") from None
        except PermissionError:
            connection.close()
            raise PermissionDenied(f"{path}: this user may not connect to the daemon's socket") from None
        except OSError as error:
            connection.close()
            raise Unavailable(f"{path}: {error.strerror or error}") from None
        except BaseException:
            connection.close()
            raise


def ended(connection: socket.socket) -> bool:
    """Whether the other end of a lifeline is closed. Nothing is ever sent on it after the handshake."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _welcomed(
    cls: type[Lifeline], connection: socket.socket, message: bytes, descriptors: list[int], truncated: bool
) -> Lifeline:
    """The lifeline that a WELCOME makes; when this raises, the descriptors are still the caller's."""
    if not message:
        raise Unavailable("the daemon closed the lifeline without an answer")
    if len(message) < wire.PREFIX.size:
        raise ProtocolMismatch("the lifeline's answer is too short")
    magic, version, status = wire.PREFIX.unpack_from(message)
    if magic != wire.MAGIC:
        raise ProtocolMismatch("this is not the lifeline of a kvd daemon")
    if version != wire.VERSION:
        raise ProtocolMismatch(f"the lifeline speaks version {version}, this client {wire.VERSION}")
    if status != wire.Status.OK:
        raise _REFUSALS.get(status, Unavailable)(f"the daemon refuses the lifeline (status {status})")
    if len(message) < wire.WELCOME.size:
        raise ProtocolMismatch("the lifeline's answer is too short")
    *_, daemon_id, ticket, count, holders, presence_bytes = wire.WELCOME.unpack_from(message)
    if len(message) < wire.WELCOME.size + count * wire.SEGMENT.size:
        raise ProtocolMismatch("the lifeline's answer names more segments than it describes")
    if holders > 1:
        raise ProtocolMismatch(f"the lifeline's answer brings {holders} holders")
    expected = 2 * count + 1 + bool(presence_bytes) + holders
    if truncated or len(descriptors) != expected:
        raise Unavailable(f"{len(descriptors)} descriptors of {expected} arrived: too many open files?")
    segments = [
        Descriptors(
            wire.SegmentInfo(*wire.SEGMENT.unpack_from(message, wire.WELCOME.size + i * wire.SEGMENT.size)),
            descriptors[2 * i],
            descriptors[2 * i + 1],
        )
        for i in range(count)
    ]
    at = 2 * count
    presence = (descriptors[at + 1], presence_bytes) if presence_bytes else None
    holder = descriptors[-1] if holders else None
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptors[at])
    return cls(connection, daemon_id, ticket, segments, channel, presence, holder)
