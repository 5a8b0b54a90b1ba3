"""Calls as frames on a session's call channel: a socket that came with its lifeline, or a TCP connection of its own.
Protocol: ``kvd/wire/calls.py``.

One call at a time: who comes second waits for the first, no longer than their own deadline. A call that has stopped
waiting leaves the channel in order: the rest of its request goes first when the next one is sent, and its answer is
known by its request id when it comes, and thrown away.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from kvd.wire import calls as wire
from kvd.wire.chunks import ROOT, CommitStatus, ReserveResult, Stripe
from kvd.wire.errors import DeadlineExceeded, InvalidRequest, KvdError, Unavailable
from kvd.wire.identity import KEY_BYTES
from kvd_client.debts import Riders
from kvd_client.messages import Found, committed, reserved, same_count

T = TypeVar("T")

#: How long ``close`` waits for a call under way, which has been told already.
_CLOSE_TIMEOUT_S = 1.0
#: The longest wait that poll can express is longer than this.
_LONGEST_WAIT_S = 1e6
_READ_BYTES = 64 << 10


class CallChannel:
    """The client's end of a call channel: whole frames out, whole answers in, before a deadline. Thread-safe.

    Anything but a deadline or an error that the daemon answers ends it, an exception from outside too.
    """

    def __init__(self, connection: socket.socket, owed: Callable[[], Riders]) -> None:
        """Takes ``connection`` over. ``owed`` gives away what the next request takes along."""
        connection.setblocking(False)
        #: Of one request; Welcome says.
        self.max_chunks = 0
        self._socket = connection
        self._owed = owed
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._why_dead = ""
        self._last_id = 0
        self._unsent = b""
        self._received = bytearray()
        self._writable, self._readable = select.poll(), select.poll()
        self._writable.register(connection, select.POLLOUT)
        self._readable.register(connection, select.POLLIN)

    @property
    def alive(self) -> bool:
        """False once it has ended, and in a process that was forked from the one that opened it."""
        return not self._why_dead and os.getpid() == self._owner

    def ask(self, request: wire.Request, read: Callable[[memoryview], T], deadline: float) -> T:
        """What ``read`` makes of the answer's body.

        Raises Unavailable, DeadlineExceeded, InvalidRequest for what no frame can say, and what the daemon answers.
        """
        if os.getpid() != self._owner:
            raise Unavailable("the session belongs to the process that this one was forked from")
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise DeadlineExceeded("an earlier call still waits for the daemon")
        try:
            return read(self._ask(request, deadline))
        except KvdError:
            raise
        except wire.BadFrame as breach:
            self._end(f"the daemon breaks the protocol: {breach}")
            raise Unavailable(self._why_dead) from None
        except OSError as error:
            self._end(f"the call channel is gone: {error.strerror or error}")
            raise Unavailable(self._why_dead) from None
        except BaseException:
            self._end("a call was interrupted")
            raise
        finally:
            self._lock.release()

    def close(self) -> None:
        """Ends it; a call under way fails at once. May be called twice."""
        if os.getpid() != self._owner:
            self._socket.close()  # this process's copy: whoever opened it goes on
            return
        self._end("the session has ended")
        if self._lock.acquire(timeout=_CLOSE_TIMEOUT_S):
            try:
                self._socket.close()
            finally:
                self._lock.release()

    def _end(self, why: str) -> None:
        """Wakes who waits. The descriptor stays: nobody may get its number while somebody polls it."""
        self._why_dead = self._why_dead or why
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended already

    def _ask(self, request: wire.Request, deadline: float) -> memoryview:
        if self._why_dead:
            raise Unavailable(self._why_dead)
        self._flush(deadline)  # what an earlier call has begun to say
        request_id = self._last_id + 1
        try:
            frame = wire.pack_request(request, request_id, *self._owed())
        except struct.error as error:
            raise InvalidRequest(f"{type(request).__name__}: {error}") from None
        if len(frame) > wire.max_request_bytes(self.max_chunks):
            raise InvalidRequest(f"too much for one request; the daemon takes {self.max_chunks} chunks")
        self._last_id = request_id
        self._unsent = frame
        self._flush(deadline)
        while True:
            answered, op, body = wire.unpack_answer(self._receive(deadline))
            if answered < request_id:
                continue  # whoever asked has stopped waiting
            if answered != request_id or op is not wire.op_of(request):
                raise wire.BadFrame(f"{op.name} {answered} answers {type(request).__name__} {request_id}")
            if isinstance(body, KvdError):
                raise body
            return body

    def _flush(self, deadline: float) -> None:
        """Sends what is still to be sent."""
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                self._wait(self._writable, deadline)
            else:
                self._unsent = self._unsent[sent:]

    def _receive(self, deadline: float) -> bytearray:
        """The next whole frame. What has arrived of it stays when the deadline passes."""
        max_bytes = wire.max_answer_bytes(self.max_chunks)
        while True:
            have = len(self._received)
            if have >= wire.LENGTH.size:
                length = wire.frame_length(self._received)
                if not wire.ANSWER.size <= length <= max_bytes:
                    raise wire.BadFrame(f"an answer of {length} bytes")
                if have == length:
                    frame, self._received = self._received, bytearray()
                    return frame
                if have > length:
                    frame = self._received[:length]
                    del self._received[:length]
                    return frame
            self._wait(self._readable, deadline)
            try:
                arrived = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                continue
            if not arrived:
                raise ConnectionResetError("the daemon has closed it")
            self._received += arrived

    def _wait(self, ready: select.poll, deadline: float) -> None:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not ready.poll(min(left_s, _LONGEST_WAIT_S) * 1000):
            raise DeadlineExceeded("the daemon did not answer in time")


class FrameCalls:
    """What a session asks while an engine works. Thread-safe. ``deadline`` is a ``time.monotonic()`` value.

    Every call raises Unavailable (nobody answers), DeadlineExceeded (what the daemon did is not known),
    ProtocolMismatch (the answer makes no sense), and what the daemon answers.
    """

    def __init__(self, channel: CallChannel) -> None:
        self._channel = channel

    @property
    def alive(self) -> bool:
        """False: no call will ever be answered this way again, and the session is of no use."""
        return self._channel.alive

    def lookup(
        self, namespace_id: bytes, lease_id: int, keys: Sequence[bytes], skip: int, again: bool, deadline: float
    ) -> Found:
        """One Lookup."""
        _check(keys)
        request = wire.Lookup(namespace_id, lease_id, keys, skip, again)
        return Found(*self._channel.ask(request, wire.unpack_found, deadline))

    def reserve(
        self, namespace_id: bytes, lease_id: int, items: Sequence[tuple[bytes, bytes]], deadline: float
    ) -> list[ReserveResult]:
        """One Reserve; ``items`` are (key, parent or ROOT)."""
        _check([key for key, _ in items])
        _check([parent for _, parent in items if parent != ROOT])
        request = wire.Reserve(namespace_id, lease_id, items)
        statuses, granted = self._channel.ask(request, wire.unpack_reserved, deadline)
        same_count(statuses, items)
        return reserved(statuses, granted)

    def commit(
        self, namespace_id: bytes, lease_id: int, keys: Sequence[bytes], stripes: Sequence[Stripe], deadline: float
    ) -> list[CommitStatus]:
        """One Commit of ``stripes`` of every key; none = whole chunks."""
        _check(keys)
        request = wire.Commit(namespace_id, lease_id, keys, stripes)
        statuses = self._channel.ask(request, wire.unpack_bytes, deadline)
        same_count(statuses, keys)
        return committed(statuses)

    def abort(self, namespace_id: bytes, lease_id: int, keys: Sequence[bytes], deadline: float) -> None:
        """One Abort."""
        _check(keys)
        self._channel.ask(wire.Abort(namespace_id, lease_id, keys), wire.unpack_count, deadline)

    def release(self, lease_ids: Sequence[int], deadline: float) -> None:
        """One Release."""
        self._channel.ask(wire.Release(lease_ids), wire.unpack_count, deadline)

    def renew(self, lease_ids: Sequence[int], deadline: float) -> list[bool]:
        """One Renew; whether each lease is alive."""
        alive = self._channel.ask(wire.Renew(lease_ids), wire.unpack_bytes, deadline)
        same_count(alive, lease_ids)
        return [bool(each) for each in alive]

    def close(self) -> None:
        """Calls under way fail, and later ones too."""
        self._channel.close()


def _check(keys: Sequence[bytes]) -> None:
    """A frame has no place for keys of another length; the daemon would refuse them in the same words."""
    if keys and set(map(len, keys)) != {KEY_BYTES}:
        raise InvalidRequest(f"a key is not {KEY_BYTES} bytes long")
