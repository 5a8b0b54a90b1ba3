"""The books in figures: what `stats` reports. Read from the books, never counted beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from kvd.ledger.books import Books
from kvd.ledger.leases import SessionBook
from kvd.ledger.terms import NamespaceFigures, PoolFigures, SessionFigures, StoreStats, TenantFigures


def figures(books: Books, sessions: Iterable[SessionBook]) -> StoreStats:
    """A snapshot. O(namespaces + sessions + leases), whatever the number of chunks."""
    ready = writing = leaving = 0
    chunks: dict[str, int] = {}
    size: dict[str, int] = {}
    connected: dict[str, int] = {}
    namespaces = []
    for space in books.spaces.values():
        ready += space.ready * space.slot_bytes
        writing += space.writing * space.slot_bytes
        leaving += space.leaving * space.slot_bytes
        held_bytes = space.slots * space.slot_bytes
        named = space.namespace
        chunks[named.tenant] = chunks.get(named.tenant, 0) + space.ready
        size[named.tenant] = size.get(named.tenant, 0) + held_bytes
        namespaces.append(
            NamespaceFigures(named.id, named.tenant, named.identity.model, named.chunk_bytes, space.ready, held_bytes)
        )
    holders = {}
    for book in sessions:
        connected[book.tenant] = connected.get(book.tenant, 0) + (not book.closed)
        holders[book.id] = SessionFigures(
            book.id,
            book.tenant,
            len(book.reads),
            sum(len(lease.chunks) for lease in book.writes.values()),
            book.writing_bytes,
        )
    slots = books.slots
    return StoreStats(
        pool=PoolFigures(
            bytes=slots.total_bytes,
            free_bytes=slots.free_bytes,
            ready_bytes=ready,
            writing_bytes=writing,
            quarantined_bytes=leaving,
            idle_slot_bytes=slots.total_bytes - slots.free_bytes - slots.taken_bytes,
        ),
        tenants=tuple(
            TenantFigures(tenant, chunks.get(tenant, 0), size.get(tenant, 0), connected.get(tenant, 0))
            for tenant in sorted({*size, *connected})
        ),
        namespaces=tuple(namespaces),
        sessions=holders,
        counters=asdict(books.counters),
    )
