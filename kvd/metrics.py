"""Every metric of the daemon, declared once. Names carry units; labels are few and bounded.

What happens (requests, bytes moved) is counted here as it happens. What *is* (pool, leases, sessions) and what the
books count themselves is read from them when somebody asks, so that the two can never disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

# When each series was first seen is of no use to anybody and doubles the page.
disable_created_metrics()  # type: ignore[no-untyped-call]

_FAST_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True)
class Figures:
    """A snapshot of everything that is read rather than counted. Sizes in bytes.

    ``counters`` are the store's totals by name; ``pool_states`` and ``tenant_bytes`` are bytes by label.
    """

    pool_bytes: int
    populated_bytes: int
    locked: bool
    pool_states: Mapping[str, int]
    tenant_bytes: Mapping[str, int]
    tenant_chunks: Mapping[str, int]
    namespaces: int
    sessions: Mapping[str, int]
    lifelines: int
    read_leases: int
    writing_chunks: int
    uptime_s: float
    draining: bool
    counters: Mapping[str, int]


#: Totals of the store: metric, help, name in ``Figures.counters``, labels.
_TOTALS: tuple[tuple[str, str, tuple[tuple[str, dict[str, str]], ...]], ...] = (
    ("kvd_lookup_asked_chunks", "Chunks that lookups asked for", (("asked_chunks", {}),)),
    ("kvd_lookup_hit_chunks", "Chunks that lookups found, by tier", (("hit_chunks", {"tier": "host"}),)),
    ("kvd_lookup_miss_chunks", "Chunks that lookups did not find", (("miss_chunks", {}),)),
    (
        "kvd_reserve_chunks",
        "Answers to the chunks of Reserve",
        (
            ("reserved_chunks", {"outcome": "granted"}),
            ("present_chunks", {"outcome": "present"}),
            ("busy_chunks", {"outcome": "busy"}),
            ("no_room_chunks", {"outcome": "no_room"}),
            ("no_parent_chunks", {"outcome": "no_parent"}),
        ),
    ),
    (
        "kvd_write_chunks",
        "What became of the chunks that were granted",
        (
            ("stored_chunks", {"outcome": "stored"}),
            ("failed_chunks", {"outcome": "failed"}),
            ("aborted_chunks", {"outcome": "aborted"}),
            ("quarantined_chunks", {"outcome": "quarantined"}),
        ),
    ),
    ("kvd_evicted_chunks", "Stored chunks that gave way to others", (("evicted_chunks", {}),)),
    ("kvd_dropped_chunks", "Stored chunks that somebody asked to drop", (("dropped_chunks", {}),)),
    ("kvd_expired_leases", "Read leases that ended by time", (("expired_leases", {}),)),
    ("kvd_checksum_failures", "Chunk ranges whose bytes were not those that were sent", (("checksum_failures", {}),)),
)


class Metrics:
    """The daemon's metrics and their registry. Counting is safe from any thread; rendering belongs to the loop."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "kvd_requests", "Requests answered, by method and gRPC status", ["method", "code"], registry=self.registry
        )
        self._request_seconds = Histogram(
            "kvd_request_seconds", "Time to answer a request", ["method"], buckets=_FAST_S, registry=self.registry
        )
        self._moved_bytes = Counter(
            "kvd_transfer_bytes",
            "Payload moved into the pool (in) and out of it (out); over shared memory only what was committed is known",
            ["path", "direction"],
            registry=self.registry,
        )
        self._moving_seconds = Counter(
            "kvd_transfer_seconds",
            "Time spent in transfers, all connections added up",
            ["path", "direction"],
            registry=self.registry,
        )
        self._loop_lag = Histogram(
            "kvd_event_loop_lag_seconds", "How late the event loop runs", buckets=_FAST_S, registry=self.registry
        )
        self._audits = Counter("kvd_audits", "Audits of the books", registry=self.registry)
        self._audit_findings = Counter("kvd_audit_findings", "What audits found wrong", registry=self.registry)
        ProcessCollector(registry=self.registry)

    def watch(self, figures: Callable[[], Figures], version: str) -> None:
        """Reads gauges from ``figures`` from now on; it is called on the thread that renders."""
        self.registry.register(_Books(figures, version))

    def answered(self, method: str, code: str, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(method, code).inc()
        self._request_seconds.labels(method).observe(seconds)

    def moved(self, op: str, moved_bytes: int, seconds: float) -> None:
        """The TCP data plane has served a ``read`` or a ``write``."""
        direction = "in" if op == "write" else "out"
        self._moved_bytes.labels("tcp", direction).inc(moved_bytes)
        self._moving_seconds.labels("tcp", direction).inc(max(seconds, 0.0))

    def committed_in_place(self, committed_bytes: int) -> None:
        """A session has stored chunks over shared memory."""
        self._moved_bytes.labels("shm", "in").inc(committed_bytes)

    def loop_lag(self, seconds: float) -> None:
        """The loop's timer came this late."""
        self._loop_lag.observe(max(seconds, 0.0))

    def audited(self, findings: int) -> None:
        """An audit has been made."""
        self._audits.inc()
        self._audit_findings.inc(findings)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition in the form that fits an Accept header, and its content type."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type


class _Books(Collector):
    def __init__(self, figures: Callable[[], Figures], version: str) -> None:
        self._figures = figures
        self._version = version

    def describe(self) -> list[Metric]:
        """Nothing: so that registering does not read the books."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every gauge and total, from one snapshot."""
        now = self._figures()
        yield InfoMetricFamily("kvd_build", "The release", value={"version": self._version})
        yield _gauge("kvd_uptime_seconds", "Time since the start", now.uptime_s)
        yield _gauge("kvd_draining", "1 while the daemon is stopping", now.draining)
        yield _gauge("kvd_pool_capacity_bytes", "Size of the pool", now.pool_bytes)
        yield _gauge("kvd_pool_populated_bytes", "Pool memory taken from the system so far", now.populated_bytes)
        yield _gauge("kvd_pool_locked", "1 if the pool cannot be swapped out", now.locked)
        yield _gauges("kvd_pool_bytes", "Pool memory by use; adds up to its size", "state", now.pool_states)
        yield _gauges("kvd_tenant_bytes", "Pool memory held by a tenant", "tenant", now.tenant_bytes)
        yield _gauges("kvd_tenant_chunks", "Stored chunks of a tenant", "tenant", now.tenant_chunks)
        yield _gauge("kvd_namespaces", "Namespaces that are known", now.namespaces)
        yield _gauges("kvd_sessions", "Connected sessions by the way their bytes go", "path", now.sessions)
        yield _gauge("kvd_lifelines", "Processes that map the pool", now.lifelines)
        yield _gauge("kvd_read_leases", "Read leases held", now.read_leases)
        yield _gauge("kvd_writing_chunks", "Chunks that sessions are writing", now.writing_chunks)
        for name, help_text, samples in _TOTALS:
            family = CounterMetricFamily(name, help_text, labels=list(samples[0][1]))
            for counter, labels in samples:
                family.add_metric(list(labels.values()), now.counters[counter])
            yield family


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value=float(value))


def _gauges(name: str, help_text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, help_text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
