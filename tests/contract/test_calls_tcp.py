"""Calls over TCP: a connection of the data plane that is the session's, and ends with it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from kvd.wire import calls as wire
from kvd.wire import errors, frames
from kvd_client import Client, ProtocolMismatch
from tests.contract.clients import client_of, namespace_of, prefix
from tests.daemon import Daemon
from tests.raw import RawSession
from tests.wait import wait_until

GARBAGE = wire.REQUEST.pack(wire.REQUEST.size, 99, 0, 0, 1, 0, 0)


@pytest.fixture
def session(daemon: Daemon) -> Iterator[RawSession]:
    with RawSession(daemon.tcp_endpoint.removeprefix("tcp://")) as session:
        yield session


def connect(daemon: Daemon, token: bytes, purpose: int = frames.Purpose.CALLS) -> tuple[socket.socket, bytes]:
    """A connection to the data plane, and what it was answered."""
    host, port = daemon.data_endpoint.rsplit(":", 1)
    connection = socket.create_connection((host, int(port)), 10)
    connection.sendall(frames.HELLO.pack(frames.MAGIC, frames.VERSION, purpose, token))
    return connection, connection.recv(frames.HELLO_REPLY.size, socket.MSG_WAITALL)


def ask(connection: socket.socket, request: wire.Request) -> memoryview | errors.KvdError:
    connection.sendall(wire.pack_request(request, 7))
    head = connection.recv(wire.LENGTH.size, socket.MSG_WAITALL)
    if not head:
        raise ConnectionResetError("closed by the daemon")
    rest = connection.recv(wire.frame_length(head) - len(head), socket.MSG_WAITALL)
    answered, op, body = wire.unpack_answer(head + rest)
    assert (answered, op) == (7, wire.op_of(request))
    return body


def is_over(connection: socket.socket) -> bool:
    """Whether the daemon has closed it; waits for that."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_session_asks_over_its_connection(daemon: Daemon, session: RawSession) -> None:
    namespace = session.open_namespace("calls")
    connection, answer = connect(daemon, session.welcome.session_token)
    with connection:
        assert frames.HELLO_REPLY.unpack(answer)[2] == frames.HelloStatus.OK
        reserved = ask(connection, wire.Reserve(namespace, 1, [(bytes([1]) * 32, b"")]))
        assert isinstance(reserved, memoryview)
        assert daemon.stats().pool.writing_bytes == 4096 * len(wire.unpack_reserved(reserved)[1])
        assert type(ask(connection, wire.Lookup(bytes(32), 1, [bytes(32)]))) is errors.NamespaceUnknown
    assert daemon.stats().sessions[0].write_leases == 1, "the end of a connection proves nothing about the client"


def test_nobody_asks_with_a_token_that_is_not_a_sessions(daemon: Daemon) -> None:
    connection, answer = connect(daemon, bytes(16))
    with connection:
        assert frames.HELLO_REPLY.unpack(answer)[2] == frames.HelloStatus.UNKNOWN_SESSION
        assert is_over(connection)


def test_a_purpose_that_there_is_not_is_told_nothing(daemon: Daemon, session: RawSession) -> None:
    connection, answer = connect(daemon, session.welcome.session_token, purpose=9)
    with connection:
        assert answer == b""


def test_the_connection_ends_with_its_session(daemon: Daemon, session: RawSession) -> None:
    connection, _ = connect(daemon, session.welcome.session_token)
    with connection:
        assert isinstance(ask(connection, wire.Renew()), memoryview)
        session.end_stream()
        assert is_over(connection)


def test_a_second_connection_takes_the_place_of_the_first(daemon: Daemon, session: RawSession) -> None:
    first, _ = connect(daemon, session.welcome.session_token)
    with first:
        assert isinstance(ask(first, wire.Renew()), memoryview)
        second, _ = connect(daemon, session.welcome.session_token)
        with second:
            assert isinstance(ask(second, wire.Renew()), memoryview)
            assert is_over(first)


def test_what_is_no_frame_ends_the_connection_and_nothing_else(daemon: Daemon, session: RawSession) -> None:
    connection, _ = connect(daemon, session.welcome.session_token)
    with connection:
        connection.sendall(GARBAGE)
        assert is_over(connection)
    assert len(daemon.stats().sessions) == 1
    again, _ = connect(daemon, session.welcome.session_token)
    with again:
        assert isinstance(ask(again, wire.Renew()), memoryview)


def test_a_client_that_loses_its_connection_comes_back_with_a_new_session(daemon: Daemon) -> None:
    with client_of(daemon, "tcp") as client:
        namespace, keys = namespace_of(client, 4096), prefix(2)
        assert client.load(namespace, keys, [bytearray(4096)] * 2) == 0
        channel = client._keeper.require()._channel
        assert channel is not None
        channel._socket.shutdown(socket.SHUT_RDWR)
        assert client.load(namespace, keys, [bytearray(4096)] * 2) == 0, "a miss, not an error"
        wait_until(lambda: client.connected and client.epoch == 2, 20, "a second session")
        assert client.renew([]) == []


def test_a_client_of_another_data_plane_is_told_so(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvd_client.tcp.VERSION", frames.VERSION + 1)
    with Client(daemon.tcp_endpoint) as client, pytest.raises(ProtocolMismatch, match="its version is"):
        client.connect(20)
