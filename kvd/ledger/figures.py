"""The books in figures: what `stats` reports. Read from the books, never counted beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

from kvd.ledger.books import Books
from kvd.ledger.chunk import Chunk
from kvd.ledger.leases import SessionBook
from kvd.ledger.shares import Account
from kvd.ledger.terms import NamespaceFigures, PoolFigures, SessionFigures, StoreStats, TenantFigures
from kvd.ledger.tiers import Tiers


def figures(books: Books, sessions: Iterable[SessionBook], tiers: Tiers) -> StoreStats:
    """A snapshot. O(namespaces + sessions + leases), whatever the number of chunks."""
    ready = writing = leaving = 0
    chunks: Counter[str] = Counter()
    size: Counter[str] = Counter()
    on_disk: Counter[str] = Counter()
    disk_size: Counter[str] = Counter()
    connected: dict[str, int] = {}
    pinned: Counter[str] = Counter()
    shares = books.shares
    namespaces = []
    for space in books.spaces.values():
        ready += space.ready * space.slot_bytes
        writing += space.writing * space.slot_bytes
        leaving += space.leaving * space.slot_bytes
        held_bytes = space.slots * space.slot_bytes
        named = space.namespace
        chunks[named.tenant] += space.ready
        size[named.tenant] += held_bytes
        on_disk[named.tenant] += len(space.records)
        disk_size[named.tenant] += space.record_bytes
        pinned[named.tenant] += 0 if books.pins is None else books.pins.counts[space]
        namespaces.append(
            NamespaceFigures(
                named.id,
                named.tenant,
                named.identity.model,
                named.chunk_bytes,
                space.ready,
                held_bytes,
                len(space.records),
                space.record_bytes,
                0 if books.pins is None else books.pins.counts[space],
                *_bounds(None if shares is None else shares.namespaces.get(named.id)),
            )
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
            unverified_chunks=len(books.stale),
        ),
        tenants=tuple(
            TenantFigures(
                tenant,
                chunks[tenant],
                size[tenant],
                connected.get(tenant, 0),
                on_disk[tenant],
                disk_size[tenant],
                pinned[tenant],
                *_bounds(None if shares is None else shares.tenants.get(tenant)),
            )
            for tenant in sorted({*size, *connected})
        ),
        namespaces=tuple(namespaces),
        sessions=holders,
        counters=asdict(books.counters),
        disk=tiers.figures(),
    )


def _bounds(account: Account[Chunk] | None) -> tuple[int | None, int | None]:
    """Soft and hard bytes of a share of the pool."""
    share = None if account is None else account.share
    return (None, None) if share is None else (share.soft_bytes, share.hard_bytes)
