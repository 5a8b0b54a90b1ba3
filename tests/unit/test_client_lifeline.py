"""The client's end of a lifeline, against a daemon that answers what the test wants."""

from __future__ import annotations

import array
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvd.wire import lifeline as wire
from kvd.wire.errors import KvdError, LimitReached, ProtocolMismatch, SessionUnknown, Unauthenticated, Unavailable
from kvd.wire.lifeline import Status
from kvd_client.lifeline import Lifeline
from tests.wait import wait_until

SEGMENT = wire.SEGMENT.pack(0, 4096, 4096, 4096, 4096)


class FakeDaemon:
    """Answers the next HELLO with ``message`` and descriptors of ``passed``."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.message = b""
        self.passed: list[int] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen(4)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(wire.MAX_MESSAGE_BYTES)
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self.passed))] if self.passed else []
                connection.sendmsg([self.message], rights)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(str(tmp_path / "sock"))
    yield daemon
    daemon.close()


@pytest.fixture
def files() -> Iterator[list[int]]:
    """Descriptors to pass: the daemon's copies."""
    ours, theirs = socket.socketpair()
    made = [os.open("/dev/null", os.O_RDONLY) for _ in range(5)]
    yield [made[0], made[1], theirs.fileno(), *made[2:]]
    for fd in made:
        os.close(fd)
    ours.close()
    theirs.close()


def welcome(
    status: int = Status.OK, *, version: int = wire.VERSION, segments: int = 1, holders: int = 0, presence: int = 0
) -> bytes:
    counts = (segments, holders, presence)
    return wire.WELCOME.pack(wire.MAGIC, version, status, 8, bytes(16), *counts) + SEGMENT * segments


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def same_file(one: int, other: int) -> bool:
    return os.path.sameopenfile(one, other)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (welcome(Status.REFUSED_USER, segments=0), Unauthenticated),
        (welcome(Status.UNKNOWN_SESSION, segments=0), SessionUnknown),
        (welcome(Status.TOO_MANY, segments=0), LimitReached),
        (welcome(Status.BAD_VERSION, segments=0), ProtocolMismatch),
        (welcome(Status.BAD_VERSION, version=wire.VERSION + 1, segments=0), ProtocolMismatch),
        (welcome(Status.BAD_VERSION, version=2, segments=0)[:40], ProtocolMismatch),  # as short as it was then
        (b"KVD", ProtocolMismatch),
        (b"HTTP" + welcome()[4:], ProtocolMismatch),
        (b"", Unavailable),
    ],
)
def test_a_client_that_is_refused_hears_why(daemon: FakeDaemon, message: bytes, error: type[KvdError]) -> None:
    daemon.message = message
    with pytest.raises(KvdError) as caught:
        Lifeline.open(daemon.path, 10)
    assert type(caught.value) is error


def test_no_two_statuses_are_the_same() -> None:
    for kind in (wire.Status, wire.Kind):
        assert len({int(member) for member in kind.__members__.values()}) == len(kind.__members__)


def test_what_came_is_what_was_passed_and_goes_when_it_is_dropped(daemon: FakeDaemon, files: list[int]) -> None:
    daemon.message, daemon.passed = welcome(holders=1, presence=77), files[:5]
    before = descriptors()
    lifeline = Lifeline.open(daemon.path, 10)
    assert lifeline.presence is not None
    assert lifeline.presence[1] == 77
    lifeline.drop_descriptors()
    assert lifeline.presence is None
    lifeline.close()
    wait_until(lambda: descriptors() == before, what="every descriptor to be closed")


def test_what_was_taken_is_the_takers(daemon: FakeDaemon, files: list[int]) -> None:
    daemon.message, daemon.passed = welcome(holders=1, presence=77), files[:5]
    lifeline = Lifeline.open(daemon.path, 10)
    channel, presence, holder = lifeline.take_channel(), lifeline.take_presence(), lifeline.take_holder()
    lifeline.close()
    with channel:
        assert same_file(channel.fileno(), files[2])
    assert presence is not None and presence[1] == 77
    assert holder is not None
    for fd in (presence[0], holder):
        assert same_file(fd, files[3])
        os.close(fd)


Broken = Callable[[list[int]], tuple[bytes, list[int]]]
BROKEN: dict[str, Broken] = {
    "no channel": lambda files: (welcome(), files[:2]),
    "no presence": lambda files: (welcome(presence=8), files[:3]),
    "one too many": lambda files: (welcome(), files[:4]),
    "no holder": lambda files: (welcome(presence=8, holders=1), files[:4]),
    "two holders": lambda files: (welcome(holders=2), files[:5]),
    "no segment": lambda files: (welcome()[: -len(SEGMENT)], files[:3]),
    "none at all": lambda files: (welcome(), []),
}


@pytest.mark.parametrize("how", sorted(BROKEN))
def test_a_welcome_without_what_it_promises_is_no_lifeline(daemon: FakeDaemon, files: list[int], how: str) -> None:
    daemon.message, daemon.passed = BROKEN[how](files)
    before = descriptors()
    with pytest.raises((Unavailable, ProtocolMismatch)):
        Lifeline.open(daemon.path, 10)
    wait_until(lambda: descriptors() == before, what="every descriptor to be closed")
