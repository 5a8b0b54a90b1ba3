"""Every metric of the daemon, declared once. Names carry units; labels are few and bounded.

What happens (requests, bytes moved) is counted here as it happens. What *is* (pool, leases, sessions) and what the
books count themselves is read from them when somebody asks, so that the two can never disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvd.types import DriveFigures, Recovery

# When each series was first seen is of no use to anybody and doubles the page.
disable_created_metrics()  # type: ignore[no-untyped-call]

_PROMOTE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_FAST_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True)
class Figures:
    """A snapshot of everything that is read rather than counted. Sizes in bytes.

    ``counters`` are the store's totals by name; ``pool_states`` and ``tenant_bytes`` are bytes by label, and so are
    ``node_bytes`` and ``node_used``, empty where the pool lies on one memory node. Shares are named ``tenant:NAME`` or
    ``namespace:ID``; ``share_limits`` has the bound (soft or hard) beside the name. ``trace`` are requests
    by what the recorder did with them, empty without one.
    """

    pool_bytes: int
    populated_bytes: int
    locked: bool
    pool_states: Mapping[str, int]
    node_bytes: Mapping[str, int]
    node_used: Mapping[str, int]
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
    recovery: Recovery
    unverified_chunks: int
    tenant_pinned: Mapping[str, int]
    share_used: Mapping[str, int]
    share_limits: Mapping[tuple[str, str], int]
    drives: Sequence[DriveFigures]
    queue_chunks: int
    queue_bytes: int
    promoting_chunks: int
    trace: Mapping[str, int]


_HITS = (("hit_chunks", {"tier": "host"}), ("disk_hit_chunks", {"tier": "disk"}))

#: Totals of the store: metric, help, name in ``Figures.counters``, labels.
_TOTALS: tuple[tuple[str, str, tuple[tuple[str, dict[str, str]], ...]], ...] = (
    ("kvd_lookup_asked_chunks", "Chunks that lookups asked for", (("asked_chunks", {}),)),
    ("kvd_lookup_hit_chunks", "Chunks that lookups found, by tier", _HITS),
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
    ("kvd_promoted_chunks", "Chunks read from disk into the pool", (("promoted_chunks", {}),)),
    (
        "kvd_promote_failures",
        "Chunks on disk that did not come into the pool",
        (("promote_failures", {"reason": "drive"}), ("unpromoted_no_room", {"reason": "no_room"})),
    ),
    ("kvd_corrupt_chunks", "Chunks found not to be what was stored; they are misses", (("corrupt_chunks", {}),)),
    ("kvd_spill_written_chunks", "Stored chunks that were written to disk", (("spilled_chunks", {}),)),
    ("kvd_spill_written_bytes", "Size of their records", (("spilled_bytes", {}),)),
    (
        "kvd_spill_skipped_chunks",
        "Stored chunks that were not written to disk",
        tuple(
            (f"unspilled_{reason}", {"reason": reason})
            for reason in ("budget", "backlog", "admission", "large", "degraded", "share")
        ),
    ),
    ("kvd_spill_dropped_records", "Records that gave way to others", (("dropped_records", {}),)),
    ("kvd_reclaim_moved_bytes", "Records moved out of extents that were reclaimed", (("moved_bytes", {}),)),
    (
        "kvd_recovery_condemned_chunks",
        "Chunks taken over that went again: they, or what they hang on, were not what was stored",
        (("condemned_chunks", {}),),
    ),
    ("kvd_unpinned_chunks", "Chunks that a pin covers and that were not pinned", (("unpinned_chunks", {}),)),
    (
        "kvd_expired_chunks",
        "Chunks in the pool, and records on disk, that nobody had used for ttl",
        (("expired_chunks", {"tier": "host"}), ("expired_records", {"tier": "disk"})),
    ),
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
        self._answered: dict[tuple[str, str], tuple[Counter, Histogram]] = {}
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
            "kvd_event_loop_lag_seconds", "How late the event loop runs", buckets=_LAG_S, registry=self.registry
        )
        self._promote_seconds = Histogram(
            "kvd_promote_seconds",
            "Time from the lookup that found a chunk on disk until the chunk was there",
            buckets=_PROMOTE_S,
            registry=self.registry,
        )
        self._audits = Counter("kvd_audits", "Audits of the books", registry=self.registry)
        self._audit_findings = Counter("kvd_audit_findings", "What audits found wrong", registry=self.registry)
        ProcessCollector(registry=self.registry)

    def watch(self, figures: Callable[[], Figures], version: str) -> None:
        """Reads gauges from ``figures`` from now on; it is called on the thread that renders."""
        self.registry.register(_Books(figures, version))

    def answered(self, method: str, code: str, seconds: float) -> None:
        """A request was answered."""
        answered = self._answered.get((method, code))
        if answered is None:  # to find them by their labels takes longer than to count
            answered = self._requests.labels(method, code), self._request_seconds.labels(method)
            self._answered[method, code] = answered
        requests, request_seconds = answered
        requests.inc()
        request_seconds.observe(seconds)

    def moved(self, op: str, moved_bytes: int, seconds: float) -> None:
        """The TCP data plane has served a ``read`` or a ``write``."""
        direction = "in" if op == "write" else "out"
        self._moved_bytes.labels("tcp", direction).inc(moved_bytes)
        self._moving_seconds.labels("tcp", direction).inc(max(seconds, 0.0))

    def committed_in_place(self, committed_bytes: int) -> None:
        """A session has stored chunks over shared memory."""
        self._moved_bytes.labels("shm", "in").inc(committed_bytes)

    def promoted(self, seconds: float) -> None:
        """A chunk has come from disk, this long after a lookup had found it there."""
        self._promote_seconds.observe(max(seconds, 0.0))

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
        yield _gauges("kvd_pool_node_bytes", "Pool memory on a memory node, of several", "node", now.node_bytes)
        yield _gauges("kvd_pool_node_used_bytes", "Slots in use on a memory node", "node", now.node_used)
        yield _gauges("kvd_tenant_bytes", "Pool memory held by a tenant", "tenant", now.tenant_bytes)
        yield _gauges("kvd_tenant_chunks", "Stored chunks of a tenant", "tenant", now.tenant_chunks)
        yield _gauge("kvd_namespaces", "Namespaces that are known", now.namespaces)
        yield _gauges("kvd_sessions", "Connected sessions by the way their bytes go", "path", now.sessions)
        yield _gauge("kvd_lifelines", "Processes that map the pool", now.lifelines)
        yield _gauge("kvd_read_leases", "Read leases held", now.read_leases)
        yield _gauge("kvd_writing_chunks", "Chunks that sessions are writing", now.writing_chunks)
        yield _gauges("kvd_pinned_chunks", "Stored chunks of a tenant that pins cover", "tenant", now.tenant_pinned)
        yield _gauges("kvd_share_used_bytes", "Pool memory held by who has a share of it", "share", now.share_used)
        limits = GaugeMetricFamily("kvd_share_limit_bytes", "The bounds of a share", labels=["share", "bound"])
        for (share, bound), limit in now.share_limits.items():
            limits.add_metric([share, bound], limit)
        yield limits
        yield from _recovery(now)
        yield from _disk(now)
        for name, help_text, samples in _TOTALS:
            family = CounterMetricFamily(name, help_text, labels=list(samples[0][1]))
            for counter, labels in samples:
                family.add_metric(list(labels.values()), now.counters[counter])
            yield family
        yield _totals("kvd_trace_requests", "Requests by what the recorder did with them", "outcome", now.trace)


def _recovery(now: Figures) -> Iterator[Metric]:
    """What the start made of the pool of the daemon before."""
    found = now.recovery
    yield _gauge("kvd_recovery_warm", "1 if chunks of the daemon before were taken over", found.warm)
    yield _gauge("kvd_recovery_chunks", "Chunks of the daemon before that were taken over", found.chunks)
    yield _gauges("kvd_recovery_skipped_slots", "Slots of the daemon before that were not", "reason", found.skipped)
    yield _gauge("kvd_recovery_seconds", "How long that took", found.seconds)
    yield _gauge("kvd_unverified_chunks", "Chunks taken over that are still to be checked", now.unverified_chunks)


def _disk(now: Figures) -> Iterator[Metric]:
    """The drives, and what is on its way to them and back."""
    yield _gauge("kvd_spill_queue_chunks", "Chunks that wait to be written to disk", now.queue_chunks)
    yield _gauge("kvd_spill_queue_bytes", "Size of these chunks", now.queue_bytes)
    yield _gauge("kvd_promoting_chunks", "Chunks that are being read from disk", now.promoting_chunks)
    drives = {drive.directory: drive for drive in now.drives}

    def each(figure: Callable[[DriveFigures], int]) -> dict[str, int]:
        return {directory: figure(drive) for directory, drive in drives.items()}

    yield _gauges("kvd_spill_drive_up", "0 if the drive is degraded", "drive", each(lambda d: not d.reason))
    states = GaugeMetricFamily(
        "kvd_spill_bytes", "Space of a drive by use; adds up to its part", labels=["drive", "state"]
    )
    for directory, drive in drives.items():
        for state in ("live", "dead", "free"):
            states.add_metric([directory, state], getattr(drive, f"{state}_bytes"))
    yield states
    yield _gauges("kvd_spill_records", "Records on a drive that can be found", "drive", each(lambda d: d.records))
    unscanned = each(lambda d: d.found_extents - d.scanned_extents)
    yield _gauges("kvd_spill_unscanned_extents", "Extents that the scan of the start has not seen", "drive", unscanned)
    yield _gauges("kvd_spill_drive_queue", "Orders that wait for a drive", "drive", each(lambda d: d.queue))
    read, written = each(lambda d: d.read_bytes), each(lambda d: d.written_bytes)
    yield _totals("kvd_spill_drive_read_bytes", "All that was read from a drive", "drive", read)
    yield _totals("kvd_spill_drive_written_bytes", "All that was written to a drive", "drive", written)


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value=float(value))


def _totals(name: str, help_text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, help_text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _gauges(name: str, help_text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, help_text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
