"""The TCP data plane and its client path, over a pool that is a bytearray and books that are a dict."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pytest

from kvd.transport.tcp import MAX_CONNECTIONS_PER_SESSION, DataPlane
from kvd.wire.chunks import Location
from kvd.wire.errors import LimitReached, SessionUnknown, Unavailable
from kvd.wire.frames import (
    CHECKSUM,
    FLAG_NO_CHECKSUM,
    HELLO,
    HELLO_REPLY,
    ITEM,
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
from tests.proxy import Proxy
from tests.wait import wait_until

TOKEN = b"0123456789abcdef"
SESSION = 7
POOL_BYTES = 32 << 20
CHUNK_BYTES = 256 << 10
LEASE = 3


class Books:
    """An authority that grants everything but what is in ``gone``, and writes down what it hears."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.gone: set[int] = set()  # offsets
        self.open: set[int] = set()
        self.ended: list[tuple[int, set[int]]] = []
        self.closed = False

    def admit(self, token: bytes) -> int | None:
        return SESSION if token == TOKEN and not self.closed else None

    def begin_io(self, session: int, op: Op, lease_id: int, items: Sequence[Item]) -> tuple[Any, list[ItemStatus]]:
        if self.closed:
            raise SessionUnknown("closed")
        assert session == SESSION
        with self.lock:
            ticket = len(self.ended) + len(self.open)
            self.open.add(ticket)
        return ticket, [ItemStatus.GONE if item.offset in self.gone else ItemStatus.OK for item in items]

    def end_io(self, ticket: int, failed: Collection[int]) -> None:
        with self.lock:
            self.open.remove(ticket)
            self.ended.append((ticket, set(failed)))


class World:
    """A plane over a pool, and everything a test wants to know of it."""

    def __init__(self, host: str = "127.0.0.1", **options: Any) -> None:
        self.pool = bytearray(POOL_BYTES)
        self.books = Books()
        self.moved: list[tuple[str, int]] = []
        self.plane = DataPlane(
            host,
            0,
            [memoryview(self.pool)],
            self.books,
            observer=lambda op, moved_bytes, seconds: self.moved.append((op, moved_bytes)),
            **options,
        )
        self.plane.start()

    def attachment(self, connections: int = 4, port: int = 0) -> Attachment:
        return Attachment("tcp", self.plane.host, port or self.plane.port, TOKEN, 1, 1, connections)

    def raw(self) -> socket.socket:
        """A connection after its handshake."""
        connection = socket.create_connection((self.plane.host, self.plane.port), 10)
        connection.sendall(HELLO.pack(MAGIC, VERSION, 0, TOKEN))
        assert HELLO_REPLY.unpack(take(connection, HELLO_REPLY.size)) == (MAGIC, VERSION, HelloStatus.OK)
        return connection

    def settled(self) -> bool:
        """Nothing is under way."""
        return not self.books.open


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.plane.close()
    assert world.settled()
    wait_until(lambda: not world.plane.connections, what="every connection to be closed")


def take(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionResetError
        data += more
    return data


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def soon() -> float:
    return time.monotonic() + 20


def chunk(number: int) -> Location:
    return Location(0, number * CHUNK_BYTES, number + 1)


def test_every_byte_makes_the_round_trip(world: World) -> None:
    path = open_path(world.attachment())
    data = [os.urandom(CHUNK_BYTES) for _ in range(40)]
    assert (
        path.write(LEASE, [Piece(chunk(i), whole(CHUNK_BYTES), each) for i, each in enumerate(data)], soon())
        == [True] * 40
    )
    assert bytes(world.pool[: 40 * CHUNK_BYTES]) == b"".join(data)
    out = [bytearray(CHUNK_BYTES) for _ in data]
    assert (
        path.read(LEASE, [Piece(chunk(i), whole(CHUNK_BYTES), each) for i, each in enumerate(out)], soon())
        == [True] * 40
    )
    assert out == data
    assert world.plane.connections > 1
    assert sum(count for op, count in world.moved if op == "write") == 40 * CHUNK_BYTES
    assert sum(count for op, count in world.moved if op == "read") == 40 * CHUNK_BYTES
    assert path.alive
    path.close()
    assert not path.alive


@pytest.mark.parametrize(
    "span",
    [
        Span(4096, 512, 2048, 100),
        Span(1, 3, 5, 7),
        Span(0, 64, 64, 4096),  # adjoining
        Span(10, 1, 2, 5000),  # more runs than one call takes
        Span(4096, 3 << 20, 4 << 20, 3),  # runs longer than one piece
        Span(0, (1 << 20) + 1, (1 << 20) + 1, 1),
    ],
)
def test_a_strided_span_touches_its_own_bytes_and_no_others(world: World, span: Span) -> None:
    before = os.urandom(16 << 20)
    world.pool[: len(before)] = before
    at = Location(0, 4096, 1)
    expected = bytearray(before)
    data = os.urandom(span.size)
    for i in range(span.count):
        begin = at.offset + span.offset + i * span.stride
        expected[begin : begin + span.run] = data[i * span.run : (i + 1) * span.run]
    path = open_path(world.attachment())
    assert path.write(LEASE, [Piece(at, span, data)], soon()) == [True]
    assert world.pool[: len(before)] == expected
    back = bytearray(span.size)
    assert path.read(LEASE, [Piece(at, span, back)], soon()) == [True]
    assert back == data
    path.close()


def test_a_refused_item_among_others_leaves_the_stream_in_step(world: World) -> None:
    world.books.gone = {chunk(1).offset, chunk(4).offset}
    path = open_path(world.attachment(connections=1))
    pieces = [Piece(chunk(i), whole(CHUNK_BYTES), os.urandom(CHUNK_BYTES)) for i in range(5)]
    expected = [True, False, True, True, False]
    assert path.write(LEASE, pieces, soon()) == expected
    assert not any(world.pool[CHUNK_BYTES : 2 * CHUNK_BYTES]), "a refused payload has reached the pool"
    out = [bytearray(CHUNK_BYTES) for _ in pieces]
    assert (
        path.read(LEASE, [Piece(chunk(i), whole(CHUNK_BYTES), each) for i, each in enumerate(out)], soon()) == expected
    )
    assert [each == piece.buffer for each, piece in zip(out, pieces, strict=True)] == expected
    assert path.alive
    assert path.checksum_failures == 0
    path.close()


def test_the_pool_ends_where_it_ends_whatever_the_books_allow(world: World) -> None:
    path = open_path(world.attachment())
    beyond = [
        Piece(Location(0, POOL_BYTES - 10, 1), whole(11), bytearray(11)),
        Piece(Location(0, POOL_BYTES + 1, 1), whole(1), bytearray(1)),
        Piece(Location(1, 0, 1), whole(1), bytearray(1)),
        Piece(Location(0, 0, 1), Span(1 << 40, 1, 1, 1), bytearray(1)),
    ]
    assert path.read(LEASE, beyond, soon()) == [False] * 4
    assert path.write(LEASE, beyond, soon()) == [False] * 4
    assert path.read(LEASE, [Piece(Location(0, POOL_BYTES - 10, 1), whole(10), bytearray(10))], soon()) == [True]
    path.close()


def test_a_wrong_buffer_is_the_callers_mistake(world: World) -> None:
    path = open_path(world.attachment())
    with pytest.raises(ValueError, match="10 bytes for a span of 11"):
        path.write(LEASE, [Piece(chunk(0), whole(11), bytes(10))], soon())
    with pytest.raises(BufferError):
        path.read(LEASE, [Piece(chunk(0), whole(10), bytes(10))], soon())
    assert path.read(LEASE, [], soon()) == []
    path.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_ipv4_and_ipv6_are_served_alike(host: str) -> None:
    world = World(host)
    path = open_path(world.attachment())
    data = os.urandom(CHUNK_BYTES)
    assert path.write(LEASE, [Piece(chunk(0), whole(CHUNK_BYTES), data)], soon()) == [True]
    assert world.pool[:CHUNK_BYTES] == data
    path.close()
    world.plane.close()


# -- what a network does to bytes


def test_a_byte_flipped_on_the_way_down_is_a_miss_and_counted(world: World) -> None:
    with Proxy((world.plane.host, world.plane.port)) as proxy:
        path = open_path(world.attachment(1, proxy.port))
        world.pool[: 3 * CHUNK_BYTES] = os.urandom(3 * CHUNK_BYTES)
        pieces = [Piece(chunk(i), whole(CHUNK_BYTES), bytearray(CHUNK_BYTES)) for i in range(3)]
        proxy.flip("down")
        outcome = path.read(LEASE, pieces, soon())
        assert outcome.count(False) == 1
        assert path.checksum_failures == 1
        assert path.alive, "the connection is still in step"
        assert path.read(LEASE, pieces, soon()) == [True] * 3
        assert [bytes(piece.buffer) for piece in pieces] == [
            bytes(world.pool[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]) for i in range(3)
        ]
        path.close()


def test_a_byte_flipped_on_the_way_up_fails_the_chunk_in_the_books(world: World) -> None:
    with Proxy((world.plane.host, world.plane.port)) as proxy:
        path = open_path(world.attachment(1, proxy.port))
        proxy.flip("up")
        outcome = path.write(
            LEASE, [Piece(chunk(i), whole(CHUNK_BYTES), os.urandom(CHUNK_BYTES)) for i in range(3)], soon()
        )
        assert outcome.count(False) == 1
        assert world.books.ended[-1][1] == {outcome.index(False)}
        assert path.checksum_failures == 1
        path.close()


def test_a_path_over_a_connection_that_was_cut_is_dead_and_its_pieces_have_failed(world: World) -> None:
    with Proxy((world.plane.host, world.plane.port)) as proxy:
        path = open_path(world.attachment(2, proxy.port))
        proxy.stall()
        pieces = [Piece(chunk(i), whole(CHUNK_BYTES), bytearray(CHUNK_BYTES)) for i in range(40)]
        outcomes: list[list[bool]] = []
        reader = threading.Thread(target=lambda: outcomes.append(path.read(LEASE, pieces, soon())))
        reader.start()
        proxy.cut()
        proxy.resume()
        reader.join(10)
        assert outcomes == [[False] * 40]
        assert not path.alive
        assert path.read(LEASE, pieces, soon()) == [False] * 40
        path.close()
        again = open_path(world.attachment(2, proxy.port))
        assert all(again.read(LEASE, pieces, soon()))
        again.close()


@pytest.mark.parametrize("op", ["read", "write"])
def test_the_deadline_ends_a_transfer_that_stands_still(world: World, op: str) -> None:
    with Proxy((world.plane.host, world.plane.port)) as proxy:
        path = open_path(world.attachment(3, proxy.port))
        proxy.stall()
        pieces = [Piece(chunk(i), whole(CHUNK_BYTES), bytearray(CHUNK_BYTES)) for i in range(40)]
        begun = time.monotonic()
        outcome = getattr(path, op)(LEASE, pieces, begun + 0.3)
        assert time.monotonic() - begun < 10 * 0.3
        assert outcome == [False] * 40
        proxy.resume()
        wait_until(world.settled, what="the daemon's side to end")
        assert path.alive, "slow is not dead"
        assert all(getattr(path, op)(LEASE, pieces, soon()))
        path.close()


def test_an_idle_path_notices_that_the_daemon_is_gone(world: World) -> None:
    path = open_path(world.attachment())
    assert path.alive
    world.plane.close_session(SESSION)
    wait_until(lambda: not path.alive, what="the path to be dead")
    path.close()


# -- what a client may do to the daemon


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


def test_a_path_to_nobody_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    with pytest.raises(Unavailable):
        open_path(Attachment("tcp", "127.0.0.1", port, TOKEN, 1, 1, 1))


def test_connections_are_bounded() -> None:
    world = World(max_connections=2)
    held = [world.raw(), world.raw()]
    with pytest.raises(LimitReached):
        open_path(world.attachment())
    held.pop().close()
    wait_until(lambda: world.plane.connections < 2, what="the connection to be forgotten")
    open_path(world.attachment()).close()
    held.pop().close()
    world.plane.close()


def test_one_session_cannot_take_all_connections(world: World) -> None:
    held = [world.raw() for _ in range(MAX_CONNECTIONS_PER_SESSION)]
    with pytest.raises(LimitReached):
        open_path(world.attachment())
    for connection in held:
        connection.close()


def test_a_path_does_with_fewer_connections_what_it_gets() -> None:
    world = World(max_connections=1)
    path = open_path(world.attachment(connections=4))
    pieces = [Piece(chunk(i), whole(CHUNK_BYTES), bytearray(CHUNK_BYTES)) for i in range(40)]
    assert path.read(LEASE, pieces, soon()) == [True] * 40
    path.close()
    world.plane.close()


def test_a_writer_that_vanishes_in_mid_payload_has_failed_what_was_missing(world: World) -> None:
    items = [Item(*chunk(i), whole(CHUNK_BYTES)) for i in range(3)]
    payload = bytes(CHUNK_BYTES)
    with world.raw() as connection:
        connection.sendall(pack_request(Op.WRITE, LEASE, items, FLAG_NO_CHECKSUM) + payload + payload[:1000])
        wait_until(lambda: len(world.books.open) == 1, what="the request to be under way")
    wait_until(lambda: bool(world.books.ended), what="the books to hear of it")
    assert world.books.ended == [(0, {1, 2})]
    wait_until(world.settled, what="nothing to be in flight")


def test_a_writer_that_stands_still_is_closed_after_the_timeout() -> None:
    world = World(io_timeout_s=0.2)
    with world.raw() as connection:
        connection.sendall(pack_request(Op.WRITE, LEASE, [Item(*chunk(0), whole(8))]) + b"1234")
        assert is_closed(connection)
    assert world.books.ended == [(0, {0})]
    wait_until(world.settled, what="nothing to be in flight")
    world.plane.close()


def test_an_idle_connection_is_left_in_peace() -> None:
    world = World(io_timeout_s=0.05)
    path = open_path(world.attachment())
    other = World(io_timeout_s=0.05)
    with other.raw() as connection:
        connection.sendall(pack_request(Op.WRITE, LEASE, [Item(*chunk(0), whole(8))]))
        assert is_closed(connection)  # so much time has passed that an impatient plane would have closed the path
    assert path.alive
    assert path.read(LEASE, [Piece(chunk(0), whole(8), bytearray(8))], soon()) == [True]
    path.close()
    world.plane.close()
    other.plane.close()


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


def test_many_threads_share_a_path(world: World) -> None:
    path = open_path(world.attachment(connections=3))
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(10):
            data = os.urandom(CHUNK_BYTES)
            out = bytearray(CHUNK_BYTES)
            written = path.write(LEASE, [Piece(chunk(number), whole(CHUNK_BYTES), data)], soon())
            read = path.read(LEASE, [Piece(chunk(number), whole(CHUNK_BYTES), out)], soon())
            if not (written == read == [True] and out == data):
                wrong.append(turn)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert world.plane.connections <= 3
    path.close()


def test_the_item_table_is_what_the_frames_say() -> None:
    assert (HELLO.size, HELLO_REPLY.size, REQUEST.size, ITEM.size, REPLY.size) == (24, 8, 16, 56, 8)
