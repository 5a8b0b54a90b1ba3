"""The audit: every book is counted again from the others. Each function returns what does not agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise

from kvd.ledger.audit_disks import audit_disks
from kvd.ledger.audit_tree import audit_tree
from kvd.ledger.books import SEGMENT, Books
from kvd.ledger.chunk import Chunk, Home, Leaving
from kvd.ledger.index import Space
from kvd.ledger.leases import ReadLeases, SessionBook
from kvd.ledger.terms import ReadableGenerations, ReadablePresence
from kvd.ledger.tiers import Tiers
from kvd.ledger.transfers import Transfers
from kvd.types import ChunkState, SessionId
from kvd.wire.frames import Op

#: A broken book can be wrong about every chunk: this many findings are enough to know.
MAX_FINDINGS = 100


def audit(
    books: Books,
    sessions: Mapping[SessionId, SessionBook],
    reads: ReadLeases,
    transfers: Transfers,
    tiers: Tiers,
) -> list[str]:
    """Findings, at most ``MAX_FINDINGS``; empty = the books agree. Changes nothing. O(chunks + leases)."""
    findings: list[str] = []
    for finding in _findings(books, sessions, reads, transfers, tiers):
        findings.append(finding)
        if len(findings) >= MAX_FINDINGS:
            break
    return findings


def _findings(
    books: Books,
    sessions: Mapping[SessionId, SessionBook],
    reads: ReadLeases,
    transfers: Transfers,
    tiers: Tiers,
) -> Iterator[str]:
    held: Counter[Chunk] = Counter()
    written: Counter[Chunk] = Counter()
    for transfer in transfers.under_way.values():
        (held if transfer.op is Op.READ else written).update(chunk for chunk in transfer.chunks if chunk is not None)
    yield from _leases(books, sessions, reads, held)
    if books.pins is not None:
        for named in books.pins.named.values():
            held.update(named)
    held.update(tiers.spilling.sealing)
    held.update(tiers.spilling.unsure)
    held.update(tiers.promoting.kept())
    held.update(chunk for chunk in books.by_offset.values() if chunk.to_write)
    for space in books.spaces.values():
        yield from _space(books, space, sessions, held)
    writers = {**sessions, tiers.promoting.session.id: tiers.promoting.session}
    yield from _slots(books, writers, held, written, set(tiers.unproven))
    yield from _policy(books)
    yield from _generations(books)
    yield from _presence(books)
    yield from _totals(books)
    yield from books.slots.audit()
    yield from audit_disks(books, tiers)
    yield from audit_tree(
        "pool",
        books,
        {space: {chunk for chunk in space.chunks.values() if chunk.draft is None} for space in books.spaces.values()},
        {space: space.slots * space.slot_bytes for space in books.spaces.values()},
    )


def _name(chunk: Chunk) -> str:
    return f"chunk {chunk.key.hex()[:16]} at {chunk.location.offset}"


def _leases(
    books: Books, sessions: Mapping[SessionId, SessionBook], reads: ReadLeases, held: Counter[Chunk]
) -> Iterator[str]:
    """Read leases against sessions; adds to ``held`` what they hold. Write leases against the chunks they name."""
    ends = [lease.expires_at for lease in reads]
    if ends != sorted(ends):
        yield "read leases are not in the order in which they end"
    if sum(len(book.reads) for book in sessions.values()) != len(reads):
        yield f"{len(reads)} read leases by time, another number in the sessions"
    for lease in reads:
        held[lease.chunks[-1]] += 1
        if any(child.parent is not parent for parent, child in pairwise(lease.chunks)):
            yield f"read lease {lease.id} is on chunks that are not of one prefix"
        if lease.session.reads.get(lease.id) is not lease or sessions.get(lease.session.id) is not lease.session:
            yield f"read lease {lease.id} is of no session that is open"
        if any(books.by_offset.get(chunk.location.offset) is not chunk for chunk in lease.chunks):
            yield f"read lease {lease.id} is on a slot that is not the chunk's any more"
    for book in sessions.values():
        if book.closed and (book.reads or book.spaces):
            yield f"session {book.id} has ended and still holds read leases or namespaces"
        if book.leased_chunks != sum(len(lease.chunks) for lease in book.reads.values()):
            yield f"session {book.id}: {book.leased_chunks} leased chunks counted, another number in its leases"
        for lease_id, write in book.writes.items():
            if lease_id != write.id or not write.chunks or lease_id in book.reads:
                yield f"session {book.id}: write lease {lease_id} is empty, or its id is another's"
            for key, chunk in write.chunks.items():
                draft = chunk.draft
                if draft is None or draft.lease is not write or draft.session is not book or chunk.key != key:
                    yield f"{_name(chunk)} is under write lease {lease_id} and does not know it"


def _space(
    books: Books, space: Space, sessions: Mapping[SessionId, SessionBook], held: Counter[Chunk]
) -> Iterator[str]:
    """The index of one namespace: tree, states and holds."""
    name = space.namespace.id.hex()[:16]
    if space.sessions != sum(book.spaces.get(space.namespace.id) is space for book in sessions.values()):
        yield f"namespace {name}: {space.sessions} sessions counted, another number has it open"
    if not space.sessions and not space.slots and not space.records:
        yield f"namespace {name} is empty, open in no session, and not forgotten"
    seen = 0
    stack = [chunk for chunk in space.chunks.values() if chunk.parent is None]
    order: list[Chunk] = []
    while stack:
        chunk = stack.pop()
        seen += 1
        order.append(chunk)
        if seen > len(space.chunks):
            break
        previous: Chunk | None = None
        for child in chunk.children():
            if child.parent is not chunk or child.previous_sibling is not previous:
                yield f"{_name(child)} is linked wrongly to its parent or sibling"
            if child.state is ChunkState.READY and chunk.state is not ChunkState.READY:
                yield f"{_name(child)} is READY, its parent is not"
            if child.record is not None and chunk.record is None:
                yield f"{_name(child)} has a record, its parent has none"
            previous = child
            stack.append(child)
    if seen != len(space.chunks):
        yield f"namespace {name}: {seen} chunks can be reached from the roots, {len(space.chunks)} are in the index"
        return
    held_below: Counter[Chunk] = Counter()
    for chunk in reversed(order):
        draft = chunk.draft
        ready = chunk.state in (ChunkState.READY, ChunkState.STALE)
        if (chunk.state is ChunkState.STALE) is not (chunk in books.stale):
            yield f"{_name(chunk)} is {chunk.state.value}, and the books of STALE chunks say otherwise"
        if space.chunks.get(chunk.key) is not chunk or chunk.space is not space:
            yield f"{_name(chunk)} is not in the index of its namespace under its key"
        if books.by_offset.get(chunk.location.offset) is not chunk:
            yield f"{_name(chunk)} is in the index, its slot is not its own"
        if ready is not (draft is None) or (draft is not None and (draft.doomed or draft.leaving is not None)):
            yield f"{_name(chunk)} is {chunk.state.value} and its draft says otherwise"
        elif draft is not None and (chunk.state is ChunkState.WRITING) is (draft.lease is None):
            yield f"{_name(chunk)} is {chunk.state.value} and its write lease says otherwise"
        elif chunk.state is ChunkState.WAITING and (chunk.parent is None or chunk.parent.state is ChunkState.READY):
            yield f"{_name(chunk)} waits for nothing"
        holds = held[chunk] + held_below[chunk] + (not ready)
        if chunk.holds != holds:
            yield f"{_name(chunk)}: {chunk.holds} holds counted, {holds} found"
        if chunk.holds and chunk.parent is not None:
            held_below[chunk.parent] += 1


def _slots(
    books: Books,
    sessions: Mapping[SessionId, SessionBook],
    held: Counter[Chunk],
    written: Counter[Chunk],
    unproven: set[Chunk],
) -> Iterator[str]:
    """Every slot in use is of one chunk, in one place; slabs, sessions and namespaces count the same."""
    quarantined = {chunk for _, chunk in books.quarantine}
    waiting = quarantined | unproven
    ends = [until for until, _ in books.quarantine]
    if ends != sorted(ends) or len(quarantined) != len(ends):
        yield "the quarantine is out of order, or holds a slot twice"
    homes: dict[int, Home] = {}
    counts: Counter[tuple[Space, str]] = Counter()
    writing_bytes: Counter[SessionBook] = Counter()
    for offset, chunk in books.by_offset.items():
        space, draft = chunk.space, chunk.draft
        if chunk.location.offset != offset or chunk.location.segment != SEGMENT:
            yield f"{_name(chunk)} is filed at {offset}"
        slab = books.slots.slab_of(offset)
        home = homes.setdefault(slab, Home(space.slot_bytes))
        home.chunks += 1
        home.held += chunk.holds > 0
        home.heat += chunk.touched
        if books.homes.get(slab) is not chunk.home or home.slot_bytes != space.slot_bytes:
            yield f"{_name(chunk)} does not know its slab"
        if draft is None:
            counts[space, "ready"] += 1
        elif draft.leaving is None:
            counts[space, "writing"] += 1
            writing_bytes[draft.session] += space.slot_bytes
        else:
            counts[space, "leaving"] += 1
        if draft is None or not (draft.doomed or draft.leaving):
            if space.chunks.get(chunk.key) is not chunk:
                yield f"{_name(chunk)} has a slot and is not in the index"
            if chunk in quarantined:
                yield f"{_name(chunk)} is in quarantine and in the index"
        elif chunk.parent is not None or chunk.first_child is not None or chunk.holds != 1 or held[chunk]:
            yield f"{_name(chunk)} is out of the index and still linked or held"
        elif draft.leaving is None and draft.lease is None:
            yield f"{_name(chunk)} is doomed and under no write lease"
        elif draft.leaving is not None and (
            draft.lease is not None
            or (draft.leaving is Leaving.QUARANTINE and not draft.writes) is not (chunk in waiting)
        ):
            yield f"{_name(chunk)} leaves, and neither quarantine nor a transfer keeps it"
        if written[chunk] != (0 if draft is None else draft.writes):
            yield f"{_name(chunk)}: its writes under way are counted wrongly"
    if homes.keys() != books.homes.keys() or any(
        (home.chunks, home.held, home.heat)
        != (books.homes[slab].chunks, books.homes[slab].held, books.homes[slab].heat)
        for slab, home in homes.items()
    ):
        yield "the slabs' counts of chunks, holds or heat are wrong"
    for space in books.spaces.values():
        if (space.ready, space.writing, space.leaving) != tuple(
            counts[space, use] for use in ("ready", "writing", "leaving")
        ):
            yield f"namespace {space.namespace.id.hex()[:16]} counts its slots wrongly"
        if space.slot_bytes != books.slots.slot_bytes(space.namespace.chunk_bytes):
            yield f"namespace {space.namespace.id.hex()[:16]} has slots of the wrong size"
    if any(books.spaces.get(space.namespace.id) is not space for space, _ in counts):
        yield "a chunk is of a namespace that is forgotten"
    for book in sessions.values():
        if book.writing_bytes != writing_bytes[book]:
            yield f"session {book.id}: {book.writing_bytes} bytes in writing counted, {writing_bytes[book]} found"


def _policy(books: Books) -> Iterator[str]:
    """The policy knows exactly what may be evicted: so nothing leased, written or with children is ever a victim."""
    known = 0
    for chunk in books.by_offset.values():
        may = chunk.draft is None and not chunk.holds and chunk.first_child is None
        known += may
        if may is not (chunk in books.policy):
            yield f"{_name(chunk)} {'may' if may else 'may not'} be evicted, the policy says otherwise"
    if known != len(books.policy):
        yield f"{known} chunks may be evicted, the policy knows {len(books.policy)}"


def _generations(books: Books) -> Iterator[str]:
    """Generations are unique; the published table, where it can be read, shows those and no others."""
    generations = {chunk.location.generation for chunk in books.by_offset.values()}
    if len(generations) != len(books.by_offset) or max(generations, default=0) > books.last_generation:
        yield "a generation is used twice, or has not been given out"
    table = books.generations
    if isinstance(table, ReadableGenerations):
        for offset, chunk in books.by_offset.items():
            gone = chunk.draft is not None and chunk.draft.leaving is not None
            word = table.word(SEGMENT, offset)
            if word != (0 if gone else chunk.location.generation):
                yield f"{_name(chunk)}: generation {chunk.location.generation}, published {word}"


def _presence(books: Books) -> Iterator[str]:
    """The published table, where it can be read, has every key that can be found, once, and no others."""
    table, found = books.presence, 0
    if not isinstance(table, ReadablePresence):
        return
    for space in books.spaces.values():
        here = {chunk.key for chunk in space.chunks.values() if chunk.draft is None}
        here.update(record.key for record in space.records.values() if not record.condemned)
        found += len(here)
        for key in here:
            if not table.may_hold(space.namespace.id, key):
                yield f"{key.hex()[:16]} can be found, the presence table says otherwise"
    if len(table) != found:
        yield f"{found} keys can be found, {len(table)} are in the presence table"


def _totals(books: Books) -> Iterator[str]:
    """free + ready + writing + quarantined + idle = total, and no reserved or stored chunk got lost."""
    slots, counters = books.slots, books.counters
    in_books = sum(space.slots * space.slot_bytes for space in books.spaces.values())
    if in_books != slots.taken_bytes or slots.free_bytes + slots.taken_bytes > slots.total_bytes:
        yield f"{in_books} bytes in the books, {slots.taken_bytes} taken and {slots.free_bytes} free in the slabs"
    writing = sum(space.writing for space in books.spaces.values())
    ready = sum(space.ready for space in books.spaces.values())
    ended = counters.stored_chunks + counters.failed_chunks + counters.aborted_chunks + counters.quarantined_chunks
    drafts = [chunk.draft for chunk in books.by_offset.values() if chunk.draft is not None]
    writing -= sum(draft.promoted and draft.leaving is None for draft in drafts)
    if counters.reserved_chunks != ended + writing:
        yield f"{counters.reserved_chunks} chunks were reserved, {ended} have ended, {writing} are being written"
    came = counters.stored_chunks + counters.promoted_chunks + counters.recovered_chunks
    left = counters.evicted_chunks + counters.dropped_chunks + counters.condemned_chunks + counters.expired_chunks
    if came != ready + left:
        yield f"{came} chunks came, {ready} are there, {left} have left"
