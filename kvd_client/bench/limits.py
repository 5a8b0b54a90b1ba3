"""What the machine does without kvd: the limits that figures are held against."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from kvd_client.bench.figures import GIB, timed

#: What one call of a bare socket moves at most.
CALL_BYTES = 8 << 20
CONNECT_TIMEOUT_S = 30.0

#: What this process tells the other one, and what it answers.
_SEND, _RECEIVE, _DONE = b"s", b"r", b"k"


class Memcpy:
    """Copies between private memory and a shared mapping of the kind that a pool is, chunk by chunk, with ``threads``
    threads that have a part each."""

    def __init__(self, chunk_bytes: int, chunks: int, threads: int = 1) -> None:
        self._chunk_bytes, self._chunks, self._threads = chunk_bytes, chunks, threads
        size = chunk_bytes * chunks
        descriptor = os.memfd_create("kvd-bench")
        os.ftruncate(descriptor, size)
        self._shared = mmap.mmap(descriptor, size)
        os.close(descriptor)
        self._private = mmap.mmap(-1, size)
        for offset in range(0, size, mmap.PAGESIZE):  # both are there before anything is measured
            self._shared[offset] = self._private[offset] = 1
        self._slots = ctypes.addressof(ctypes.c_char.from_buffer(self._shared))
        self._own = ctypes.addressof(ctypes.c_char.from_buffer(self._private))

    def into(self) -> float:
        """GiB/s of copies into the shared mapping."""
        return self._run(self._slots, self._own)

    def out(self) -> float:
        """GiB/s of copies out of it."""
        return self._run(self._own, self._slots)

    def _run(self, to: int, source: int) -> float:
        size = self._chunk_bytes

        def copy(number: int) -> None:
            for chunk in range(number, self._chunks, self._threads):
                ctypes.memmove(to + chunk * size, source + chunk * size, size)

        return size * self._chunks / timed(lambda: together(copy, self._threads)) / GIB


class BareSockets:
    """Bytes between a region of this process and one of another over TCP loopback, ``connections`` at a time, each with
    a part of both regions, and nothing else.

    ``pid``: the other process. Raises OSError, TimeoutError.
    """

    def __init__(self, size_bytes: int, connections: int) -> None:
        self._share_bytes = size_bytes // connections
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._peer = context.Process(target=_peer, args=(theirs, connections, self._share_bytes), daemon=True)
        self._peer.start()
        theirs.close()
        self._control = ours
        self._sockets: list[socket.socket] = []
        try:
            if not ours.poll(CONNECT_TIMEOUT_S):
                raise TimeoutError("the other end of the bare sockets did not start")
            port = ours.recv()
            for _ in range(connections):
                self._sockets.append(socket.create_connection(("127.0.0.1", port), CONNECT_TIMEOUT_S))
        except BaseException:
            self.close()
            raise
        for one in self._sockets:
            one.settimeout(None)  # so that MSG_WAITALL is the kernel's own loop
        self.pid = self._peer.pid or 0
        self._region = _region(size_bytes)

    def send(self) -> float:
        """GiB/s from here to there."""
        return self._run(_SEND)

    def receive(self) -> float:
        """GiB/s from there to here."""
        return self._run(_RECEIVE)

    def _run(self, way: bytes) -> float:
        def move(number: int) -> None:
            one, part = self._sockets[number], _part(self._region, number, self._share_bytes)
            one.sendall(way)
            if way == _SEND:
                _send(one, part)
                if one.recv(1) != _DONE:
                    raise ConnectionError("the other end of the bare sockets is gone")
            elif not _receive(one, part):
                raise ConnectionError("the other end of the bare sockets is gone")

        total = self._share_bytes * len(self._sockets)
        return total / timed(lambda: together(move, len(self._sockets))) / GIB

    def close(self) -> None:
        """Ends the other process."""
        for one in self._sockets:
            one.close()
        self._control.close()
        self._peer.join(CONNECT_TIMEOUT_S)
        if self._peer.is_alive():
            self._peer.kill()
            self._peer.join()


def together(work: Callable[[int], None], threads: int) -> None:
    """``work(0)`` ... ``work(threads - 1)`` at the same time. Raises what one of them has raised."""
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    others = [threading.Thread(target=run, args=(number,)) for number in range(1, threads)]
    for thread in others:
        thread.start()
    run(0)
    for thread in others:
        thread.join()
    if failures:
        raise failures[0]


def _peer(control: Connection, connections: int, share_bytes: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(CONNECT_TIMEOUT_S)
    region = _region(share_bytes * connections)
    control.send(listener.getsockname()[1])

    def serve(number: int, one: socket.socket) -> None:
        part = _part(region, number, share_bytes)
        with one:
            while way := one.recv(1):
                if way == _RECEIVE:
                    _send(one, part)
                elif _receive(one, part):
                    one.sendall(_DONE)

    accepted = []
    for _ in range(connections):
        one = listener.accept()[0]
        one.settimeout(None)
        accepted.append(one)
    threads = [threading.Thread(target=serve, args=numbered) for numbered in enumerate(accepted)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _region(size_bytes: int) -> memoryview:
    """Memory of its own, every page of it there."""
    region = mmap.mmap(-1, size_bytes)
    for offset in range(0, size_bytes, mmap.PAGESIZE):
        region[offset] = 1
    return memoryview(region)


def _part(region: memoryview, number: int, share_bytes: int) -> memoryview:
    return region[number * share_bytes : (number + 1) * share_bytes]


def _send(to: socket.socket, part: memoryview) -> None:
    for offset in range(0, len(part), CALL_BYTES):
        to.sendall(part[offset : offset + CALL_BYTES])


def _receive(source: socket.socket, part: memoryview) -> bool:
    """False: the other side has closed."""
    for offset in range(0, len(part), CALL_BYTES):
        wanted = part[offset : offset + CALL_BYTES]
        while len(wanted):
            got = source.recv_into(wanted, len(wanted), socket.MSG_WAITALL)
            if not got:
                return False
            wanted = wanted[got:]
    return True
