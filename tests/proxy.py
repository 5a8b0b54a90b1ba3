"""A TCP proxy that spoils what passes through it: for tests of what a network can do to bytes.

    with Proxy(("127.0.0.1", port)) as proxy:
        proxy.flip("down")      # one byte of the next large block towards the client
        proxy.stall("down")     # no answer passes until resume()
        proxy.cut()             # every connection breaks

A client that is told a port of "the host it reached" finds the proxy when it listens on another loopback address with
the same port number: ``Proxy(("127.0.0.1", port), listen=("127.0.0.2", port))``.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Literal

Direction = Literal["up", "down"]  # towards the server, towards the client

BLOCK_BYTES = 64 * 1024
#: Only blocks of at least this size are spoiled: they are payload, not headers.
FLIP_BYTES = 8 * 1024
MAX_CONNECTIONS = 64


class _Link:
    """A connection through the proxy. ``spared``: a stall lets it pass."""

    def __init__(self) -> None:
        self.spared = False
        self.ends = threading.Semaphore(0)


class Proxy:
    """Listens on ``port`` until ``close``; forwards every connection to ``target``. ``spares``: a stall lets those pass
    that began with these bytes before it."""

    def __init__(
        self, target: tuple[str, int], listen: tuple[str, int] = ("127.0.0.1", 0), *, spares: bytes = b""
    ) -> None:
        self._target = target
        self._spares = spares
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._flips: list[Direction] = []
        self._open = {"up": threading.Event(), "down": threading.Event()}
        self._closing = False
        self.resume()
        family = socket.AF_INET6 if ":" in listen[0] else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(listen)
        self._listener.listen(MAX_CONNECTIONS)
        self.host, self.port = self._listener.getsockname()[:2]
        self._start(self._accept)

    def flip(self, direction: Direction) -> None:
        """Flips one bit in the middle of the next large block in this direction."""
        with self._lock:
            self._flips.append(direction)

    @property
    def flips_left(self) -> int:
        """Flips asked for that have not happened yet."""
        with self._lock:
            return len(self._flips)

    def stall(self, *directions: Direction) -> None:
        """Lets nothing pass in these directions, in both when none is named; connections stay open."""
        for direction in directions or ("up", "down"):
            self._open[direction].clear()

    def resume(self) -> None:
        """Ends a ``stall``."""
        for each in self._open.values():
            each.set()

    def cut(self) -> None:
        """Breaks all connections that exist; new ones are taken."""
        with self._lock:
            for each in self._sockets:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends everything."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.resume()
        self.cut()
        for thread in list(self._threads):
            thread.join(5)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if len(self._sockets) >= 2 * MAX_CONNECTIONS:
                client.close()
                continue
            try:
                server = socket.create_connection(self._target, 5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            link = _Link()
            with self._lock:
                self._sockets |= {client, server}
            self._start(self._forward, client, server, "up", link)
            self._start(self._forward, server, client, "down", link)

    def _forward(self, source: socket.socket, sink: socket.socket, direction: Direction, link: _Link) -> None:
        block, first = bytearray(BLOCK_BYTES), True
        with contextlib.suppress(OSError):
            while True:
                self._wait(direction, link)
                count = source.recv_into(block)
                if first and direction == "up" and self._spares:
                    link.spared = block.startswith(self._spares)
                first = False
                self._wait(direction, link)
                if not count:
                    break
                self._spoil(block, count, direction)
                sink.sendall(memoryview(block)[:count])
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            source.shutdown(socket.SHUT_RD)
        link.ends.release()
        # The second of the two directions to end closes both sockets.
        if direction == "down":
            link.ends.acquire()
            link.ends.acquire()
            with self._lock:
                self._sockets -= {source, sink}
                source.close()
                sink.close()

    def _wait(self, direction: Direction, link: _Link) -> None:
        if not link.spared:
            self._open[direction].wait()

    def _spoil(self, block: bytearray, count: int, direction: Direction) -> None:
        with self._lock:
            if count >= FLIP_BYTES and direction in self._flips:
                self._flips.remove(direction)
                block[count // 2] ^= 0x10
