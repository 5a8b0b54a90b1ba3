"""Bytes on the same node and over TCP: the data path alone, and whole stores and loads."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from xxhash import xxh3_64_intdigest

from kvd.wire.chunks import ROOT, Location
from kvd.wire.identity import Identity
from kvd.wire.spans import whole
from kvd_client.bench.daemon import BenchDaemon
from kvd_client.bench.figures import GIB, Figure, figure, interleave, size_name, timed
from kvd_client.bench.limits import BareSockets, Memcpy, together
from kvd_client.bench.usage import Meter
from kvd_client.client import Client, StoreOutcome
from kvd_client.leases import ReadLease
from kvd_client.path import Piece
from kvd_client.tcp import TcpPath

CONNECT_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 60.0
#: Rounds that are run and not counted: they touch every page of the pool once.
WARMUP = 4
#: What is held, half-written and stored at the same time is less than so many times what one round moves.
POOL_ROUNDS = 6
#: Threads that copy at the same time, where more than one does.
THREADS = min(4, os.cpu_count() or 1)

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

    def hash(self) -> float:
        """GiB/s of the checksums of all chunks, one thread."""

        def work() -> None:
            for chunk in self.data:
                xxh3_64_intdigest(chunk)

        return self.size.total_bytes / timed(work) / GIB

    def check(self) -> None:
        """Every byte of one more round, beside the measurement."""
        self.store()
        self.into = [bytearray(self.size.chunk_bytes) for _ in range(self.size.chunks)]
        self.load()
        if self.into != self.data:
            raise RuntimeError("what was loaded is not what was stored")


class Slots:
    """The data path alone: copies into slots that are leased all the time for writing, and out of others that are
    leased for reading, by ``threads`` threads that have a part of them each. No call to the daemon is measured."""

    def __init__(self, mover: Mover, threads: int = 1) -> None:
        mover.store()
        self._mover, self._threads = mover, threads
        client, keys = mover.client, chain(mover.size.chunks)
        self._write = client.reserve(
            mover.namespace, list(zip(keys, [ROOT, *keys], strict=False)), timeout_s=CALL_TIMEOUT_S
        )
        self._written = [result.location for result in self._write.results if result.location is not None]
        self._read = self._leased(mover.keys)
        if len(self._written) < len(keys):
            raise RuntimeError("not every slot was granted")

    def write(self) -> float:
        """GiB/s into the slots."""
        path = self._mover.client.path(CALL_TIMEOUT_S)
        pieces = self._parts(self._written, self._mover.data)
        return self._moved(lambda i: path.write(self._write.lease_id, pieces[i], _deadline()))

    def read(self) -> float:
        """GiB/s out of the slots."""
        if not self._read.renew(timeout_s=CALL_TIMEOUT_S):
            raise RuntimeError("the lease has ended")
        path = self._mover.client.path(CALL_TIMEOUT_S)
        pieces = self._parts(self._read.locations, self._mover.into)
        return self._moved(lambda i: path.read(self._read.lease_id, pieces[i], _deadline()))

    def close(self) -> None:
        """Gives the slots back."""
        self._write.abort(timeout_s=CALL_TIMEOUT_S)
        self._read.release()

    def _leased(self, keys: list[bytes]) -> ReadLease:
        lease = self._mover.client.lookup(self._mover.namespace, keys, timeout_s=CALL_TIMEOUT_S)
        if len(lease) < len(keys):
            raise RuntimeError(f"{len(lease)} of {len(keys)} chunks found")
        return lease

    def _parts(self, locations: Sequence[Location], buffers: Sequence[bytearray]) -> list[list[Piece]]:
        span = whole(self._mover.size.chunk_bytes)
        pieces = [Piece(at, span, buffer) for at, buffer in zip(locations, buffers, strict=True)]
        return [pieces[number :: self._threads] for number in range(self._threads)]

    def _moved(self, copy: Callable[[int], list[bool]]) -> float:
        def part(number: int) -> None:
            if not all(copy(number)):
                raise RuntimeError("not every chunk was copied")

        return self._mover.size.total_bytes / timed(lambda: together(part, self._threads)) / GIB


def bench_local(size: Size) -> list[Figure]:
    """Same node: bytes over shared memory, against memcpy with as many threads on a mapping of the same kind."""
    label = f"local {size_name(size.chunk_bytes)}"
    with (
        BenchDaemon(POOL_ROUNDS * size.total_bytes) as daemon,
        Client(daemon.unix_endpoint, timeout_s=CALL_TIMEOUT_S) as client,
    ):
        client.connect(CONNECT_TIMEOUT_S)
        mover = Mover(client, size)
        meter = Meter([daemon.pid])
        parts: dict[str, Callable[[], float]] = {}
        limits: dict[str, str] = {}
        slots = []
        for threads in sorted({1, THREADS}):
            copy, one = Memcpy(size.chunk_bytes, size.chunks, threads), Slots(mover, threads)
            slots.append(one)
            into, out = f"memcpy in x{threads}", f"memcpy out x{threads}"
            write, read = f"{label} path write x{threads}", f"{label} path read x{threads}"
            parts |= {write: one.write, into: copy.into, read: one.read, out: copy.out}
            limits |= {write: into, read: out}
        for what, work in (("store", mover.store), ("load", mover.load)):
            name = f"{label} {what}"
            parts[name] = meter.metered(name, work, size.total_bytes)
            limits[name] = "memcpy in x1" if what == "store" else "memcpy out x1"
        samples = interleave(parts, size.rounds, WARMUP)
        for one in slots:
            one.close()
        mover.check()
    return [figure(name, "GiB/s", samples, limits[name]) for name in limits] + meter.figures()


def bench_tcp(size: Size, connections: int) -> list[Figure]:
    """TCP loopback, against bare sockets with as many connections between regions of the same size. With checksums, and
    the data path without them as well; and what one thread takes for the checksums of as many bytes."""
    label = f"tcp x{connections}"
    store, write, load, read = (f"{label} {what}" for what in ("store", "path write", "load", "path read"))
    bare_write, bare_read = f"{write}, unchecked", f"{read}, unchecked"
    send, receive = f"bare send x{connections}", f"bare receive x{connections}"
    with (
        BenchDaemon(POOL_ROUNDS * size.total_bytes) as daemon,
        Client(daemon.tcp_endpoint, timeout_s=CALL_TIMEOUT_S, data_connections=connections) as client,
        closing(BareSockets(size.total_bytes, connections)) as bare,
    ):
        client.connect(CONNECT_TIMEOUT_S)
        mover = Mover(client, size)
        path = client.path(CALL_TIMEOUT_S)
        assert isinstance(path, TcpPath)
        ours, theirs = Meter([daemon.pid]), Meter([bare.pid])
        with closing(Slots(mover)) as slots:
            parts: dict[str, Callable[[], float]] = {
                store: ours.metered(store, mover.store, size.total_bytes),
                write: slots.write,
                bare_write: _unchecked(path, slots.write),
                send: theirs.metered(send, bare.send, size.total_bytes),
                load: ours.metered(load, mover.load, size.total_bytes),
                read: slots.read,
                bare_read: _unchecked(path, slots.read),
                receive: theirs.metered(receive, bare.receive, size.total_bytes),
                f"{label} checksums": mover.hash,
            }
            samples = interleave(parts, size.rounds, WARMUP)
        mover.check()
    limits = {store: send, write: send, bare_write: send, load: receive, read: receive, bare_read: receive}
    bandwidths = [figure(name, "GiB/s", samples, limit) for name, limit in limits.items()]
    bandwidths.append(figure(f"{label} checksums", "GiB/s", samples))
    return bandwidths + ours.figures() + theirs.figures("other end")


def _unchecked(path: TcpPath, work: Callable[[], float]) -> Callable[[], float]:
    def measured() -> float:
        path.checked = False
        try:
            return work()
        finally:
            path.checked = True

    return measured


def _deadline() -> float:
    return time.monotonic() + CALL_TIMEOUT_S
