"""What an operator sees of the tiers: the page, the metrics, and what a restart makes of them."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd import preflight
from kvd.wire.pb import kvd_pb2 as pb
from tests.daemon import Daemon, run_kvd
from tests.raw import RawSession
from tests.wait import wait_until

CHUNK_BYTES = 64 << 10
KEYS = [bytes([number]) * 32 for number in range(1, 9)]


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon(warm=True, pool="8MiB", spill="32MiB", spill_floor="0", spill_write_daily="1GiB") as daemon:
        yield daemon


def store(daemon: Daemon) -> bytes:
    """Stores ``KEYS`` and waits until they are on disk; the namespace."""
    before = daemon.stats().counters["spilled_chunks"]
    with RawSession(daemon.unix_endpoint, daemon.socket) as session:
        namespace = session.open_namespace("tiers", CHUNK_BYTES)
        session.reserve(namespace, KEYS)
        session.commit(namespace, KEYS)
    wait_until(lambda: daemon.stats().counters["spilled_chunks"] == before + len(KEYS), what="the records")
    return namespace


def text_of(daemon: Daemon) -> str:
    """The page for people."""
    return run_kvd("status", "--endpoint", daemon.unix_endpoint).stdout


def test_what_is_spilled_is_seen_by_people_programs_and_metrics(daemon: Daemon) -> None:
    namespace = store(daemon)
    found = daemon.status()
    assert found["disk"]["records"] == len(KEYS)
    (drive,) = found["disk"]["drives"]
    assert drive["state"] == "up"
    assert drive["live_bytes"] + drive["dead_bytes"] + drive["free_bytes"] == drive["capacity_bytes"]
    assert drive["written_bytes"] >= len(KEYS) * CHUNK_BYTES
    assert found["disk"]["daily_bytes"] == 1 << 30
    assert found["disk"]["written_today_bytes"] >= len(KEYS) * CHUNK_BYTES
    (space,) = [one for one in found["namespaces"] if one["namespace_id"] == namespace.hex()]
    assert space["disk_chunks"] == len(KEYS)
    text = text_of(daemon)
    assert f"in {len(KEYS)} records" in text
    assert " of 1GiB today" in text
    metrics = daemon.metrics()
    label = f'drive="{drive["directory"]}"'
    assert metrics["kvd_spill_written_chunks_total"] == len(KEYS)
    assert metrics[f"kvd_spill_drive_up{{{label}}}"] == 1
    states = [metrics[f'kvd_spill_bytes{{{label},state="{state}"}}'] for state in ("live", "dead", "free")]
    assert sum(states) == drive["capacity_bytes"]


def test_a_drop_says_what_it_dropped_from_the_disks(daemon: Daemon) -> None:
    namespace = store(daemon)
    result = run_kvd("drop", "--namespace", namespace.hex(), "--endpoint", daemon.unix_endpoint)
    assert result.stdout == "dropped 8 chunks (8 records on disk); kept 0 that are in use or pinned\n"
    assert daemon.status()["disk"]["records"] == 0


def test_a_restart_is_told_of_warm_or_cold(daemon: Daemon) -> None:
    namespace = store(daemon)
    assert daemon.status()["pool"]["recovery"]["warm"] is False
    assert "start    cold: " in text_of(daemon)
    daemon.kill()
    daemon.start()
    recovery = daemon.status()["pool"]["recovery"]
    assert recovery["warm"] is True
    assert recovery["chunks"] == len(KEYS)
    assert f"start    warm: {len(KEYS)} chunks taken over" in text_of(daemon)
    assert daemon.metrics()["kvd_recovery_warm"] == 1
    with RawSession(daemon.unix_endpoint, daemon.socket) as session:
        assert session.open_namespace("tiers", CHUNK_BYTES) == namespace

        def leased() -> bool:
            found = session.lookup(namespace, KEYS)
            session.call("Release", pb.ReleaseRequest(lease_ids=[1]))
            return len(found.offsets) == len(KEYS)

        wait_until(leased, what="the chunks to be checked")
    assert daemon.metrics()["kvd_unverified_chunks"] == 0


def test_an_interrupt_removes_a_pool_that_nobody_named_and_a_stop_does_not() -> None:
    with Daemon(pool_dir="auto", pool="4MiB") as daemon:
        directory = Path(preflight.own_pool_directory(daemon.socket))
        try:
            assert str(directory) in daemon.line
            assert daemon.stop() == 0
            assert (directory / "kvd-pool").exists()
            daemon.start()
            assert daemon.status()["pool"]["recovery"]["warm"] is True
            daemon._signal(signal.SIGINT)
            assert daemon._wait() == 0
            assert [entry.name for entry in directory.iterdir()] == [".kvd.lock"]
        finally:
            shutil.rmtree(directory)


def test_a_recorded_trace_has_each_request_once(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with Daemon(pool="4MiB", record_trace=trace) as daemon:
        with RawSession(daemon.unix_endpoint, daemon.socket) as session:
            namespace = session.open_namespace("traced")
            for lease, again in enumerate((False, True, True, False), 1):
                request = pb.LookupRequest(namespace_id=namespace, lease_id=lease, keys=KEYS[: 4 + lease], again=again)
                session.call("Lookup", request)
        wait_until(
            lambda: daemon.metrics().get('kvd_trace_requests_total{outcome="recorded"}') == 2, what="the metric to tell"
        )
        assert daemon.stop() == 0
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [len(line["hash_ids"]) for line in lines] == [5, 8]
    assert lines[0]["hash_ids"] == lines[1]["hash_ids"][:5]
