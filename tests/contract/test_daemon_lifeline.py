"""The lifeline of a real daemon: descriptors, tickets, and what the death of a process ends."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest

from kvd.wire import errors, lifeline
from kvd.wire.lifeline import Kind, Status, socket_path
from kvd.wire.pb import kvd_pb2 as pb
from tests.daemon import ROOT, Daemon, clean_environment
from tests.raw import RawLifeline, RawSession, slots_of
from tests.wait import wait_until

KEYS = [bytes([number]) * 32 for number in range(1, 4)]
WORKER = """
import sys
from tests.raw import RawLifeline
line = RawLifeline(sys.argv[1])
print(line.hello(2, bytes.fromhex(sys.argv[2])).status, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon(pool="4MiB", quarantine=0.1) as daemon:
        yield daemon
        assert daemon.exit_code is not None or daemon.audit() == []
        assert "Traceback" not in daemon.log


@pytest.fixture
def line(daemon: Daemon) -> Iterator[RawLifeline]:
    line = RawLifeline(socket_path(daemon.socket))
    yield line
    line.close()


def session_failure(daemon: Daemon, ticket: bytes) -> errors.KvdError:
    hello = pb.Hello(protocol_min=1, protocol_max=1, ticket=ticket)
    with pytest.raises(grpc.RpcError) as caught:
        RawSession(daemon.unix_endpoint, hello=hello).close()
    return errors.from_rpc_error(caught.value)


def table_word(table: mmap.mmap, offset: int) -> int:
    at = lifeline.TABLE_HEADER_BYTES + offset // lifeline.GRANULE_BYTES * lifeline.WORD_BYTES
    return int.from_bytes(table[at : at + lifeline.WORD_BYTES], "little")


# ---------------------------------------------------------------- descriptors


def test_the_pool_and_its_table_arrive_as_descriptors(daemon: Daemon, line: RawLifeline) -> None:
    welcomed = line.hello()
    assert welcomed.status == Status.OK
    assert welcomed.daemon_id == daemon.stats().daemon_id
    assert len(welcomed.ticket) == 16
    assert len(welcomed.segments) == 1
    data_fd, table_fd = welcomed.descriptors
    segment = welcomed.segments[0]
    assert (segment.index, segment.granule_bytes, segment.data_bytes) == (0, 4096, 4 << 20)
    assert os.fstat(data_fd).st_size == segment.data_bytes
    assert os.fstat(table_fd).st_size == segment.table_bytes
    with mmap.mmap(table_fd, segment.table_bytes, prot=mmap.PROT_READ) as table:
        header = lifeline.TABLE_HEADER.unpack_from(table)
    assert header == (lifeline.TABLE_MAGIC, 4096, 0, 1024, welcomed.daemon_id)


def test_the_table_cannot_be_written_by_a_client(line: RawLifeline) -> None:
    _, table_fd = line.hello().descriptors
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(table_fd, bytes(8), 64)
    with pytest.raises(PermissionError):
        mmap.mmap(table_fd, 4096)
    again = os.open(f"/proc/self/fd/{table_fd}", os.O_RDWR)
    line.descriptors.append(again)
    with pytest.raises(PermissionError):
        mmap.mmap(again, 4096)


def test_the_pool_cannot_be_cut_short_by_a_client(line: RawLifeline) -> None:
    data_fd, _ = line.hello().descriptors
    with pytest.raises(PermissionError):
        os.ftruncate(data_fd, 0)


def test_the_table_tells_a_generation_from_grant_to_drop(daemon: Daemon) -> None:
    with RawSession(daemon.unix_endpoint, daemon.socket) as session:
        assert session.lifeline is not None
        with mmap.mmap(session.lifeline.descriptors[1], 0, prot=mmap.PROT_READ) as table:
            namespace = session.open_namespace()
            (slot,) = session.reserve(namespace, KEYS[:1])
            assert slot is not None
            assert table_word(table, slot.offset) == slot.generation > 0
            session.commit(namespace, KEYS[:1])
            assert table_word(table, slot.offset) == slot.generation
            with grpc.insecure_channel(daemon.unix_endpoint) as channel:
                channel.unary_unary("/kvd.v1.Admin/Drop")(b"", timeout=10)
            assert table_word(table, slot.offset) == 0


def test_bytes_written_by_one_process_are_found_by_another(daemon: Daemon) -> None:
    with RawSession(daemon.unix_endpoint, daemon.socket) as writer:
        assert writer.lifeline is not None
        namespace = writer.open_namespace()
        (slot,) = writer.reserve(namespace, KEYS[:1])
        assert slot is not None
        with mmap.mmap(writer.lifeline.descriptors[0], 0) as pool:
            pool[slot.offset : slot.offset + 4096] = b"k" * 4096
        writer.commit(namespace, KEYS[:1])
    with RawSession(daemon.unix_endpoint, daemon.socket) as reader:
        assert reader.lifeline is not None
        assert slots_of(reader.lookup(reader.open_namespace(), KEYS)) == [slot]
        with mmap.mmap(reader.lifeline.descriptors[0], 0) as pool:
            assert pool[slot.offset : slot.offset + 4096] == b"k" * 4096


# ---------------------------------------------------------------- tickets


def test_a_session_over_the_unix_socket_needs_a_ticket(daemon: Daemon) -> None:
    error = session_failure(daemon, b"")
    assert type(error) is errors.Unauthenticated
    assert "ticket" in str(error)


def test_a_ticket_cannot_be_made_up_or_used_twice(daemon: Daemon, line: RawLifeline) -> None:
    assert type(session_failure(daemon, bytes(16))) is errors.Unauthenticated
    assert type(session_failure(daemon, b"x" * 100)) is errors.Unauthenticated
    ticket = line.hello().ticket
    hello = pb.Hello(protocol_min=1, protocol_max=1, ticket=ticket)
    with RawSession(daemon.unix_endpoint, hello=hello):
        assert type(session_failure(daemon, ticket)) is errors.Unauthenticated


def test_the_ticket_of_a_closed_lifeline_is_void(daemon: Daemon, line: RawLifeline) -> None:
    ticket = line.hello().ticket
    line.close()
    wait_until(lambda: daemon.metrics()["kvd_lifelines"] == 0, what="the daemon to see the end of the lifeline")
    assert type(session_failure(daemon, ticket)) is errors.Unauthenticated


# ---------------------------------------------------------------- what is refused


def test_another_version_is_refused_with_the_reason(line: RawLifeline) -> None:
    welcomed = line.hello(version=99)
    assert (welcomed.status, welcomed.segments, welcomed.descriptors) == (Status.BAD_VERSION, [], [])
    assert line.at_end()


def test_a_process_cannot_attach_to_a_session_that_does_not_exist(line: RawLifeline) -> None:
    welcomed = line.hello(Kind.ATTACH, bytes(16))
    assert (welcomed.status, welcomed.descriptors) == (Status.UNKNOWN_SESSION, [])
    assert line.at_end()


NO_KIND = lifeline.HELLO.pack(lifeline.MAGIC, lifeline.VERSION, 77, bytes(16))


@pytest.mark.parametrize("message", [b"x", b"x" * 24, NO_KIND, b"x" * 5000])
def test_what_is_no_hello_ends_the_connection(daemon: Daemon, line: RawLifeline, message: bytes) -> None:
    line.socket.send(message)
    assert line.at_end()
    assert daemon.stats().state == "serving"


def test_noise_on_a_lifeline_proves_nothing(daemon: Daemon) -> None:
    with RawSession(daemon.unix_endpoint, daemon.socket) as session:
        assert session.lifeline is not None
        session.lifeline.socket.send(b"noise")
        session.lifeline.socket.send(lifeline.HELLO.pack(b"KVDL", lifeline.VERSION, Kind.OPEN, bytes(16)))
        assert session.call("Stats", pb.StatsRequest()).sessions[0].members == 1
        session.lifeline.socket.settimeout(0.05)
        with pytest.raises(TimeoutError):
            session.lifeline.at_end()


# ---------------------------------------------------------------- life and death


def test_read_leases_end_with_the_stream(daemon: Daemon) -> None:
    with RawSession(daemon.unix_endpoint, daemon.socket) as session:
        namespace = session.open_namespace()
        session.reserve(namespace, KEYS)
        session.commit(namespace, KEYS)
        session.lookup(namespace, KEYS)
        assert daemon.stats().sessions[0].read_leases == 1
        session.end_stream()
        wait_until(lambda: daemon.metrics()["kvd_read_leases"] == 0, what="the lease to end")


def test_slots_being_written_stay_until_every_process_that_could_write_is_dead(daemon: Daemon) -> None:
    with RawSession(daemon.unix_endpoint, daemon.socket) as session:
        assert session.lifeline is not None
        token = session.welcome.session_token
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, socket_path(daemon.socket), token.hex()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=clean_environment(),
        )
        try:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"0\n"
            assert daemon.stats().sessions[0].members == 2
            session.reserve(session.open_namespace(), KEYS[:1])

            session.end_stream()
            wait_until(lambda: daemon.log.count("session 1 ended"), what="the stream's end to be seen")
            session.lifeline.close()
            wait_until(lambda: daemon.stats().sessions[0].members == 1, what="the first process's end to be seen")
            pool = daemon.stats().pool
            assert (pool.writing_bytes, pool.quarantined_bytes) == (4096, 0)

            worker.kill()
            wait_until(lambda: not daemon.stats().sessions, what="the second process's end to be seen")
        finally:
            worker.kill()
            worker.communicate(timeout=10)
        assert daemon.stats().counters["quarantined_chunks"] == 1
        wait_until(lambda: daemon.stats().pool.free_bytes == 4 << 20, what="the quarantine to end")


def test_a_tcp_sessions_writes_end_with_its_stream(daemon: Daemon) -> None:
    with RawSession(daemon.tcp_endpoint.removeprefix("tcp://")) as session:
        session.reserve(session.open_namespace(), KEYS[:1])
        session.end_stream()
        wait_until(lambda: daemon.stats().pool.free_bytes == 4 << 20, what="the slot to come back")


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_client_sees_the_end_of_the_daemon(daemon: Daemon, line: RawLifeline, how: str) -> None:
    line.hello()
    getattr(daemon, how)()
    assert line.at_end()


def test_a_client_that_says_nothing_holds_nobody_up(daemon: Daemon) -> None:
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
    try:
        for connection in silent:
            connection.connect(socket_path(daemon.socket))
        with RawSession(daemon.unix_endpoint, daemon.socket) as session:
            assert session.call("Stats", pb.StatsRequest()).state == "serving"
        assert daemon.stop() == 0
    finally:
        for connection in silent:
            connection.close()
