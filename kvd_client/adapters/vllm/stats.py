"""The connector's numbers, through vLLM's connector statistics: the engine's log line and its Prometheus page."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

#: Everything that is counted; all of it adds up over ranks and over time.
COUNTERS = {
    "lookups": "Lookups sent to the daemon",
    "lookup_seconds": "Time that scheduler steps waited for lookups, seconds",
    "lookup_failures": "Lookups without an answer in time",
    "promote_waits": "Requests that found chunks on their way into the daemon's memory and waited for them",
    "promote_seconds": "Time that those requests waited, seconds",
    "promoted_chunks": "Chunks that came while a request waited for them",
    "promote_misses": "Chunks that had not come when the wait was over, and that were computed instead",
    "loaded_chunks": "Chunks loaded into the engine's pages, counted by every rank",
    "loaded_bytes": "Bytes loaded into the engine's pages",
    "load_seconds": "Time that loads took, seconds",
    "load_failures": "Chunks whose load failed and that were computed instead, counted by every rank",
    "stored_chunks": "Chunks copied to the daemon, counted by every rank",
    "stored_bytes": "Bytes copied to the daemon",
    "store_seconds": "Time that stores took, seconds",
    "store_failures": "Chunks that could not be copied to the daemon, counted by every rank",
    "committed_chunks": "Chunks that the daemon has accepted",
    "dropped_chunks": "Chunks that were not stored: no room, no answer in time, or their blocks were needed",
}


@dataclass
class KvdStats(KVConnectorStats):
    """Sums of one interval, name to number."""

    data: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """Forgets all."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KvdStats:
        """Adds another rank's, or another interval's, numbers to these."""
        for name, number in other.data.items():
            self.data[name] = self.data.get(name, 0) + number
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the log line."""
        return {name: round(number, 3) for name, number in self.data.items()}

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not self.data


class Tally:
    """Counts on any thread, hands the sums over now and then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, int | float] = {}

    def add(self, **numbers: float) -> None:
        """Adds to the counters named."""
        with self._lock:
            for name, number in numbers.items():
                if number:
                    self._sums[name] = self._sums.get(name, 0) + number

    def loaded(self, chunks: int, chunk_bytes: int, seconds: float) -> None:
        """A load is over; ``chunks`` of it arrived, ``chunk_bytes`` bytes each."""
        self.add(loaded_chunks=chunks, loaded_bytes=chunks * chunk_bytes, load_seconds=seconds)

    def stored(self, chunks: int, chunk_bytes: int, seconds: float) -> None:
        """A store is over; ``chunks`` of it were copied, ``chunk_bytes`` bytes each."""
        self.add(stored_chunks=chunks, stored_bytes=chunks * chunk_bytes, store_seconds=seconds)

    def take(self) -> KvdStats | None:
        """What has been counted since the last time."""
        with self._lock:
            sums, self._sums = self._sums, {}
        return KvdStats(data=sums) if sums else None


class KvdPromMetrics(KVConnectorPromMetrics):
    """The counters on the engine's /metrics, as ``vllm:kvd_...``."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {}
        for name, text in COUNTERS.items():
            counter = self._counter_cls(name=f"vllm:kvd_{name}", documentation=f"kvd: {text}.", labelnames=labelnames)
            self._counters[name] = {
                engine: counter.labels(*values) for engine, values in per_engine_labelvalues.items()
            }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds one interval's sums."""
        for name, number in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name][engine_idx].inc(number)
