"""The TCP data plane and its client path: what moves, and what a network does to it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import xxhash

from kvd.wire.chunks import Location
from kvd.wire.frames import HELLO, HELLO_REPLY, ITEM, REPLY, REQUEST
from kvd.wire.spans import Span, whole
from kvd.wire.stream import LOCAL_BUFFER_BYTES, PIECE_BYTES, Stream
from kvd_client.path import Piece, open_path
from kvd_client.tcp import BATCH_ITEMS, TcpPath
from tests.proxy import Proxy
from tests.unit.tcp_world import CHUNK_BYTES, LEASE, POOL_BYTES, SESSION, World, chunk, serving, soon
from tests.wait import wait_until


@pytest.fixture
def world() -> Iterator[World]:
    with serving() as world:
        yield world


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

    def moved(which: str) -> int:
        return sum(count for op, count in world.moved if op == which)

    # The last byte of a read is here before the daemon has noted it.
    wait_until(lambda: moved("write") == moved("read") == 40 * CHUNK_BYTES, what="every byte to be counted")
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
        Span(4096, PIECE_BYTES + 4096, PIECE_BYTES + 8192, 3),  # runs longer than one piece
        Span(0, PIECE_BYTES + 1, PIECE_BYTES + 1, 1),
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


def test_very_many_small_pieces_are_asked_for_in_requests_that_nobody_waits_to_send(world: World) -> None:
    size = 512
    at = [Location(0, number * size, number + 1) for number in range(5000)]
    data = os.urandom(len(at) * size)
    world.pool[: len(data)] = data
    out = [bytearray(size) for _ in at]
    path = open_path(world.attachment(connections=1))
    pieces = [Piece(location, whole(size), each) for location, each in zip(at, out, strict=True)]
    assert all(path.read(LEASE, pieces, soon()))
    assert b"".join(out) == data
    world.pool[: len(data)] = bytes(len(data))
    assert all(path.write(LEASE, pieces, soon()))
    assert world.pool[: len(data)] == data
    assert len(world.books.ended) >= 2 * len(at) / BATCH_ITEMS
    assert REQUEST.size + ITEM.size * BATCH_ITEMS <= 16 << 10, "more than the smallest socket buffer takes"
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
    with serving(host) as world:
        path = open_path(world.attachment())
        data = os.urandom(CHUNK_BYTES)
        assert path.write(LEASE, [Piece(chunk(0), whole(CHUNK_BYTES), data)], soon()) == [True]
        assert world.pool[:CHUNK_BYTES] == data
        path.close()


@pytest.mark.parametrize(("host", "bounded"), [("127.0.0.1", True), ("127.0.0.2", False)])
def test_little_is_under_way_to_a_peer_on_this_machine_and_as_much_as_it_takes_to_another(
    host: str, bounded: bool
) -> None:
    with socket.create_server((host, 0)) as listener:
        address = listener.getsockname()
        # The second host hears another address than its own, like one behind a network.
        with socket.create_connection(address, 10, source_address=("127.0.0.1", 0)) as connection:
            before = connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            Stream(connection)
            after = connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            assert after <= 2 * LOCAL_BUFFER_BYTES if bounded else after == before


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


def test_a_checksum_that_the_books_know_is_told_as_it_is(world: World) -> None:
    path = open_path(world.attachment(connections=1))
    world.pool[: 4 * CHUNK_BYTES] = os.urandom(4 * CHUNK_BYTES)
    right = {i: xxhash.xxh3_64_intdigest(world.pool[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]) for i in range(4)}
    world.books.known = {chunk(0).offset: right[0], chunk(2).offset: right[2] ^ 1, chunk(3).offset: right[3]}
    pieces = [Piece(chunk(i), whole(CHUNK_BYTES), bytearray(CHUNK_BYTES)) for i in range(4)]
    assert path.read(LEASE, pieces, soon()) == [True, True, False, True], "bytes that are not those of the checksum"
    assert path.checksum_failures == 1
    assert path.write(LEASE, pieces, soon()) == [True] * 4, "what is about to be overwritten has another one"
    path.close()


def test_the_books_hear_the_checksums_of_what_was_moved_and_of_nothing_else(world: World) -> None:
    data = [os.urandom(CHUNK_BYTES) for _ in range(4)]
    sums = {i: xxhash.xxh3_64_intdigest(each) for i, each in enumerate(data)}
    pieces = [Piece(chunk(i), whole(CHUNK_BYTES), bytearray(each)) for i, each in enumerate(data)]
    world.books.gone = {chunk(1).offset}
    path = TcpPath.open(world.attachment(connections=1), 10)
    path.write(LEASE, pieces, soon())
    assert world.books.told == {0: sums[0], 2: sums[2], 3: sums[3]}
    world.books.gone = {chunk(1).offset, chunk(2).offset}
    path.read(LEASE, pieces, soon())
    wait_until(world.settled, what="the read to end")
    assert world.books.told == {0: sums[0], 3: sums[3]}
    path.checked = False
    path.write(LEASE, pieces, soon())
    assert world.books.told == {}
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
        assert set(world.books.told) == {0, 1, 2} - {outcome.index(False)}, "what did not arrive has no checksum"
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


def test_a_path_does_with_fewer_connections_what_it_gets() -> None:
    with serving(max_connections=1) as world:
        path = open_path(world.attachment(connections=4))
        pieces = [Piece(chunk(i), whole(CHUNK_BYTES), bytearray(CHUNK_BYTES)) for i in range(40)]
        assert path.read(LEASE, pieces, soon()) == [True] * 40
        path.close()


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
