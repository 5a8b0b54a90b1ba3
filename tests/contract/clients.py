"""What the tests of the client share: the ways to a daemon, and chunks to send along them."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence

from kvd_client import ROOT, Client, Identity, NamespaceHandle
from tests.daemon import Daemon
from tests.wait import wait_until

#: Every way to the same slots: shared memory, TCP all the way, and TCP for the bytes only.
WAYS = ["shm", "tcp", "tcp-data"]

CHUNK_BYTES = 256 << 10

_numbers = itertools.count(1)


def client_of(daemon: Daemon, way: str, *, wait: bool = True, timeout_s: float = 10.0) -> Client:
    """A client of ``daemon`` over one of WAYS."""
    endpoint = daemon.tcp_endpoint if way == "tcp" else daemon.unix_endpoint
    client = Client(endpoint, transport="tcp" if way == "tcp-data" else "auto", name="test", timeout_s=timeout_s)
    if wait:
        client.connect(20)
    return client


def namespace_of(client: Client, chunk_bytes: int = CHUNK_BYTES) -> NamespaceHandle:
    """A namespace that no other test uses."""
    return client.namespace(Identity(model=f"model {next(_numbers)}", weights_revision=str(os.getpid())), chunk_bytes)


def prefix(length: int) -> list[bytes]:
    """Keys of a prefix that nobody has had before."""
    return [os.urandom(32) for _ in range(length)]


def chained(keys: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Each key with its parent."""
    return list(zip(keys, [ROOT, *keys[:-1]], strict=True))


def payloads(count: int, chunk_bytes: int = CHUNK_BYTES) -> list[bytes]:
    """Bytes of ``count`` chunks."""
    return [os.urandom(chunk_bytes) for _ in range(count)]


def buffers(count: int, chunk_bytes: int = CHUNK_BYTES) -> list[bytearray]:
    """Memory for ``count`` chunks."""
    return [bytearray(chunk_bytes) for _ in range(count)]


def soon() -> float:
    """A deadline that a daemon which is well keeps."""
    return time.monotonic() + 20


def wait_for_no_writes(daemon: Daemon) -> None:
    """Waits until no slot is being written or in quarantine."""

    def quiet() -> bool:
        pool = daemon.stats().pool
        return pool.writing_bytes == 0 and pool.quarantined_bytes == 0

    wait_until(quiet, 20, "every write to be over")
