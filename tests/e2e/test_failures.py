"""Whatever happens to the daemon: every request ends with the right tokens, no hook hangs, and later there are hits."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from kvd.wire import frames
from kvd.wire.errors import ProtocolMismatch, to_status
from kvd.wire.pb import kvd_pb2_grpc
from tests.daemon import Daemon
from tests.e2e.engine import Engine, prompt
from tests.proxy import Proxy
from tests.wait import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

Expected = Callable[..., list[list[int]]]

#: Far above the deadline of a lookup (0.1 s), far below any hang: a busy machine must not fail the tests.
SLOWEST_HOOK_S = 1.0

_seeds = itertools.count(1000)


def fresh_prompts(count: int = 4, tokens: int = 3 * 256 + 9) -> list[list[int]]:
    """Prompts that no test has used."""
    return [prompt(next(_seeds), tokens) for _ in range(count)]


def assert_right(engine: Engine, prompts: list[list[int]], expected: Expected) -> list[int]:
    """Generates, compares with an engine without connector, and returns how many tokens were cached."""
    answers = engine.generate(prompts)
    assert [answer.tokens for answer in answers] == expected(prompts)
    assert max(engine.slowest_hooks().values()) < SLOWEST_HOOK_S
    return [answer.cached for answer in answers]


def assert_used_again(engine: Engine, daemon: Daemon, expected: Expected) -> None:
    """The engine stores new prompts and loads them back."""
    wait_until(lambda: daemon.stats().sessions, 30, "the engine to connect again")
    prompts = fresh_prompts(2)

    def hits() -> bool:
        assert_right(engine, prompts, expected)
        engine.reset()
        return assert_right(engine, prompts, expected) == [768, 768]

    wait_until(hits, 60, "hits")
    assert daemon.audit() == []


def make_engine(model: Path, endpoint: str, **options: Any) -> Engine:
    """An engine that computes in float32, so that its tokens do not depend on what else is in a batch."""
    # The deadline that an engine has when it is given none.
    connector = {"lookup_timeout_s": 0.1, **options.pop("connector", {})}
    return Engine(model, endpoint=endpoint, dtype="float32", connector=connector, **options)


#: How a connection to the data plane begins that is for calls.
CALLS = frames.HELLO.pack(frames.MAGIC, frames.VERSION, frames.Purpose.CALLS, bytes(frames.TOKEN_BYTES)).rstrip(b"\0")


class Pair:
    """A daemon, perhaps behind a proxy that can hold up or spoil payload, and an engine that uses it."""

    def __init__(self, model: Path, transport: str, **options: Any) -> None:
        self.daemon = Daemon(quarantine=0.5)
        self.proxies: list[Proxy] = []
        endpoint = self.daemon.unix_endpoint
        if transport == "tcp":
            # The client reaches control and data plane at another loopback address: both lead through a proxy.
            for where in (self.daemon.tcp_endpoint.removeprefix("tcp://"), self.daemon.data_endpoint):
                port = int(where.rsplit(":", 1)[1])
                self.proxies.append(Proxy(("127.0.0.1", port), listen=("127.0.0.2", port), spares=CALLS))
            endpoint = f"tcp://127.0.0.2:{self.proxies[0].port}"
        self.engine = make_engine(model, endpoint, **options)

    @property
    def payload(self) -> Proxy:
        """The proxy of the data plane; calls pass while it is stalled."""
        return self.proxies[1]

    def close(self) -> None:
        """Ends all of it."""
        self.engine.close()
        for proxy in self.proxies:
            proxy.close()
        self.daemon.close()


@pytest.fixture(scope="module")
def shm(model: Callable[..., Path]) -> Iterator[Pair]:
    pair = Pair(model("llama"), "shm")
    yield pair
    pair.close()


@pytest.fixture(scope="module")
def tcp(model: Callable[..., Path]) -> Iterator[Pair]:
    pair = Pair(model("llama"), "tcp")
    yield pair
    pair.close()


def test_a_daemon_killed_during_stores_costs_nothing_but_the_cache(shm: Pair, expected: Expected) -> None:
    prompts = fresh_prompts(8, 1800)
    before = shm.daemon.stats().counters["reserved_chunks"]
    shm.engine.start_generate(prompts)
    wait_until(lambda: shm.daemon.stats().counters["reserved_chunks"] > before, 30, "stores")
    shm.daemon.kill()
    assert [answer.tokens for answer in shm.engine.finish_generate()] == expected(prompts)
    assert_right(shm.engine, fresh_prompts(), expected)
    shm.daemon.start()
    assert_used_again(shm.engine, shm.daemon, expected)


def test_a_daemon_killed_during_loads_costs_nothing_but_the_cache(shm: Pair, expected: Expected) -> None:
    prompts = fresh_prompts(8, 1800)
    assert_right(shm.engine, prompts, expected)
    shm.engine.reset()
    before = shm.daemon.stats().counters["hit_chunks"]
    shm.engine.start_generate(prompts)
    wait_until(lambda: shm.daemon.stats().counters["hit_chunks"] > before, 30, "loads")
    shm.daemon.kill()
    assert [answer.tokens for answer in shm.engine.finish_generate()] == expected(prompts)
    shm.daemon.start()
    assert_used_again(shm.engine, shm.daemon, expected)


@pytest.mark.parametrize("moment", ["store", "load"])
def test_a_daemon_killed_while_a_transfer_hangs_costs_nothing_but_the_cache(
    tcp: Pair, expected: Expected, moment: str
) -> None:
    prompts = fresh_prompts()
    if moment == "load":
        assert_right(tcp.engine, prompts, expected)
        tcp.engine.reset()
    tcp.payload.stall()
    counter = "reserved_chunks" if moment == "store" else "hit_chunks"
    before = tcp.daemon.stats().counters[counter]
    tcp.engine.start_generate(prompts)
    wait_until(lambda: tcp.daemon.stats().counters[counter] > before, 30, "a transfer")
    tcp.daemon.kill()
    tcp.payload.cut()
    tcp.payload.resume()
    assert [answer.tokens for answer in tcp.engine.finish_generate()] == expected(prompts)
    tcp.daemon.start()
    assert_used_again(tcp.engine, tcp.daemon, expected)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_daemon_that_hangs_for_ten_seconds_holds_nothing_up(
    request: pytest.FixtureRequest, expected: Expected, transport: str
) -> None:
    pair: Pair = request.getfixturevalue(transport)
    known = fresh_prompts()
    assert_right(pair.engine, known, expected)
    pair.engine.reset()
    pair.engine.slowest_hooks()
    pair.daemon.pause()
    until = time.monotonic() + 10
    try:
        assert_right(pair.engine, known, expected)  # lookups and loads of the hanging daemon
        while time.monotonic() < until:
            assert_right(pair.engine, fresh_prompts(2), expected)
    finally:
        pair.daemon.resume()
    assert_used_again(pair.engine, pair.daemon, expected)
    wait_until(lambda: pair.daemon.stats().pool.writing_bytes == 0, 30, "reserved slots to come back")


def test_bytes_spoiled_on_the_wire_are_a_miss(tcp: Pair, expected: Expected) -> None:
    prompts = fresh_prompts(1)
    assert_right(tcp.engine, prompts, expected)
    tcp.engine.reset()
    failures = tcp.engine.metrics()["vllm:kvd_load_failures"]
    tcp.payload.flip("down")
    cached = assert_right(tcp.engine, prompts, expected)
    assert tcp.payload.flips_left == 0
    assert tcp.engine.metrics()["vllm:kvd_load_failures"] > failures
    assert cached[0] in (0, 256, 512, 768)  # vLLM counts what it meant to load

    def hit() -> bool:
        tcp.engine.reset()
        return assert_right(tcp.engine, prompts, expected) == [768]

    wait_until(hit, 60, "a hit")


def test_bytes_spoiled_on_the_way_to_the_daemon_are_not_stored(tcp: Pair, expected: Expected) -> None:
    prompts = fresh_prompts(1, 256 + 9)
    before = tcp.daemon.stats().counters
    tcp.payload.flip("up")
    assert_right(tcp.engine, prompts, expected)
    tcp.engine.drain()
    assert tcp.payload.flips_left == 0
    after = tcp.daemon.stats().counters
    assert after["checksum_failures"] == before["checksum_failures"] + 1
    assert after["stored_chunks"] == before["stored_chunks"]
    assert tcp.daemon.audit() == []


def test_a_full_daemon_makes_room_or_says_no_and_the_engine_goes_on(
    model: Callable[..., Path], expected: Expected
) -> None:
    with Daemon(pool="2MiB") as daemon, make_engine(model("llama"), daemon.unix_endpoint) as engine:
        for _ in range(4):
            assert_right(engine, fresh_prompts(6), expected)
        engine.drain()
        assert daemon.stats().counters["evicted_chunks"] + daemon.stats().counters["no_room_chunks"] > 0
        assert daemon.audit() == []
        assert daemon.stats().pool.writing_bytes == 0


def test_an_engine_that_starts_without_a_daemon_uses_it_when_it_comes(
    model: Callable[..., Path], expected: Expected
) -> None:
    with Daemon(start=False) as daemon, make_engine(model("llama"), daemon.unix_endpoint) as engine:
        assert assert_right(engine, fresh_prompts(), expected) == [0, 0, 0, 0]
        daemon.start()
        assert_used_again(engine, daemon, expected)


def test_a_daemon_of_another_protocol_is_left_alone(model: Callable[..., Path], expected: Expected) -> None:
    class Refusing(kvd_pb2_grpc.KvdServicer):
        def Session(self, request_iterator: Any, context: grpc.ServicerContext) -> Any:
            context.abort_with_status(rpc_status.to_status(to_status(ProtocolMismatch("protocol 99 and up"))))

    server = grpc.server(futures.ThreadPoolExecutor(4))
    kvd_pb2_grpc.add_KvdServicer_to_server(Refusing(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with make_engine(model("llama"), f"tcp://127.0.0.1:{port}", connector={"nonsense": 1}) as engine:
            assert assert_right(engine, fresh_prompts(), expected) == [0, 0, 0, 0]
            assert "protocol 99" in engine.log
            assert "unknown key 'nonsense'" in engine.log
    finally:
        server.stop(None)


def test_an_engine_killed_in_the_middle_of_a_store_leaves_nothing_half_written(model: Callable[..., Path]) -> None:
    pair = Pair(model("llama"), "tcp")
    try:
        pair.engine.generate(fresh_prompts(1))
        pair.engine.drain()
        whole = pair.daemon.stats().counters["stored_chunks"]
        pair.payload.stall()
        pair.engine.start_generate(fresh_prompts(1))
        wait_until(lambda: pair.daemon.stats().pool.writing_bytes, 30, "a store")
        pair.engine.kill()
        pair.payload.cut()
        pair.payload.resume()

        def returned() -> bool:
            pool = pair.daemon.stats().pool
            return not pool.writing_bytes and not pool.quarantined_bytes

        wait_until(returned, 30, "the slots to come back after the quarantine")
        assert pair.daemon.stats().counters["stored_chunks"] == whole
        assert pair.daemon.audit() == []
    finally:
        pair.close()


def test_an_engine_killed_at_any_moment_over_shared_memory_leaves_the_books_clean(
    model: Callable[..., Path],
) -> None:
    with Daemon(quarantine=0.5) as daemon:
        engine = make_engine(model("llama"), daemon.unix_endpoint)
        try:
            engine.start_generate(fresh_prompts(8, 1800))
            wait_until(lambda: daemon.stats().counters["reserved_chunks"], 30, "stores")
            engine.kill()
        finally:
            engine.close()
        wait_until(lambda: not daemon.stats().sessions, 30, "the session to end")

        def returned() -> bool:
            pool = daemon.stats().pool
            return not pool.writing_bytes and not pool.quarantined_bytes

        wait_until(returned, 30, "the slots to come back after the quarantine")
        assert daemon.audit() == []
