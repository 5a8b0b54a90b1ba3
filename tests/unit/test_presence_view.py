"""The client's end of the presence table: what it takes for one, and when it says that it does not know."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kvd.memory.presence import PresenceTable
from kvd.wire.errors import KvdError, ProtocolMismatch, Unavailable
from kvd.wire.presence import HEADER, MAGIC, VERSION, table_bytes
from kvd_client.presence import PresenceView

NAMESPACE = os.urandom(32)
KEYS = [os.urandom(32) for _ in range(8)]
DAEMON = 77


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A lifeline: the client's end and the daemon's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def table() -> Iterator[PresenceTable]:
    table = PresenceTable(0, DAEMON)
    yield table
    table.close()


def test_a_view_sees_what_the_daemon_writes_later(
    table: PresenceTable, ends: tuple[socket.socket, socket.socket]
) -> None:
    view = PresenceView(os.dup(table.fd), table.size_bytes, DAEMON, ends[0])
    assert view.may_hold(NAMESPACE, KEYS) == 0
    for key in KEYS[:3]:
        table.add(NAMESPACE, key)
    assert view.may_hold(NAMESPACE, KEYS) == 3
    table.remove(NAMESPACE, KEYS[1])
    assert view.may_hold(NAMESPACE, KEYS) == 1


def test_of_a_daemon_that_has_gone_nothing_is_known(
    table: PresenceTable, ends: tuple[socket.socket, socket.socket]
) -> None:
    view = PresenceView(os.dup(table.fd), table.size_bytes, DAEMON, ends[0])
    assert view.may_hold(NAMESPACE, KEYS) == 0
    ends[1].close()
    assert view.may_hold(NAMESPACE, KEYS) == len(KEYS)
    ends[0].close()
    assert view.may_hold(NAMESPACE, KEYS) == len(KEYS)


def header(
    size: int, *, magic: bytes = MAGIC, version: int = VERSION, writer: int = DAEMON, buckets: int = 64
) -> bytes:
    return HEADER.pack(magic, version, writer, buckets, 0).ljust(size, b"\0")


GOOD = table_bytes(64)


@pytest.mark.parametrize(
    "content, told, error",
    [
        (header(GOOD, magic=b"KVDHELD2"), GOOD, ProtocolMismatch),
        (header(GOOD, version=2), GOOD, ProtocolMismatch),
        (header(GOOD, buckets=128), GOOD, ProtocolMismatch),
        (header(GOOD, writer=78), GOOD, Unavailable),
        (header(GOOD), GOOD - 64, ProtocolMismatch),
        (header(GOOD), 4096, ProtocolMismatch),
        (header(GOOD), 0, ProtocolMismatch),
        (header(GOOD - 8), GOOD, ProtocolMismatch),
        (header(GOOD, buckets=1 << 40), table_bytes(1 << 40), ProtocolMismatch),
    ],
)
def test_what_is_no_table_of_this_daemon_is_not_believed(
    content: bytes, told: int, error: type[KvdError], ends: tuple[socket.socket, socket.socket]
) -> None:
    fd = os.memfd_create("table")
    os.write(fd, content)
    with pytest.raises(error):
        PresenceView(fd, told, DAEMON, ends[0])
    with pytest.raises(OSError):
        os.fstat(fd)  # it was closed


def test_without_a_compiler_the_client_reads_the_table_in_python() -> None:
    code = (
        "import sys; sys.modules['kvd_client._presence'] = None\n"
        "from kvd_client import presence\n"
        "print(presence.may_hold.__module__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    assert result.stdout.strip() == "kvd.wire.presence"
