"""The load generator in small: it asks what its plan says, counts what happens, and trusts no store."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from kvd_client.bench import load as load_module
from kvd_client.bench import stores
from kvd_client.bench.load import PHASES, Load, Plan, Row, headed

KIB = 1 << 10

#: A store in the memory of one client, with a mistake in it when it is told so.
FAKE = """
class Store:
    def __init__(self, mistake):
        self.mistake, self.kept, self.puts, self.gets = mistake, {}, 0, 0
    def put(self, keys, data):
        self.puts += 1
        if self.mistake == "refuses" and self.puts % 2:
            return 0
        if self.mistake == "breaks":
            raise OSError("it broke")
        self.kept.update((key, bytes(chunk)) for key, chunk in zip(keys, data))
        return len(keys)
    def get(self, keys, into):
        self.gets += 1
        if self.mistake == "forgets" and self.gets % 2:
            return 0
        for number, (key, chunk) in enumerate(zip(keys, into)):
            if key not in self.kept:
                return number
            chunk[:] = self.kept[key]
            if self.mistake == "lies":
                chunk[0] ^= 1
        return len(keys)
    def exists(self, keys):
        return sum(key in self.kept for key in keys)
    def close(self):
        pass

def open_store(options, client, data, into):
    return Store(options["mistake"])
"""


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "SETTLE_S", 0.0)


class FakeServer:
    """Variants named after their mistakes."""

    about = "a fake"
    python = sys.executable

    def __init__(self, directory: Path, mistakes: tuple[str, ...], most_clients: int = 8) -> None:
        file = directory / "fake_store.py"
        file.write_text(FAKE)
        self.client, self.most_clients, self.closed = str(file), most_clients, False
        self.variants: dict[str, dict[str, Any]] = {mistake: {"mistake": mistake} for mistake in mistakes}
        self.pids: list[int] = []

    def loop_lag(self) -> list[tuple[float, float]]:
        return []

    def close(self) -> None:
        self.closed = True


def plan(directory: Path, **options: Any) -> Plan:
    usual = {"clients": (2,), "chunks": (16 * KIB,), "batch": 2, "seconds": 0.05, "rounds": 1}
    return Plan(**{**usual, "pool_bytes": 512 * KIB, "directory": str(directory), **options})


def with_fake(monkeypatch: pytest.MonkeyPatch, server: FakeServer) -> None:
    monkeypatch.setattr(load_module, "start", lambda name, pool_bytes, directory: server)


def kinds(rows: list[Row], store: str) -> dict[tuple[str, str], Row]:
    return {(row.phase, row.kind): row for row in rows if row.store == store}


def test_kvd_is_loaded_over_both_transports(tmp_path: Path) -> None:
    load = Load(plan(tmp_path, pool_bytes=4 << 20, chunks=(64 * KIB,), seconds=0.1), [])
    load.run()
    assert load.notes == []
    for store in ("kvd unix", "kvd tcp"):
        found = kinds(load.rows, store)
        assert {phase for phase, _ in found} == set(PHASES)
        assert found["store", "store"].gib_per_s > 0 and found["load", "load"].gib_per_s > 0
        assert all(row.clients == 2 and row.requests > 0 for row in found.values())
    assert all(len(row) == len(headed(load.rows)[0]) for row in headed(load.rows))
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_returns_other_bytes_is_left_out_and_the_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeServer(tmp_path, ("lies", "breaks", ""))
    with_fake(monkeypatch, server)
    load = Load(plan(tmp_path), [])
    load.run()
    assert {row.store for row in load.rows} == {"kvd "}
    assert any("kvd lies" in note and "not what was stored" in note for note in load.notes)
    assert any("kvd breaks" in note and "it broke" in note for note in load.notes)
    assert server.closed


def test_what_is_refused_and_what_is_missed_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_fake(monkeypatch, FakeServer(tmp_path, ("refuses", "forgets")))
    load = Load(plan(tmp_path, clients=(1,), seconds=0.2, phases=("store", "load")), [])
    load.run()
    assert load.notes == []
    assert kinds(load.rows, "kvd refuses")["store", "store"].refused == pytest.approx(0.5, abs=0.05)
    assert kinds(load.rows, "kvd forgets")["store", "store"].refused == 0
    assert kinds(load.rows, "kvd forgets")["load", "load"].misses == pytest.approx(0.5, abs=0.05)
    assert kinds(load.rows, "kvd refuses")["load", "load"].misses == 0


def test_pure_phases_ask_for_one_thing_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_fake(monkeypatch, FakeServer(tmp_path, ("",)))
    load = Load(plan(tmp_path, hits=0.5), [])
    load.run()
    found = kinds(load.rows, "kvd ")
    assert {kind for phase, kind in found if phase in ("store", "load", "lookup")} == {"store", "load", "lookup"}
    assert {kind for phase, kind in found if phase == "mixed"} == {"store", "load", "miss"}
    assert found["load", "load"].misses == 0
    assert found["mixed", "miss"].misses == 0


def test_few_samples_have_no_high_percentile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_fake(monkeypatch, FakeServer(tmp_path, ("",)))
    load = Load(plan(tmp_path), [])
    load.run()
    for row in load.rows:
        assert (row.p99_ms is not None) == (row.requests >= 100)
        assert (row.p999_ms is not None) == (row.requests >= 1000)


def test_what_does_not_fit_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_fake(monkeypatch, FakeServer(tmp_path, ("",), most_clients=1))
    load = Load(plan(tmp_path, clients=(1, 2, 64), phases=("store",)), [])
    load.run()
    assert {row.clients for row in load.rows} == {1}
    assert any("x64" in note and "too small" in note for note in load.notes)


def test_an_unknown_peer_is_named(tmp_path: Path) -> None:
    load = Load(plan(tmp_path, clients=(), pool_bytes=4 << 20), ["nobody"])
    load.run()
    (note,) = load.notes
    assert "nobody" in note and all(peer in note for peer in stores.peers())


def test_files_are_a_peer_that_always_runs(tmp_path: Path) -> None:
    if "posix" not in stores.peers():
        pytest.skip("there is no checkout")
    load = Load(plan(tmp_path, clients=(1,), pool_bytes=2 << 20, phases=("store", "load")), ["posix"])
    before = set(os.listdir("/dev/shm"))
    load.run()
    assert {row.store for row in load.rows} >= {"posix tmpfs", "posix disk"}, load.notes
    assert {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("kvd-bench-")} == set()
