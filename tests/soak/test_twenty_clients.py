"""Twenty processes, some of which die, store and load at a pool a tenth of what they work with.

``KVD_SOAK_S`` says for how long, 60 s unless it is set. Every byte that is read is compared by whoever reads it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from kvd_client import Client, StoreOutcome
from tests.daemon import ROOT, Daemon, clean_environment, run_kvd
from tests.soak.corpus import Corpus, chained
from tests.wait import wait_until

SOAK_S = float(os.environ.get("KVD_SOAK_S", "60"))
POOL_BYTES = 64 << 20
WORKING_SET_BYTES = 10 * POOL_BYTES
SHM_CLIENTS = 14
TCP_CLIENTS = 6
QUARANTINE_S = 0.5

#: How often in a run a client dies, how often the books are checked, how often memory is looked at.
DEATHS = 10
AUDITS = 12
SAMPLES = 200

#: What a steady daemon, or client, may gain from the second quarter of the run to the last: the moods of allocators.
DAEMON_GROWTH_BYTES = 8 << 20
CLIENT_GROWTH_BYTES = 24 << 20


#: Threads that the interpreter's and gRPC's pools may still add: they are bounded by the processors, and stay.
POOLED_THREADS = 2 * (os.cpu_count() or 1) + 4

#: Descriptors that gRPC may keep besides. One left by each client would be thirty.
SPARE_DESCRIPTORS = 4


class Usage(NamedTuple):
    """What a process has of the system. ``own_bytes``: its memory beside the pool."""

    own_bytes: int
    descriptors: int
    threads: int


def usage(pid: int) -> Usage:
    """Looks at a process. OSError when it is gone."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    kib = {name: int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")}
    return Usage(sum(kib.values()) << 10, len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"]))


class Worker:
    """A ``tests.soak.worker`` process."""

    def __init__(self, endpoint: str, seed: int, errors: Path) -> None:
        self.endpoint = endpoint
        self.own_bytes: list[int] = []
        self._errors = errors
        with errors.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.soak.worker", endpoint, str(WORKING_SET_BYTES), str(seed)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=clean_environment(),
                cwd=ROOT,
            )

    @property
    def errors(self) -> str:
        """What it has complained of."""
        return self._errors.read_text()

    def line(self) -> str:
        """The next line that it says."""
        assert self._process.stdout is not None
        line: str = self._process.stdout.readline()
        assert line, f"a client has ended with {self._process.wait(30)}: {self.errors}"
        return line.strip()

    def sample(self) -> None:
        """Notes its memory; fails the test if it has ended."""
        assert self._process.poll() is None, f"a client has ended with {self._process.returncode}: {self.errors}"
        self.own_bytes.append(usage(self._process.pid).own_bytes)

    def stop_half_way(self) -> None:
        """Returns when it holds a chunk that is half written."""
        self._process.send_signal(signal.SIGUSR1)
        while self.line() != "half":
            pass

    def stop(self) -> None:
        """Tells it to end after what it is doing."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def counts(self) -> Counter[str]:
        """What it has counted until it was told to end. Waits for that end."""
        counts: Counter[str] = Counter(json.loads(self.line()))
        assert self._process.wait(60) == 0, self.errors
        return counts

    def close(self) -> None:
        """Kills it, if it still lives."""
        self._process.kill()
        self._process.wait(30)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Crowd:
    """The clients. Each that dies is replaced by one that comes the same way. ``logs``: a directory."""

    def __init__(self, logs: Path) -> None:
        self.workers: list[Worker] = []
        self.killed = 0
        self._logs = logs
        self._started = 0
        self._random = random.Random(2)

    def start(self, endpoints: list[str]) -> None:
        """Brings one client to each of ``endpoints``, and waits until all of them are connected."""
        for endpoint in endpoints:
            self.workers.append(self._begin(endpoint))
        for worker in self.workers:
            assert worker.line() == "ready"

    def kill_one(self) -> None:
        """Kills a client: every second time any, at any moment, else one that stands in the middle of a store."""
        at = self._random.randrange(len(self.workers))
        victim = self.workers[at]
        if self.killed % 2:
            victim.stop_half_way()
        victim.close()
        self.killed += 1
        self.workers[at] = self._begin(victim.endpoint)
        assert self.workers[at].line() == "ready"

    def finish(self) -> Counter[str]:
        """Lets all of them end by themselves; their counts together."""
        for worker in self.workers:
            worker.stop()
        return sum((worker.counts() for worker in self.workers), Counter[str]())

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.close()

    def _begin(self, endpoint: str) -> Worker:
        self._started += 1
        return Worker(endpoint, self._started, self._logs / str(self._started))


def visit(daemon: Daemon) -> None:
    """One client of either kind comes, stores, loads, and goes: what the daemon makes once is made by now."""
    for number, endpoint in enumerate((daemon.unix_endpoint, daemon.tcp_endpoint)):
        corpus = Corpus(4096 + number, 1 << 20)
        with Client(endpoint, timeout_s=30) as client:
            client.connect(30)
            namespace = client.namespace(corpus.identity, corpus.chunk_bytes)
            keys = corpus.keys(0)
            outcomes = client.store(namespace, chained(keys), [corpus.data(key) for key in keys])
            assert set(outcomes) <= {StoreOutcome.STORED, StoreOutcome.PRESENT}
            buffers = [bytearray(corpus.chunk_bytes) for _ in keys]
            assert client.load(namespace, keys, buffers) == len(keys)
            assert buffers == [corpus.data(key) for key in keys]
    wait_until(lambda: not daemon.stats().sessions, 60, "the visitors' sessions to be over")


def growth(samples: list[int]) -> int:
    """Bytes gained from the second quarter to the last, peaks compared."""
    quarter = len(samples) // 4
    return max(samples[-quarter:]) - max(samples[quarter : 2 * quarter])


def soak(daemon: Daemon, crowd: Crowd) -> list[int]:
    """Lets them work, kills some, looks on; what the daemon's memory was meanwhile, sample by sample."""
    own_bytes = []
    for number in range(1, SAMPLES + 1):
        time.sleep(SOAK_S / SAMPLES)
        own_bytes.append(usage(daemon.pid).own_bytes)
        for worker in crowd.workers:
            worker.sample()
        if number % (SAMPLES // DEATHS) == SAMPLES // DEATHS // 2:
            crowd.kill_one()
        if number % (SAMPLES // AUDITS) == 0:
            assert daemon.audit() == []
            pool = daemon.stats().pool
            parts = (
                pool.free_bytes, pool.ready_bytes, pool.writing_bytes, pool.quarantined_bytes, pool.idle_slot_bytes
            )  # fmt: skip
            assert sum(parts) == pool.bytes, parts
    return own_bytes


@pytest.mark.soak
@pytest.mark.timeout(SOAK_S + 300)
def test_twenty_clients_read_only_right_bytes_and_leave_nothing_behind(tmp_path: Path) -> None:
    with Daemon(pool=f"{POOL_BYTES}B", quarantine=QUARANTINE_S) as daemon:
        visit(daemon)
        before = usage(daemon.pid)
        with Crowd(tmp_path) as crowd:
            crowd.start([daemon.unix_endpoint] * SHM_CLIENTS + [daemon.tcp_endpoint] * TCP_CLIENTS)
            own_bytes = soak(daemon, crowd)
            counts = crowd.finish()
            survivors = [worker.own_bytes for worker in crowd.workers if len(worker.own_bytes) == SAMPLES]
            killed = crowd.killed
        wait_until(lambda: not daemon.stats().sessions, 60, "every session to be over")
        wait_until(lambda: not _unsettled(daemon), 60, "every slot to be stored or free")
        stats = daemon.stats()
        counters = dict(stats.counters)
        print(f"\n{dict(counts)}\n{counters}\n{before} then {usage(daemon.pid)}, gained {growth(own_bytes)} in the run")

        # They did what they were sent for.
        assert killed == DEATHS and len(survivors) >= SHM_CLIENTS + TCP_CLIENTS - DEATHS
        did = ("STORED", "read", "late", "in place", "slowly", "held", "aborted")
        assert [name for name in did if not counts[name]] == []
        assert counters["hit_chunks"] > 0 and counters["evicted_chunks"] > 0 and counters["quarantined_chunks"] > 0

        # Nothing was wrong, lost, or left.
        assert counts["lost under lease"] == 0
        assert counters["checksum_failures"] == 0
        assert daemon.audit() == []
        assert "Traceback" not in daemon.log, daemon.log[-4000:]
        descriptors = before.descriptors + SPARE_DESCRIPTORS
        wait_until(lambda: usage(daemon.pid).descriptors <= descriptors, 30, f"descriptors as in {before}")
        threads = before.threads + POOLED_THREADS
        wait_until(lambda: usage(daemon.pid).threads <= threads, 30, f"threads as in {before}")
        assert growth(own_bytes) < DAEMON_GROWTH_BYTES, own_bytes
        assert [samples for samples in survivors if growth(samples) >= CLIENT_GROWTH_BYTES] == []

        # The pool is as good as new.
        visit(daemon)
        assert run_kvd("drop", "--endpoint", daemon.unix_endpoint).returncode == 0
        pool = daemon.stats().pool
        assert pool.free_bytes == pool.bytes
        assert daemon.audit() == []


def _unsettled(daemon: Daemon) -> int:
    pool = daemon.stats().pool
    return pool.writing_bytes + pool.quarantined_bytes
