"""The state of the daemon, read from the books: for Stats, and for the gauges of /metrics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from kvd.memory.segment import Segment
from kvd.metrics import Figures
from kvd.session import Sessions
from kvd.store import ChunkStore
from kvd.wire.pb import kvd_pb2 as pb
from kvd.wire.version import VERSION


class Report:
    """Snapshots of everything. Lives on the event loop."""

    def __init__(
        self, store: ChunkStore, sessions: Sessions, segment: Segment, daemon_id: int, endpoints: Sequence[str]
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._segment = segment
        self._daemon_id = daemon_id
        self._endpoints = endpoints
        self._started_at = time.monotonic()

    def stats(self) -> pb.StatsResponse:
        """The answer to Stats."""
        books = self._store.stats()
        pool = books.pool
        return pb.StatsResponse(
            version=VERSION,
            daemon_id=self._daemon_id,
            uptime_s=time.monotonic() - self._started_at,
            state="draining" if self._sessions.draining else "serving",
            pool=pb.PoolStats(
                bytes=pool.bytes,
                free_bytes=pool.free_bytes,
                ready_bytes=pool.ready_bytes,
                writing_bytes=pool.writing_bytes,
                quarantined_bytes=pool.quarantined_bytes,
                idle_slot_bytes=pool.idle_slot_bytes,
                backing=self._segment.describe(),
                populated_bytes=self._segment.populated_bytes,
            ),
            tenants=[
                pb.TenantStats(tenant=t.tenant, chunks=t.chunks, bytes=t.bytes, sessions=t.sessions)
                for t in books.tenants
            ],
            namespaces=[
                pb.NamespaceStats(
                    namespace_id=n.namespace_id,
                    tenant=n.tenant,
                    model=n.model,
                    chunk_bytes=n.chunk_bytes,
                    chunks=n.chunks,
                    bytes=n.bytes,
                )
                for n in books.namespaces
            ],
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
                )
                for s in self._sessions.all()
            ],
            counters=dict(books.counters),
            endpoints=self._endpoints,
        )

    def figures(self) -> Figures:
        """The numbers of /metrics that are read rather than counted."""
        books = self._store.stats()
        pool = books.pool
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
        )
