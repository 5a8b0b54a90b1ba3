"""A lookup's miss is answered from the presence table, without a call; whatever can be found is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvd.wire import presence as wire
from kvd_client import Client, Unavailable
from kvd_client import presence as client_presence
from tests.contract.clients import buffers, chained, client_of, namespace_of, payloads, prefix
from tests.contract.test_tiers import store, wait_written
from tests.daemon import Daemon, run_kvd
from tests.wait import wait_until


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon(pool="32MiB", quarantine=0.1) as daemon:
        yield daemon
        assert daemon.audit() == []


@pytest.fixture
def disked() -> Iterator[Daemon]:
    """A daemon with a disk whose pool outlives nobody."""
    with Daemon(pool="16MiB", spill="256MiB", quarantine=0.1) as daemon:
        yield daemon
        assert daemon.audit() == []


def asked(daemon: Daemon) -> int:
    """Lookups that have reached the daemon since it started, whichever way."""
    samples = daemon.metrics().items()
    return int(sum(value for name, value in samples if name.startswith("kvd_requests_total{") and '"Lookup"' in name))


def calls(daemon: Daemon, action: Callable[[], object]) -> int:
    """Lookups that ``action`` has cost."""
    before = asked(daemon)
    action()
    return asked(daemon) - before


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("way", ["shm", "tcp-data"])
def test_a_miss_costs_no_call_and_a_hit_costs_one(
    daemon: Daemon, way: str, compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiler:
        monkeypatch.setattr(client_presence, "may_hold", wire.may_hold)
    with client_of(daemon, way) as client:
        namespace, keys = namespace_of(client), prefix(20)
        client.reserve(namespace, [])  # opens it

        def miss() -> None:
            with client.lookup(namespace, keys) as lease:
                assert (len(lease), lease.promoting, lease.writing) == (0, 0, 0)
            with client.lookup(namespace, keys, again=True, wait_s=1) as lease:
                assert len(lease) == 0
            assert not lease.renew()

        assert calls(daemon, miss) == 0
        store(client, namespace, keys[:10], payloads(10))

        def hit() -> None:
            with client.lookup(namespace, keys) as lease:
                assert len(lease) == 10

        assert calls(daemon, hit) == 1
        assert calls(daemon, lambda: client.lookup(namespace, keys, skip=9).release()) == 1
        assert calls(daemon, lambda: client.lookup(namespace, keys, skip=10).release()) == 0
        assert calls(daemon, lambda: client.lookup(namespace, [*prefix(1), *keys]).release()) == 0


def test_a_client_without_the_table_asks(daemon: Daemon) -> None:
    with client_of(daemon, "tcp") as client:
        namespace, keys = namespace_of(client), prefix(5)
        assert calls(daemon, lambda: client.lookup(namespace, keys).release()) == 1


def test_the_daemon_hears_of_misses_that_it_was_not_asked_for(daemon: Daemon) -> None:
    with client_of(daemon, "shm") as client:
        namespace, keys = namespace_of(client), prefix(7)
        before = daemon.metrics()
        client.lookup(namespace, keys, skip=2)
        client.lookup(namespace, keys)
        client.lookup(namespace, keys, again=True)  # the same question

        def risen(name: str) -> float:
            return daemon.metrics()[name] - before[name]

        wait_until(lambda: risen("kvd_lookup_miss_chunks_total") == 12, what="the daemon to have heard")
        assert risen("kvd_lookup_asked_chunks_total") == 12


def test_what_another_client_stores_is_found_at_once(daemon: Daemon) -> None:
    with client_of(daemon, "shm") as writer, client_of(daemon, "shm") as reader:
        namespace = namespace_of(writer)
        for _ in range(20):
            keys, data = prefix(3), payloads(3)
            assert len(reader.lookup(namespace, keys)) == 0
            store(writer, namespace, keys, data)
            out = buffers(3)
            assert reader.load(namespace, keys, out) == 3
            assert out == data


def test_what_was_evicted_or_dropped_costs_no_call_any_more(daemon: Daemon) -> None:
    with client_of(daemon, "shm") as client:
        namespace, keys = namespace_of(client), prefix(200)  # 50 MiB, each key a root
        for key in keys:
            store(client, namespace, [key], payloads(1))
        wait_until(lambda: daemon.stats().pool.idle_slot_bytes, what="the last eviction, ahead of what is stored next")
        found: list[int] = []

        def look() -> None:
            for key in keys:
                with client.lookup(namespace, [key]) as lease:
                    found.append(len(lease))

        assert calls(daemon, look) == sum(found)
        assert 0 < sum(found) < 200
        wait_until(lambda: not any(session.read_leases for session in daemon.stats().sessions), what="the releases")
        assert run_kvd("drop", "--endpoint", daemon.unix_endpoint).returncode == 0
        assert calls(daemon, look) == 0


def test_what_lies_on_the_disk_only_is_found(disked: Daemon) -> None:
    with client_of(disked, "shm") as client:
        namespace, keys, data = namespace_of(client), prefix(20), payloads(20)
        store(client, namespace, keys, data)
        wait_written(disked, 20)
        for _ in range(6):  # 24 MiB more than the pool has
            store(client, namespace, prefix(16), payloads(16))
        with client.lookup(namespace, keys, wait_s=20) as lease:
            assert len(lease) == 20
        out = buffers(20)
        assert client.load(namespace, keys, out) == 20
        assert out == data


@pytest.mark.parametrize("warm", [True, False], ids=["in the pool", "on the disk"])
def test_what_a_former_daemon_left_is_found(warm: bool) -> None:
    with Daemon(pool="16MiB", warm=warm, spill="256MiB", quarantine=0.1) as daemon, client_of(daemon, "shm") as client:
        namespace, keys, data = namespace_of(client), prefix(24), payloads(24)
        store(client, namespace, keys, data)
        wait_written(daemon, 24)
        daemon.kill()
        daemon.start()
        wait_until(lambda: client.connected, 20, "the client to connect again")
        out = buffers(24)
        wait_until(lambda: client.load(namespace, keys, out) == 24, 30, "the whole prefix")  # the scan may go on still
        assert out == data
        assert calls(daemon, lambda: client.lookup(namespace, prefix(24))) == 0
        assert daemon.audit() == []


def test_a_daemon_that_records_a_trace_hears_every_request(tmp_path: Path) -> None:
    with Daemon(pool="16MiB", record_trace=tmp_path / "trace") as daemon, client_of(daemon, "shm") as client:
        namespace, keys = namespace_of(client), prefix(5)
        assert calls(daemon, lambda: client.lookup(namespace, keys)) == 1


def test_a_daemon_that_has_gone_answers_nothing(daemon: Daemon) -> None:
    with client_of(daemon, "shm") as client:
        namespace, keys = namespace_of(client), prefix(5)
        for end in (daemon.kill, daemon.stop):
            assert calls(daemon, lambda: client.lookup(namespace, keys)) == 0
            end()
            with pytest.raises(Unavailable):
                client.lookup(namespace, keys)
            daemon.start()
            wait_until(lambda: client.connected, 20, "the client to connect again")


def test_a_daemon_that_hangs_costs_a_miss_nothing(daemon: Daemon) -> None:
    with client_of(daemon, "shm") as client:
        namespace, keys = namespace_of(client), prefix(5)
        client.lookup(namespace, keys)
        daemon.pause()
        try:
            assert len(client.lookup(namespace, keys, timeout_s=0.01)) == 0
        finally:
            daemon.resume()


def test_a_chunk_that_is_being_written_is_a_miss_until_it_is_there(daemon: Daemon) -> None:
    with client_of(daemon, "shm") as client:
        namespace, keys = namespace_of(client), prefix(2)
        with client.reserve(namespace, chained(keys)) as lease:
            assert calls(daemon, lambda: client.lookup(namespace, keys)) == 0
            lease.commit([keys[1]])  # its parent is not there yet
            assert calls(daemon, lambda: client.lookup(namespace, [keys[1]])) == 0
            lease.commit([keys[0]])
            assert len(client.lookup(namespace, keys)) == 2


def test_a_client_keeps_nothing_of_a_session_that_is_over(daemon: Daemon) -> None:
    with Client(daemon.unix_endpoint) as client:
        client.connect(10)
        session = client._keeper.session
        assert session is not None and session.presence is not None
    wait_until(lambda: session.presence is None, what="the table to be let go")
