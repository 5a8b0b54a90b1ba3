"""The state of the daemon, read from the books: for Stats, and for the gauges of /metrics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from kvd import convert
from kvd.ledger.terms import NamespaceFigures, TenantFigures
from kvd.memory.segment import Segment
from kvd.memory.slabs import NodeFigures
from kvd.metrics import Figures
from kvd.session import Sessions
from kvd.store import ChunkStore
from kvd.types import DriveFigures, Recovery
from kvd.wire.pb import kvd_pb2 as pb
from kvd.wire.version import VERSION


class Report:
    """Snapshots of everything. Lives on the event loop."""

    def __init__(
        self,
        store: ChunkStore,
        sessions: Sessions,
        segment: Segment,
        daemon_id: int,
        endpoints: Sequence[str],
        *,
        recovery: Recovery,
        nodes: Callable[[], Sequence[NodeFigures]] = tuple,
        drives: Callable[[], Sequence[DriveFigures]] | None = None,
        daily_bytes: int = 0,
        written_today_bytes: Callable[[], int] = int,
        trace: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        """``nodes``: what lies on which of several memory nodes; ``drives``: None = there is no disk tier;
        ``daily_bytes``: what may be written to it in a day, 0 = no limit; ``trace``: what the recorder did with
        requests."""
        self._store = store
        self._sessions = sessions
        self._segment = segment
        self._daemon_id = daemon_id
        self._endpoints = endpoints
        self._recovery = recovery
        self._nodes = nodes
        self._drives = drives
        self._daily_bytes = daily_bytes
        self._written_today_bytes = written_today_bytes
        self._trace = trace
        self._started_at = time.monotonic()

    def stats(self) -> pb.StatsResponse:
        """The answer to Stats."""
        books = self._store.stats()
        return pb.StatsResponse(
            version=VERSION,
            daemon_id=self._daemon_id,
            uptime_s=time.monotonic() - self._started_at,
            state="draining" if self._sessions.draining else "serving",
            pool=convert.pool_stats(
                books.pool, self._segment.describe(), self._segment.populated_bytes, self._recovery, self._nodes()
            ),
            tenants=[convert.tenant_stats(tenant) for tenant in books.tenants],
            namespaces=[convert.namespace_stats(namespace) for namespace in books.namespaces],
            sessions=[
                pb.SessionStats(
                    client=s.client,
                    peer=s.peer,
                    tenant=s.tenant,
                    path=s.path,
                    age_s=time.monotonic() - s.opened_at,
                    read_leases=books.sessions[s.id].read_leases if s.id in books.sessions else 0,
                    write_leases=books.sessions[s.id].write_leases if s.id in books.sessions else 0,
                    members=len(s.lifelines),
                    numa_node=s.numa_node,
                )
                for s in self._sessions.all()
            ],
            counters=dict(books.counters),
            endpoints=self._endpoints,
            disk=None
            if self._drives is None
            else convert.disk_stats(books.disk, self._drives(), self._daily_bytes, self._written_today_bytes()),
        )

    def figures(self) -> Figures:
        """The numbers of /metrics that are read rather than counted."""
        books = self._store.stats()
        pool = books.pool
        nodes = self._nodes()
        sharers = _sharers(books.tenants, books.namespaces)
        return Figures(
            pool_bytes=pool.bytes,
            populated_bytes=self._segment.populated_bytes,
            locked=self._segment.locked,
            pool_states={
                "free": pool.free_bytes,
                "ready": pool.ready_bytes,
                "writing": pool.writing_bytes,
                "quarantined": pool.quarantined_bytes,
                "idle_slots": pool.idle_slot_bytes,
            },
            node_bytes={str(found.node): found.bytes for found in nodes},
            node_used={str(found.node): found.used_bytes for found in nodes},
            tenant_bytes={t.tenant: t.bytes for t in books.tenants},
            tenant_chunks={t.tenant: t.chunks for t in books.tenants},
            namespaces=len(books.namespaces),
            sessions={"shm": 0, "tcp": 0} | Counter(s.path for s in self._sessions.all()),
            lifelines=self._sessions.lifelines,
            read_leases=sum(s.read_leases for s in books.sessions.values()),
            writing_chunks=sum(s.write_leases for s in books.sessions.values()),
            uptime_s=time.monotonic() - self._started_at,
            draining=self._sessions.draining,
            counters=books.counters,
            recovery=self._recovery,
            unverified_chunks=pool.unverified_chunks,
            tenant_pinned={t.tenant: t.pinned_chunks for t in books.tenants},
            share_used={name: held.bytes for name, held in sharers.items()},
            share_limits={
                (name, bound): limit
                for name, held in sharers.items()
                for bound, limit in (("soft", held.soft_bytes), ("hard", held.hard_bytes))
                if limit is not None
            },
            drives=[] if self._drives is None else self._drives(),
            queue_chunks=books.disk.queue_chunks,
            queue_bytes=books.disk.queue_bytes,
            promoting_chunks=books.disk.promoting_chunks,
            trace=self._trace(),
        )


def _sharers(
    tenants: Sequence[TenantFigures], namespaces: Sequence[NamespaceFigures]
) -> dict[str, TenantFigures | NamespaceFigures]:
    """Who has a share of the pool, by the name that it has in metrics."""
    everybody: dict[str, TenantFigures | NamespaceFigures] = {f"tenant:{t.tenant}": t for t in tenants}
    everybody |= {f"namespace:{n.namespace_id.hex()}": n for n in namespaces}
    return {name: it for name, it in everybody.items() if not (it.soft_bytes is None and it.hard_bytes is None)}
