"""What the machine does without kvd: the limits that figures are held against."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import socket
import threading
from multiprocessing.connection import Connection

from kvd_client.bench.figures import GIB, timed

#: Pieces in which the bare sockets move bytes: they stay in the cache.
PIECE_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 30.0


class Memcpy:
    """Copies between private memory and a shared mapping of the kind that a pool is, one thread."""

    def __init__(self, chunk_bytes: int, chunks: int) -> None:
        self._chunk_bytes, self._chunks = chunk_bytes, chunks
        size = chunk_bytes * chunks
        descriptor = os.memfd_create("kvd-bench")
        os.ftruncate(descriptor, size)
        self._shared = mmap.mmap(descriptor, size)
        os.close(descriptor)
        self._private = mmap.mmap(-1, size)
        for offset in range(0, size, mmap.PAGESIZE):  # both are there before anything is measured
            self._shared[offset] = self._private[offset] = 1
        self._to = ctypes.addressof(ctypes.c_char.from_buffer(self._shared))
        self._from = ctypes.addressof(ctypes.c_char.from_buffer(self._private))

    def __call__(self) -> float:
        """GiB/s."""
        size = self._chunk_bytes

        def copy() -> None:
            for offset in range(0, size * self._chunks, size):
                ctypes.memmove(self._to + offset, self._from + offset, size)

        return size * self._chunks / timed(copy) / GIB


class BareSockets:
    """Bytes from this process to another over TCP loopback, ``connections`` at a time, and nothing else."""

    def __init__(self, size_bytes: int, connections: int) -> None:
        self._share_bytes = size_bytes // connections // PIECE_BYTES * PIECE_BYTES
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._peer = context.Process(target=_sink, args=(theirs, connections, self._share_bytes), daemon=True)
        self._peer.start()
        theirs.close()
        if not ours.poll(CONNECT_TIMEOUT_S):
            raise TimeoutError("the receiver of the bare sockets did not start")
        port = ours.recv()
        self._control = ours
        self._sockets = [socket.create_connection(("127.0.0.1", port), CONNECT_TIMEOUT_S) for _ in range(connections)]
        self._data = memoryview(bytearray(os.urandom(PIECE_BYTES)))

    def __call__(self) -> float:
        """GiB/s."""
        total = self._share_bytes * len(self._sockets)

        def move() -> None:
            threads = [threading.Thread(target=self._send, args=(one,)) for one in self._sockets]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        return total / timed(move) / GIB

    def _send(self, to: socket.socket) -> None:
        for _ in range(self._share_bytes // PIECE_BYTES):
            to.sendall(self._data)
        if to.recv(1) != b"k":
            raise ConnectionError("the receiver of the bare sockets is gone")

    def close(self) -> None:
        """Ends the receiver."""
        for one in self._sockets:
            one.close()
        self._control.close()
        self._peer.join(CONNECT_TIMEOUT_S)
        if self._peer.is_alive():
            self._peer.kill()
            self._peer.join()


def _sink(control: Connection, connections: int, share_bytes: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(CONNECT_TIMEOUT_S)
    control.send(listener.getsockname()[1])

    def receive(one: socket.socket) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        with one:
            while True:
                for _ in range(share_bytes // PIECE_BYTES):
                    if one.recv_into(buffer, PIECE_BYTES, socket.MSG_WAITALL) < PIECE_BYTES:
                        return
                one.sendall(b"k")

    threads = [threading.Thread(target=receive, args=(listener.accept()[0],)) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
