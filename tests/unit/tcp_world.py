"""A TCP data plane over a pool that is a bytearray and books that are a dict, for its tests."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from kvd.transport.tcp import DataPlane
from kvd.wire.chunks import Location
from kvd.wire.errors import SessionUnknown
from kvd.wire.frames import HELLO, HELLO_REPLY, MAGIC, VERSION, HelloStatus, Item, ItemStatus, Op
from kvd_client.path import Attachment
from tests.wait import wait_until

TOKEN = b"0123456789abcdef"
SESSION = 7
POOL_BYTES = 32 << 20
CHUNK_BYTES = 256 << 10
LEASE = 3


class Ticket(NamedTuple):
    """Of one transfer."""

    id: int
    checksums: tuple[int | None, ...]


class Books:
    """An authority that grants everything but what is in ``gone``, and writes down what it hears."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.gone: set[int] = set()  # offsets
        self.known: dict[int, int] = {}  # checksums by offset
        self.open: set[int] = set()
        self.ended: list[tuple[int, set[int]]] = []
        self.told: dict[int, int] = {}  # checksums by item, of the transfer that ended last
        self.closed = False

    def admit(self, token: bytes) -> int | None:
        return SESSION if token == TOKEN and not self.closed else None

    def begin_io(self, session: int, op: Op, lease_id: int, items: Sequence[Item]) -> tuple[Ticket, list[ItemStatus]]:
        if self.closed:
            raise SessionUnknown("closed")
        assert session == SESSION
        with self.lock:
            ticket = len(self.ended) + len(self.open)
            self.open.add(ticket)
        known = tuple(self.known.get(item.offset) for item in items)
        return Ticket(ticket, known), [ItemStatus.GONE if item.offset in self.gone else ItemStatus.OK for item in items]

    def end_io(self, ticket: Ticket, failed: Collection[int], checksums: Mapping[int, int]) -> None:
        with self.lock:
            self.told = dict(checksums)
            self.open.remove(ticket.id)
            self.ended.append((ticket.id, set(failed)))


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


@contextlib.contextmanager
def serving(host: str = "127.0.0.1", **options: Any) -> Iterator[World]:
    """A plane that is closed whatever happens, and must leave nothing under way."""
    world = World(host, **options)
    try:
        yield world
    finally:
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
