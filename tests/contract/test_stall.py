"""Nothing blocks the daemon's event loop while every path is as busy as it can be."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvd_client import Client, NamespaceHandle, StoreOutcome
from tests.contract.clients import buffers, chained, client_of, namespace_of, payloads, prefix
from tests.daemon import ROOT, Daemon, clean_environment
from tests.wait import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

#: Keys of a lookup; their chunks are small, so that they stay in the pool.
KEYS, SMALL_BYTES = 1000, 4096
#: Chunks of a store and of a load; prefixes that a client comes back to after as many others, from the disk by then.
ROUND, BEHIND = 20, 12
#: For so long the loop is looked at. Nobody asks it for its metrics meanwhile: that would be one more thing to do.
MEASURE_S = 4.0
#: A loop that is fair makes a request wait for some others.
LOOKUPS = 4
#: Share of the time in which the loop may be later than all this explains. A call of 0.2 s in every commit makes that
#: more than half of it.
MAX_LATE = 1 / 3


class Load:
    """Clients that store, load and look up as fast as they can."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.done: Counter[str] = Counter()
        self._stop = threading.Event()

    @contextlib.contextmanager
    def running(self, keys: list[bytes], namespace: NamespaceHandle, client: Client) -> Iterator[None]:
        """Runs them, and raises what went wrong with them."""
        with ThreadPoolExecutor(3) as threads:
            tasks = [threads.submit(self._store_and_load, way) for way in ("shm", "tcp")]
            tasks.append(threads.submit(self._look_up, client, namespace, keys))
            try:
                yield
            finally:
                self._stop.set()
        for task in tasks:
            task.result()

    def _store_and_load(self, way: str) -> None:
        with client_of(self.daemon, way) as client:
            namespace, data, into = namespace_of(client), payloads(ROUND), buffers(ROUND)
            former: list[list[bytes]] = []
            while not self._stop.is_set():
                former.append(prefix(ROUND))
                stored = client.store(namespace, chained(former[-1]), data)
                self.done[f"{way} stored"] += stored.count(StoreOutcome.STORED)
                self.done[f"{way} loaded"] += client.load(namespace, former[-1], into)
                if len(former) > BEHIND:
                    client.load(namespace, former.pop(0), into)

    def _look_up(self, client: Client, namespace: NamespaceHandle, keys: list[bytes]) -> None:
        while not self._stop.is_set():
            with client.lookup(namespace, keys) as lease:
                self.done["looked up"] += len(lease)


@contextlib.contextmanager
def contended_loop() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.contract.contended_loop"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=clean_environment(),
        cwd=ROOT,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def lags_of(daemon: Daemon) -> dict[float, float]:
    """Ticks of the daemon's loop that were no later than so many seconds."""
    found = {}
    for name, value in daemon.metrics().items():
        if match := re.fullmatch(r'kvd_event_loop_lag_seconds_bucket{le="(.*)"}', name):
            found[float(match[1])] = value
    return found


def time_of_a_lookup(client: Client, namespace: NamespaceHandle, keys: list[bytes]) -> float:
    """Seconds, while nothing else is going on."""
    times = []
    for _ in range(5):
        began = time.monotonic()
        with client.lookup(namespace, keys) as lease:
            assert len(lease) == KEYS
        times.append(time.monotonic() - began)
    return statistics.median(times)


def test_the_event_loop_is_not_held_up_while_every_path_is_busy() -> None:
    with Daemon(pool="64MiB", spill="256MiB", spill_floor="0") as daemon, client_of(daemon, "tcp") as client:
        namespace, keys = namespace_of(client, SMALL_BYTES), prefix(KEYS)
        client.store(namespace, chained(keys), payloads(KEYS, SMALL_BYTES))
        lookup_s = time_of_a_lookup(client, namespace, keys)
        load = Load(daemon)
        with load.running(keys, namespace, client), contended_loop() as reference:

            def busy() -> bool:
                counters = daemon.stats().counters
                return len(load.done) == 5 and min(counters["spilled_chunks"], counters["promoted_chunks"]) > 0

            wait_until(busy, 30, "every path")
            before = lags_of(daemon)
            time.sleep(MEASURE_S)
            lags = {late: count - before[late] for late, count in lags_of(daemon).items()}
            of_any_loop = sorted(json.loads(reference.communicate()[0]))
        explained_s = of_any_loop[len(of_any_loop) * 99 // 100] + LOOKUPS * lookup_s
        ticks = {least: lags[most] - lags[least] for least, most in itertools.pairwise(sorted(lags))}
        share = sum(least * count for least, count in ticks.items() if least >= explained_s) / MEASURE_S
        assert share <= MAX_LATE, f"for {share:.0%} of the time the loop is more than {explained_s:.3f} s late: {ticks}"
        assert daemon.audit() == []
