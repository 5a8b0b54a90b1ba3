"""Lookups that wait for chunks on their way into memory, against a daemon that says what the test wants."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from kvd.wire import calls as wire
from kvd.wire import frames
from kvd.wire.chunks import Location
from kvd.wire.errors import Draining
from kvd.wire.pb import kvd_pb2 as pb
from kvd.wire.pb import kvd_pb2_grpc
from kvd_client import Client, Identity, NamespaceHandle
from tests.wait import wait_until

KEYS = [bytes([i]) * 32 for i in range(8)]


class Scripted(kvd_pb2_grpc.KvdServicer):
    """``answers``: (chunks in memory, chunks on their way) of each lookup; the last one is repeated."""

    def __init__(self) -> None:
        self.answers = [(0, 0)]
        self.asked: list[wire.Lookup] = []
        self.released: list[int] = []
        self.gone = False  # for those who ask again
        self.over = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def Session(self, notes: Iterator[pb.ClientNote], context: grpc.ServicerContext) -> Iterator[pb.ServerNote]:
        next(notes)
        yield pb.ServerNote(
            welcome=pb.Welcome(
                protocol=1,
                session_token=bytes(16),
                daemon_id=1,
                heartbeat_interval_ms=1000,
                read_lease_ms=30000,
                max_chunks_per_request=4096,
                max_chunk_bytes=1 << 20,
                data_port=self.listener.getsockname()[1],
            )
        )
        self.over.wait(60)

    def OpenNamespace(self, request: pb.OpenNamespaceRequest, context: Any) -> pb.OpenNamespaceResponse:
        return pb.OpenNamespaceResponse(namespace_id=bytes(32))

    def serve(self) -> None:
        """Answers calls until the client has gone."""
        connection, _ = self.listener.accept()
        with connection, connection.makefile("rb") as received:
            assert frames.HELLO.unpack(received.read(frames.HELLO.size))[2] == frames.Purpose.CALLS
            connection.sendall(frames.HELLO_REPLY.pack(frames.MAGIC, frames.VERSION, frames.HelloStatus.OK))
            while length := received.read(wire.LENGTH.size):
                head, request = wire.unpack_request(length + received.read(wire.frame_length(length) - len(length)))
                connection.sendall(self.answer(head, request))

    def answer(self, head: wire.Head, request: wire.Request) -> bytes:
        body = b""
        self.released += head.released
        match request:
            case wire.Renew():
                body = wire.pack_bytes([])
            case wire.Release(lease_ids):
                self.released += lease_ids
                body = wire.pack_count(len(lease_ids))
            case wire.Lookup():
                if self.gone and request.again:
                    return wire.pack_failure(head.op, head.request_id, Draining("gone"))
                self.asked.append(request)
                held, promoting = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                places = [Location(0, 4096 * i, 1) for i in range(max(0, held - request.skip))]
                body = wire.pack_found(places, promoting, 0)
        return wire.pack_answer(head.op, head.request_id, body)


@pytest.fixture
def daemon() -> Iterator[Scripted]:
    daemon = Scripted()
    yield daemon
    with contextlib.suppress(OSError):
        daemon.listener.shutdown(socket.SHUT_RDWR)
    daemon.listener.close()
    daemon.thread.join(10)


@pytest.fixture
def client(daemon: Scripted) -> Iterator[Client]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    kvd_pb2_grpc.add_KvdServicer_to_server(daemon, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"tcp://127.0.0.1:{port}", timeout_s=10.0) as client:
            client.connect(20)
            yield client
    finally:
        daemon.over.set()
        server.stop(None)


@pytest.fixture
def namespace(client: Client) -> NamespaceHandle:
    return client.namespace(Identity(model="m", weights_revision="1"), 4096)


def test_without_a_wait_there_is_one_question(client: Client, daemon: Scripted, namespace: NamespaceHandle) -> None:
    daemon.answers = [(2, 6)]
    lease = client.lookup(namespace, KEYS)
    assert (len(lease), lease.promoting) == (2, 6)
    assert [request.again for request in daemon.asked] == [False]


def test_a_wait_ends_when_all_has_come_and_only_the_last_lease_is_kept(
    client: Client, daemon: Scripted, namespace: NamespaceHandle
) -> None:
    daemon.answers = [(1, 7), (3, 5), (8, 0)]
    lease = client.lookup(namespace, KEYS, skip=1, wait_s=30)
    assert (len(lease), lease.promoting) == (7, 0)
    assert [request.again for request in daemon.asked] == [False, True, True]
    assert {request.skip for request in daemon.asked} == {1}
    # The first answer held nothing beyond what the caller has: there was no lease.
    wait_until(lambda: daemon.released == [daemon.asked[1].lease_id], 10, "the former lease to be released")
    assert lease.lease_id == daemon.asked[2].lease_id


def test_a_wait_that_is_in_vain_ends_in_time_with_what_is_there(
    client: Client, daemon: Scripted, namespace: NamespaceHandle
) -> None:
    daemon.answers = [(2, 6)]
    began = time.monotonic()
    lease = client.lookup(namespace, KEYS, wait_s=0.2)
    assert (len(lease), lease.promoting) == (2, 6)
    assert time.monotonic() - began >= 0.2
    assert len(daemon.asked) > 3
    former = [request.lease_id for request in daemon.asked[:-1]]
    wait_until(lambda: sorted(daemon.released) == sorted(former), 10, "former leases to be released")


def test_a_daemon_that_goes_away_during_a_wait_is_an_error_and_leaves_no_lease(
    client: Client, daemon: Scripted, namespace: NamespaceHandle
) -> None:
    daemon.answers, daemon.gone = [(2, 6)], True
    with pytest.raises(Draining, match="gone"):
        client.lookup(namespace, KEYS, wait_s=30)
    wait_until(lambda: daemon.asked[0].lease_id in daemon.released, 20, "the lease to be released")
