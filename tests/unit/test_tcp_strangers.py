"""The TCP data plane and whoever connects to it: what a client may do to the daemon."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator, Sequence

import pytest
import xxhash

from kvd.transport.tcp import MAX_CONNECTIONS_PER_SESSION
from kvd.wire import stream
from kvd.wire.errors import KvdError, LimitReached, ProtocolMismatch, SessionUnknown, Unavailable
from kvd.wire.frames import (
    CHECKSUM,
    FLAG_NO_CHECKSUM,
    HELLO,
    HELLO_REPLY,
    ITEM_STATUS,
    MAGIC,
    MAX_ITEMS,
    MAX_REQUEST_BYTES,
    MAX_RUNS,
    REPLY,
    REQUEST,
    VERSION,
    HelloStatus,
    Item,
    ItemStatus,
    Op,
    pack_request,
)
from kvd.wire.spans import Span, whole
from kvd_client.path import Attachment, Piece, open_path
from tests.unit.tcp_world import CHUNK_BYTES, LEASE, SESSION, TOKEN, World, chunk, is_closed, serving, soon, take
from tests.wait import wait_until


@pytest.fixture
def world() -> Iterator[World]:
    with serving() as world:
        yield world


def request(op: int = Op.READ, flags: int = 0, count: int = 1, items: Sequence[Item] | None = None) -> bytes:
    items = [Item(0, 0, 1, whole(8))] if items is None else items
    return REQUEST.pack(op, flags, 0, count, LEASE) + bytes(pack_request(Op.READ, LEASE, list(items)))[REQUEST.size :]


@pytest.mark.parametrize(
    "message",
    [
        request(op=9),
        request(op=0),
        request(flags=0x80),
        request(count=0, items=[]),
        request(count=MAX_ITEMS + 1, items=[]),
        request(count=0xFFFFFFFF, items=[]),
        request(items=[Item(0, 0, 1, Span(0, 0, 8, 1))]),
        request(items=[Item(0, 0, 1, Span(0, 8, 8, 0))]),
        request(items=[Item(0, 0, 1, Span(0, 8, 4, 2))]),
        request(items=[Item(0, 0, 1, whole(MAX_REQUEST_BYTES + 1))]),
        request(items=[Item(0, 0, 1, whole((1 << 64) - 1))]),
        request(items=[Item(0, 0, 1, Span((1 << 64) - 1, (1 << 64) - 1, (1 << 64) - 1, 1 << 31))]),
        request(items=[Item(0, 0, 1, Span(0, 1, 2, MAX_RUNS + 1))]),
        request(count=2, items=[Item(0, 0, 1, Span(0, 1, 2, MAX_RUNS))] * 2),
        request(count=2, items=[Item(0, 0, 1, whole(MAX_REQUEST_BYTES))] * 2),
    ],
)
def test_a_malformed_request_closes_its_connection_and_nothing_else(world: World, message: bytes) -> None:
    good = open_path(world.attachment())
    with world.raw() as connection:
        connection.sendall(message)
        assert is_closed(connection)
    assert not world.books.ended, "the books were asked about a malformed request"
    assert good.read(LEASE, [Piece(chunk(0), whole(8), bytearray(8))], soon()) == [True]
    good.close()


def test_random_bytes_hurt_nobody(world: World) -> None:
    for seed in range(50):
        with world.raw() as connection:
            noise = struct.pack("<BBHIQ", seed % 3, 0, 0, 1 + seed, seed) + os.urandom(4096)
            try:
                connection.sendall(noise)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass
            except OSError:
                pass
    wait_until(world.settled, what="all requests to end")
    path = open_path(world.attachment())
    assert path.read(LEASE, [Piece(chunk(0), whole(8), bytearray(8))], soon()) == [True]
    path.close()


@pytest.mark.parametrize(
    ("hello", "status"),
    [
        (HELLO.pack(MAGIC, VERSION + 1, 0, TOKEN), HelloStatus.BAD_VERSION),
        (HELLO.pack(MAGIC, VERSION, 0, bytes(16)), HelloStatus.UNKNOWN_SESSION),
    ],
)
def test_a_handshake_is_refused_with_its_reason(world: World, hello: bytes, status: HelloStatus) -> None:
    with socket.create_connection((world.plane.host, world.plane.port), 10) as connection:
        connection.sendall(hello)
        assert HELLO_REPLY.unpack(take(connection, HELLO_REPLY.size)) == (MAGIC, VERSION, status)
        assert is_closed(connection)


def test_who_speaks_another_protocol_is_told_nothing(world: World) -> None:
    with socket.create_connection((world.plane.host, world.plane.port), 10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: kvd\r\n\r\n")
        assert is_closed(connection)


def test_a_path_of_an_unknown_session_is_refused(world: World) -> None:
    with pytest.raises(SessionUnknown):
        open_path(world.attachment()._replace(token=bytes(16)))


@pytest.mark.parametrize(
    ("status", "error"), [(1, ProtocolMismatch), (2, SessionUnknown), (3, LimitReached), (4, Unavailable)]
)
def test_a_client_knows_why_it_was_refused(status: int, error: type[KvdError]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as daemon:
        daemon.settimeout(10)

        def refuse() -> None:
            with daemon.accept()[0] as connection:
                take(connection, HELLO.size)
                connection.sendall(HELLO_REPLY.pack(MAGIC, VERSION + 1, status))

        refusing = threading.Thread(target=refuse)
        refusing.start()
        with pytest.raises(error):
            open_path(Attachment("tcp", "127.0.0.1", daemon.getsockname()[1], TOKEN, 1, 1, 1))
        refusing.join()


def test_a_path_to_nobody_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    with pytest.raises(Unavailable):
        open_path(Attachment("tcp", "127.0.0.1", port, TOKEN, 1, 1, 1))


def test_connections_are_bounded() -> None:
    with serving(max_connections=2) as world, world.raw():
        with world.raw(), pytest.raises(LimitReached):
            open_path(world.attachment())
        wait_until(lambda: world.plane.connections < 2, what="the connection to be forgotten")
        open_path(world.attachment()).close()


def test_one_session_cannot_take_all_connections(world: World) -> None:
    held = [world.raw() for _ in range(MAX_CONNECTIONS_PER_SESSION)]
    with pytest.raises(LimitReached):
        open_path(world.attachment())
    for connection in held:
        connection.close()


def test_a_writer_that_vanishes_in_mid_payload_has_failed_what_was_missing(world: World) -> None:
    items = [Item(*chunk(i), whole(CHUNK_BYTES)) for i in range(3)]
    payload = bytes(CHUNK_BYTES)
    with world.raw() as connection:
        connection.sendall(pack_request(Op.WRITE, LEASE, items, FLAG_NO_CHECKSUM) + payload + payload[:1000])
        wait_until(lambda: len(world.books.open) == 1, what="the request to be under way")
    wait_until(lambda: bool(world.books.ended), what="the books to hear of it")
    assert world.books.ended == [(0, {1, 2})]
    wait_until(world.settled, what="nothing to be in flight")


def test_the_end_of_a_payload_is_received_when_it_comes_however_short_it_is(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_LONGEST_TIMEOUT_S", 60.0)  # nobody looks after the bytes in between
    data = b"\1" * (stream.PIECE_BYTES + 1)
    early = len(data) - 1001
    with world.raw() as connection:
        connection.sendall(pack_request(Op.WRITE, LEASE, [Item(0, 0, 1, whole(len(data)))]) + data[:early])
        wait_until(lambda: world.pool[early - 1], what="the first bytes to be in place")
        connection.sendall(data[early:] + CHECKSUM.pack(xxhash.xxh3_64_intdigest(data)))
        done = REPLY.pack(0, 0, 1) + ITEM_STATUS.pack(ItemStatus.OK)
        assert take(connection, len(done)) == done


def test_a_writer_that_stands_still_is_closed_after_the_timeout() -> None:
    with serving(io_timeout_s=0.2) as world:
        with world.raw() as connection:
            connection.sendall(pack_request(Op.WRITE, LEASE, [Item(*chunk(0), whole(8))]) + b"1234")
            assert is_closed(connection)
        assert world.books.ended == [(0, {0})]
        wait_until(world.settled, what="nothing to be in flight")


def test_an_idle_connection_is_left_in_peace() -> None:
    with serving(io_timeout_s=0.05) as world, serving(io_timeout_s=0.05) as other:
        path = open_path(world.attachment())
        with other.raw() as connection:
            connection.sendall(pack_request(Op.WRITE, LEASE, [Item(*chunk(0), whole(8))]))
            assert is_closed(connection)  # so much time has passed that an impatient plane would have closed the path
        assert path.alive
        assert path.read(LEASE, [Piece(chunk(0), whole(8), bytearray(8))], soon()) == [True]
        path.close()


def test_a_closed_session_cannot_move_another_byte(world: World) -> None:
    with world.raw() as connection:
        connection.sendall(pack_request(Op.WRITE, LEASE, [Item(*chunk(0), whole(CHUNK_BYTES))]) + bytes(1000))
        wait_until(lambda: len(world.books.open) == 1, what="the request to be under way")
        world.books.closed = True
        world.plane.close_session(SESSION)
        wait_until(world.settled, what="nothing to be in flight")
        assert is_closed(connection)
    assert world.books.ended == [(0, {0})]
    with pytest.raises(SessionUnknown):
        open_path(world.attachment())


def test_an_answer_says_what_comes_before_any_of_it_comes(world: World) -> None:
    world.pool[: 3 * CHUNK_BYTES] = os.urandom(3 * CHUNK_BYTES)
    world.books.gone = {chunk(1).offset}
    with world.raw() as connection:
        connection.sendall(pack_request(Op.READ, LEASE, [Item(*chunk(i), whole(1000)) for i in range(3)]))
        expected = REPLY.pack(0, 0, 3) + b"".join(ITEM_STATUS.pack(status) for status in (0, ItemStatus.GONE, 0))
        for i in (0, 2):
            payload = bytes(world.pool[chunk(i).offset : chunk(i).offset + 1000])
            expected += payload + CHECKSUM.pack(xxhash.xxh3_64_intdigest(payload))
        assert take(connection, len(expected)) == expected


def test_requests_that_do_not_wait_for_answers_are_answered_in_their_order(world: World) -> None:
    world.pool[:8], world.pool[CHUNK_BYTES : CHUNK_BYTES + 8] = b"the last", b"expected"
    items = [Item(*chunk(i), whole(8)) for i in (1, 0)]
    write = bytes(pack_request(Op.WRITE, LEASE, [items[1]], FLAG_NO_CHECKSUM)) + b"are last"
    reads = [bytes(pack_request(Op.READ, LEASE, [item], FLAG_NO_CHECKSUM)) for item in items]
    with world.raw() as connection:
        connection.sendall(reads[0] + write + reads[1])
        done = REPLY.pack(0, 0, 1) + ITEM_STATUS.pack(ItemStatus.OK)
        expected = done + b"expected" + done + done + b"are last"
        assert take(connection, len(expected)) == expected


def test_payloads_without_checksums_are_read_and_written_when_asked_for(world: World) -> None:
    data = os.urandom(1000)
    item = Item(*chunk(2), whole(1000))
    with world.raw() as connection:
        connection.sendall(pack_request(Op.WRITE, LEASE, [item], FLAG_NO_CHECKSUM) + data)
        assert take(connection, REPLY.size + ITEM_STATUS.size) == REPLY.pack(0, 0, 1) + ITEM_STATUS.pack(ItemStatus.OK)
        connection.sendall(pack_request(Op.READ, LEASE, [item], FLAG_NO_CHECKSUM))
        assert take(connection, REPLY.size + ITEM_STATUS.size + 1000)[-1000:] == data


def test_a_payload_that_does_not_match_its_checksum_is_refused(world: World) -> None:
    with world.raw() as connection:
        connection.sendall(
            pack_request(Op.WRITE, LEASE, [Item(*chunk(0), whole(8))]) + b"12345678" + CHECKSUM.pack(12345)
        )
        assert ITEM_STATUS.unpack(take(connection, REPLY.size + ITEM_STATUS.size)[REPLY.size :]) == (
            ItemStatus.CHECKSUM,
        )
    assert world.books.ended == [(0, {0})]
