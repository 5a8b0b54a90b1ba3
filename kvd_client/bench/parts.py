"""The parts of kvd that are measured: same node, TCP, lookups, start."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from kvd.wire.chunks import ROOT
from kvd.wire.identity import Identity
from kvd_client.bench.daemon import BenchDaemon
from kvd_client.bench.figures import GIB, Figure, figure, interleave, timed
from kvd_client.bench.limits import BareSockets, Memcpy
from kvd_client.client import Client, StoreOutcome

CONNECT_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 60.0
#: Rounds that are run and not counted: they touch every page of the pool once.
WARMUP = 4
LOOKUP_CALLS = 50
LOOKUP_KEYS = (1, 128, 2000)
START_POOL_BYTES = 4 << 30

_names = itertools.count()


@dataclass(frozen=True)
class Size:
    """How much is moved in one round."""

    chunk_bytes: int
    chunks: int
    rounds: int

    @property
    def total_bytes(self) -> int:
        """Bytes of one round."""
        return self.chunk_bytes * self.chunks


def chain(count: int) -> list[bytes]:
    """``count`` keys that nobody has used."""
    seed = next(_names).to_bytes(8, "little") + os.urandom(8)
    return [hashlib.sha256(seed + i.to_bytes(4, "little")).digest() for i in range(count)]


@dataclass
class Mover:
    """Stores chunks and loads them back, through the client's public calls: Reserve, copy, Commit; Lookup, copy,
    Release."""

    client: Client
    size: Size
    data: list[bytearray] = field(init=False)
    into: list[bytearray] = field(init=False)
    keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.namespace = self.client.namespace(Identity("bench", str(self.size.chunk_bytes)), self.size.chunk_bytes)
        self.data = [bytearray(os.urandom(self.size.chunk_bytes)) for _ in range(self.size.chunks)]
        self.into = [bytearray(self.size.chunk_bytes) for _ in range(self.size.chunks)]

    def store(self) -> float:
        """GiB/s of storing new chunks."""
        self.keys = chain(self.size.chunks)
        items = list(zip(self.keys, [ROOT, *self.keys], strict=False))

        def work() -> None:
            outcomes = self.client.store(self.namespace, items, self.data, timeout_s=CALL_TIMEOUT_S)
            if set(outcomes) != {StoreOutcome.STORED}:
                raise RuntimeError(f"not everything was stored: {outcomes}")

        return self.size.total_bytes / timed(work) / GIB

    def load(self) -> float:
        """GiB/s of loading what was stored last."""

        def work() -> None:
            if self.client.load(self.namespace, self.keys, self.into, timeout_s=CALL_TIMEOUT_S) != len(self.keys):
                raise RuntimeError("not everything was loaded")

        return self.size.total_bytes / timed(work) / GIB

    def check(self) -> None:
        """Every byte of one more round, beside the measurement."""
        self.store()
        self.into = [bytearray(self.size.chunk_bytes) for _ in range(self.size.chunks)]
        self.load()
        if self.into != self.data:
            raise RuntimeError("what was loaded is not what was stored")


def bench_local(size: Size) -> list[Figure]:
    """Same node: bytes over shared memory, against one memcpy with one thread."""
    with BenchDaemon(3 * size.total_bytes) as daemon, Client(daemon.unix_endpoint, timeout_s=CALL_TIMEOUT_S) as client:
        client.connect(CONNECT_TIMEOUT_S)
        mover = Mover(client, size)
        parts: dict[str, Callable[[], float]] = {
            "local store": mover.store,
            "local load": mover.load,
            "memcpy": Memcpy(size.chunk_bytes, size.chunks),
        }
        samples = interleave(parts, size.rounds, WARMUP)
        mover.check()
    return [figure(name, "GiB/s", samples, "memcpy") for name in ("local store", "local load")]


def bench_tcp(size: Size, connections: int) -> list[Figure]:
    """TCP loopback with checksums, against bare sockets with as many connections."""
    store, load, bare = (f"tcp x{connections} {what}" for what in ("store", "load", "bare"))
    with (
        BenchDaemon(3 * size.total_bytes) as daemon,
        Client(daemon.tcp_endpoint, timeout_s=CALL_TIMEOUT_S, data_connections=connections) as client,
    ):
        client.connect(CONNECT_TIMEOUT_S)
        mover = Mover(client, size)
        sockets = BareSockets(size.total_bytes, connections)
        try:
            samples = interleave({store: mover.store, load: mover.load, bare: sockets}, size.rounds, WARMUP)
        finally:
            sockets.close()
        mover.check()
    return [figure(name, "GiB/s", samples, bare) for name in (store, load)]


def bench_lookup(transport: Literal["unix", "tcp"], rounds: int) -> list[Figure]:
    """Lookup with lease, and the start of its release, against an empty call on the same channel: medians of many."""
    empty = f"empty call, {transport}"
    with BenchDaemon(64 << 20) as daemon:
        endpoint = daemon.unix_endpoint if transport == "unix" else daemon.tcp_endpoint
        with Client(endpoint, timeout_s=CALL_TIMEOUT_S) as client:
            client.connect(CONNECT_TIMEOUT_S)
            namespace = client.namespace(Identity("bench", "lookup"), 4096)
            keys = chain(max(LOOKUP_KEYS))
            items = list(zip(keys, [ROOT, *keys], strict=False))
            client.store(namespace, items, [bytes(4096)] * len(keys), timeout_s=CALL_TIMEOUT_S)

            def calls(work: Callable[[], None]) -> Callable[[], float]:
                return lambda: sorted(timed(work) for _ in range(LOOKUP_CALLS))[LOOKUP_CALLS // 2] * 1e6

            def find(count: int) -> Callable[[], None]:
                def work() -> None:
                    with client.lookup(namespace, keys[:count], timeout_s=CALL_TIMEOUT_S) as lease:
                        if len(lease) != count:
                            raise RuntimeError(f"{len(lease)} of {count} chunks found")

                return work

            parts = {f"lookup of {count}, {transport}": calls(find(count)) for count in LOOKUP_KEYS}
            samples = interleave({**parts, empty: calls(lambda: _empty(client))}, rounds, 1)
    return [figure(name, "us", samples, empty) for name in parts]


def _empty(client: Client) -> None:
    client.renew([])


def bench_start(rounds: int) -> list[Figure]:
    """From the start of the process to SERVING with a pool of 4 GiB, not populated, and memory beside the pool."""
    rss_mib: list[float] = []

    def start() -> float:
        with BenchDaemon(START_POOL_BYTES, populate="lazy") as daemon:
            rss_mib.append(daemon.rss_bytes() / (1 << 20))
            return daemon.start_s

    samples = interleave({"start": start}, rounds, 1)
    return [figure("start", "s", samples), figure("memory beside the pool", "MiB", {"memory beside the pool": rss_mib})]
