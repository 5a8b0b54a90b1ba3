"""Lookups: how long they take, alone and among others, as the daemon fills up; and what a held key costs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import grpc

from kvd.wire.chunks import ROOT
from kvd.wire.endpoints import parse_endpoint
from kvd.wire.identity import Identity
from kvd.wire.pb import kvd_pb2 as pb
from kvd.wire.pb import kvd_pb2_grpc
from kvd.wire.version import PROTOCOL_MAX, PROTOCOL_MIN
from kvd_client.bench.daemon import BenchDaemon
from kvd_client.bench.figures import MIB, Figure, beside, interleave, percentile, single, timed
from kvd_client.bench.parts import CALL_TIMEOUT_S, CONNECT_TIMEOUT_S, chain
from kvd_client.calls import TOKEN_METADATA
from kvd_client.client import Client
from kvd_client.messages import NamespaceHandle

#: Calls of each kind in one round.
CALLS = 100
KEYS = (1, 128, 2000)
#: Keys of a lookup that finds nothing, and of one while the daemon fills up.
USUAL_KEYS = 128
CHUNK_BYTES = 4096
#: Rounds that are not counted.
WARMUP = 1
#: What is held when lookups are measured, rising, up to what was asked for.
HELD = tuple(10**power for power in range(3, 9))
#: Chunks that are reserved in one call while the daemon is filled.
FILL_CHUNKS = 1000

#: Latencies in microseconds, of one round.
_Round = Callable[[], list[float]]


def bench_lookup(transport: Literal["unix", "tcp"], rounds: int) -> list[Figure]:
    """Lookup with lease, and the start of its release, as the client asks it and over gRPC, against an empty gRPC call
    of the same transport: p50 and p99 of every call in every round."""
    with (
        BenchDaemon(64 * MIB) as daemon,
        Client(_endpoint(daemon, transport), timeout_s=CALL_TIMEOUT_S) as client,
        EmptyCalls(_endpoint(daemon, transport)) as empty,
        GrpcLookups(daemon.tcp_endpoint) as over_grpc,
    ):
        client.connect(CONNECT_TIMEOUT_S)
        namespace = client.namespace(Identity("bench", "lookup"), CHUNK_BYTES)
        keys = chain(max(KEYS))
        fill(client, namespace, keys)
        parts = {f"lookup of {count}, {transport}": finds(client, namespace, keys[:count]) for count in KEYS}
        parts[f"lookup of {USUAL_KEYS}, none found, {transport}"] = finds(client, namespace, chain(USUAL_KEYS), found=0)
        if transport == "tcp":  # a session on the Unix socket comes with a lifeline, and never asks over gRPC
            rounds_of = over_grpc.rounds(namespace)
            parts |= {f"lookup of {count}, gRPC over tcp": rounds_of(keys[:count]) for count in KEYS}
        return latencies(parts, f"empty gRPC call, {transport}", empty, rounds)


def bench_held(most: int, rounds: int) -> list[Figure]:
    """Lookups of 128 keys over the Unix socket while more and more chunks are held, up to ``most``; and the daemon's
    memory per chunk, beside the pool. The chunks are committed without any byte written: only the books count here."""
    counts = [count for count in HELD if count <= most] or [most]
    figures: list[Figure] = []
    with (
        BenchDaemon(counts[-1] * CHUNK_BYTES * 5 // 4 + 64 * MIB, populate="lazy") as daemon,
        Client(daemon.unix_endpoint, timeout_s=CALL_TIMEOUT_S) as client,
        EmptyCalls(daemon.unix_endpoint) as empty,
    ):
        client.connect(CONNECT_TIMEOUT_S)
        namespace = client.namespace(Identity("bench", "held"), CHUNK_BYTES)
        held, before = 0, daemon.rss_bytes()
        for count in counts:
            while held < count:
                keys = chain(min(FILL_CHUNKS, count - held))
                fill(client, namespace, keys)
                held += len(keys)
            name = f"lookup of {USUAL_KEYS}, {count} held"
            parts = {name: finds(client, namespace, keys[:USUAL_KEYS])}
            figures += latencies(parts, "empty gRPC call, unix", empty, rounds)
            per_chunk = (daemon.rss_bytes() - before) / held
            figures.append(single(f"memory per chunk, {count} held", "B", [per_chunk]))
    return figures


class GrpcLookups:
    """Lookup and Release as messages over gRPC, as clients ask that are not kvd's own, in a session of their own."""

    def __init__(self, endpoint: str) -> None:
        self._channel = grpc.insecure_channel(parse_endpoint(endpoint).grpc_target)
        self._stub: Any = kvd_pb2_grpc.KvdStub(self._channel)  # type: ignore[no-untyped-call]
        self._over = threading.Event()
        self._lease_ids = itertools.count(1)
        self._session = self._stub.Session(self._notes())  # ends with the last reference to it
        self._metadata = ((TOKEN_METADATA, next(self._session).welcome.session_token),)

    def rounds(self, namespace: NamespaceHandle) -> Callable[[list[bytes]], _Round]:
        """What makes a round of lookups of keys that are all there."""
        namespace_id = self._call(self._stub.OpenNamespace, namespace.request()).namespace_id

        def round_of(keys: list[bytes]) -> _Round:
            def find() -> None:
                lease_id = next(self._lease_ids)
                request = pb.LookupRequest(namespace_id=namespace_id, lease_id=lease_id, keys=keys)
                answer = self._call(self._stub.Lookup, request)
                found = list(zip(answer.offsets, answer.generations, strict=True))
                if len(found) != len(keys):
                    raise RuntimeError(f"{len(found)} of {len(keys)} chunks found")

            def run() -> list[float]:
                taken, first = [], next(self._lease_ids)
                for _ in range(CALLS):
                    taken.append(timed(find) * 1e6)
                self._call(self._stub.Release, pb.ReleaseRequest(lease_ids=range(first, next(self._lease_ids))))
                return taken

            return run

        return round_of

    def _notes(self) -> Iterator[pb.ClientNote]:
        yield pb.ClientNote(hello=pb.Hello(protocol_min=PROTOCOL_MIN, protocol_max=PROTOCOL_MAX, client_name="bench"))
        while not self._over.wait(1.0):
            yield pb.ClientNote(heartbeat=pb.Heartbeat())

    def _call(self, method: Any, request: object) -> Any:
        return method(request, timeout=CALL_TIMEOUT_S, metadata=self._metadata)

    def __enter__(self) -> GrpcLookups:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._channel.close()


class EmptyCalls:
    """An empty gRPC call, the health check, on a channel of its own to ``endpoint``; each call of this is a round."""

    def __init__(self, endpoint: str) -> None:
        self._channel = grpc.insecure_channel(parse_endpoint(endpoint).grpc_target)
        call = self._channel.unary_unary("/grpc.health.v1.Health/Check", bytes, bytes)
        self._call: Callable[[], None] = lambda: call(b"", timeout=CALL_TIMEOUT_S)

    def __call__(self) -> list[float]:
        """Microseconds of every call."""
        return [timed(self._call) * 1e6 for _ in range(CALLS)]

    def __enter__(self) -> EmptyCalls:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()


def fill(client: Client, namespace: NamespaceHandle, keys: list[bytes]) -> None:
    """Makes ``keys`` a stored prefix, whatever its bytes. Over TCP too: what was never written may be committed."""
    items = list(zip(keys, [ROOT, *keys], strict=False))
    for first in range(0, len(items), FILL_CHUNKS):
        part = items[first : first + FILL_CHUNKS]
        with client.reserve(namespace, part, timeout_s=CALL_TIMEOUT_S) as lease:
            lease.commit([key for key, _ in part], timeout_s=CALL_TIMEOUT_S)


def finds(client: Client, namespace: NamespaceHandle, keys: list[bytes], found: int | None = None) -> _Round:
    """A round of lookups of ``keys``, of which ``found`` (default: all) are there."""
    expected = len(keys) if found is None else found

    def find() -> None:
        with client.lookup(namespace, keys, timeout_s=CALL_TIMEOUT_S) as lease:
            if len(lease) != expected:
                raise RuntimeError(f"{len(lease)} of {len(keys)} chunks found")

    return lambda: [timed(find) * 1e6 for _ in range(CALLS)]


def latencies(parts: dict[str, _Round], empty_name: str, empty: _Round, rounds: int) -> list[Figure]:
    """p50 and p99 of what ``parts`` say, each beside that of the empty calls of the same rounds."""
    every: dict[str, list[list[float]]] = {name: [] for name in [*parts, empty_name]}

    def kept(name: str, part: _Round) -> Callable[[], float]:
        def run() -> float:
            every[name].append(part())
            return 0.0

        return run

    interleave({name: kept(name, part) for name, part in {**parts, empty_name: empty}.items()}, WARMUP + rounds, 0)
    p50 = {name: [percentile(one, 50) for one in taken[WARMUP:]] for name, taken in every.items()}
    p99 = {name: [percentile([*itertools.chain(*taken[WARMUP:])], 99)] for name, taken in every.items()}
    figures = []
    for name in parts:
        figures.append(beside(single(f"{name}, p50", "us", p50[name]), f"{empty_name}, p50", p50[empty_name]))
        figures.append(beside(single(f"{name}, p99", "us", p99[name]), f"{empty_name}, p99", p99[empty_name]))
    return figures


def _endpoint(daemon: BenchDaemon, transport: Literal["unix", "tcp"]) -> str:
    return daemon.unix_endpoint if transport == "unix" else daemon.tcp_endpoint
