"""What a former daemon left: slots of the pool's table, and records that a scan has found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from kvd.ledger.books import SEGMENT, Books
from kvd.ledger.chunk import Chunk, Draft, Home, Leaving
from kvd.ledger.coverage import Grid
from kvd.ledger.index import Space
from kvd.ledger.leases import SessionBook
from kvd.ledger.records import Record, Records
from kvd.types import ROOT, ChunkState, Found, Location, Namespace, SlotEntry
from kvd.wire.errors import InvalidRequest
from kvd.wire.identity import Identity

#: Stamps beyond this are not believed. A pool that is used a million times a second gets there in nine years.
_MAX_STAMP = 1 << 48


def space_of(books: Books, namespaces: Mapping[bytes, Namespace], namespace_id: bytes) -> Space | None:
    """The books of a namespace that was described, opened if need be; None when it was not, or makes no sense."""
    space = books.spaces.get(namespace_id)
    namespace = namespaces.get(namespace_id)
    if space is None and namespace is not None:
        try:
            grid = Grid(namespace.identity.num_layers, namespace.identity.num_kv_heads)
        except InvalidRequest:
            return None
        space = books.open_space(namespace, grid)
    return space


class PoolRestorer:
    """Puts the slots of a former daemon into the books of one that has none yet."""

    def __init__(self, books: Books, namespaces: Mapping[bytes, Namespace]) -> None:
        self._books = books
        self._namespaces = namespaces
        #: Owns what nobody may touch until its writers are proven gone.
        self._nobody = SessionBook(-1, "")
        #: Slots that somebody may still be writing, by the id of the daemon that granted them.
        self.unproven: list[tuple[int, Chunk]] = []
        self.skipped = 0

    def restore(self, entries: Sequence[SlotEntry]) -> list[Chunk]:
        """Take over what is sound; the STALE chunks, the last used first. What is not taken over is free."""
        books = self._books
        for entry in entries:
            if not entry.ready:
                self._hold_back(entry)
        ready = [entry for entry in entries if entry.ready]
        by_key = {(entry.namespace_id, entry.key): entry for entry in ready}
        chunks = [chunk for entry in _parents_first(by_key) if (chunk := self._restore(entry)) is not None]
        taken = {chunk.location.offset for chunk in chunks}
        for entry in ready:
            if entry.offset not in taken:
                self.skipped += 1
                books.generations.retract(Location(SEGMENT, entry.offset, entry.generation))
                books.journal.freed(entry.offset)
        for space in list(books.spaces.values()):
            books.forget_if_empty(space)  # opened for what turned out not to be sound
        chunks.sort(key=lambda chunk: chunk.touched)
        for chunk in chunks:
            # No two stamps may be equal, and what a damaged table says of them must not run away with the clock.
            stamp = chunk.touched if books.last_stamp < chunk.touched < _MAX_STAMP else books.last_stamp + 1
            chunk.home.heat += stamp - chunk.touched
            chunk.touched = books.last_stamp = stamp
            books.policy.enter(chunk)
            if chunk.first_child is None:
                books.policy.add(chunk)
            if books.pins is not None:
                books.pins.entered(chunk)
        books.counters.recovered_chunks += len(chunks)
        return chunks[::-1]

    def _restore(self, entry: SlotEntry) -> Chunk | None:
        books = self._books
        space = space_of(books, self._namespaces, entry.namespace_id)
        if space is None or space.namespace.chunk_bytes != entry.chunk_bytes or entry.key in space.chunks:
            return None
        parent = None if entry.parent == ROOT else space.chunks.get(entry.parent)
        if (parent is None and entry.parent != ROOT) or not self._claim(entry.offset, space.slot_bytes):
            return None
        home = books.homes.setdefault(books.slots.slab_of(entry.offset), Home(space.slot_bytes))
        location = Location(SEGMENT, entry.offset, entry.generation)
        chunk = Chunk(entry.key, space, entry.touched, location, home, None, uses=entry.uses, state=ChunkState.STALE)
        chunk.checksum = entry.checksum
        home.chunks += 1
        home.heat += chunk.touched
        space.chunks[chunk.key] = books.by_offset[entry.offset] = chunk
        space.ready += 1
        books.charge(space, space.slot_bytes)
        if parent is not None:
            parent.adopt(chunk)
        books.stale[chunk] = False
        books.last_generation = max(books.last_generation, entry.generation)
        books.generations.publish(location)
        books.presence.add(space.namespace.id, chunk.key)
        return chunk

    def _hold_back(self, entry: SlotEntry) -> None:
        """A slot that was being written: nobody's, until its writers are proven gone."""
        books = self._books
        books.last_generation = max(books.last_generation, entry.generation)
        slot_bytes = books.slots.slot_bytes(entry.chunk_bytes)
        if not self._claim(entry.offset, slot_bytes):
            return
        space = space_of(books, self._namespaces, entry.namespace_id)
        if space is None or space.slot_bytes != slot_bytes:
            unknown = Namespace(entry.namespace_id, "", Identity("", ""), entry.chunk_bytes)
            space = Space(unknown, slot_bytes, Grid(1, 1))
        home = books.homes.setdefault(books.slots.slab_of(entry.offset), Home(slot_bytes))
        draft = Draft(self._nobody, None, leaving=Leaving.QUARANTINE)
        location = Location(SEGMENT, entry.offset, entry.generation)
        chunk = Chunk(entry.key, space, 0, location, home, draft, holds=1)
        home.chunks += 1
        home.held += 1
        space.leaving += 1
        books.charge(space, space.slot_bytes)
        books.by_offset[entry.offset] = chunk
        self.unproven.append((entry.life, chunk))

    def _claim(self, offset: int, slot_bytes: int) -> bool:
        try:
            self._books.slots.claim(offset, slot_bytes)
        except ValueError:
            return False
        return True


def _parents_first(by_key: Mapping[tuple[bytes, bytes], SlotEntry]) -> Iterable[SlotEntry]:
    """Every entry once, its parent before it if it has one; whatever else the entries say."""
    done: set[tuple[bytes, bytes]] = set()
    for start in by_key:
        path = []
        at = start
        while at in by_key and at not in done:
            done.add(at)
            path.append(by_key[at])
            at = (at[0], by_key[at].parent)
        yield from reversed(path)


class RecordRestorer:
    """Puts what a scan finds into the books, in whatever order it comes, while they are in use."""

    def __init__(
        self,
        books: Books,
        records: Records,
        namespaces: Callable[[], Mapping[bytes, Namespace]],
        dropped: Mapping[bytes, int],
    ) -> None:
        self._books = books
        self._records = records
        self._namespaces = namespaces
        self._dropped = dropped
        #: Waiting for the record of their parent, by namespace and key of that.
        self._waiting: dict[tuple[bytes, bytes], list[Found]] = {}
        #: Of the batch that is being taken in.
        self._added: list[Record] = []
        #: Found and of no use: without their parents, of namespaces that nobody knows, dropped.
        self.orphans = 0

    def found(self, batch: Iterable[Found]) -> None:
        """A part of what the disks hold. Each place is adopted; what cannot be used is released again."""
        adopt, added = self._records.extents.adopt, self._added
        try:
            for one in batch:
                adopt(one.place)
                self._take(one)
        finally:
            for record in added:
                self._records.settled(record)
            added.clear()

    def end(self) -> None:
        """The scan is over: what still waits has no parent."""
        for waiting in self._waiting.values():
            for one in waiting:
                self._reject(one)
        self._waiting.clear()

    def _take(self, first: Found) -> None:
        ready = [first]
        for one in ready:
            space = self._books.spaces.get(one.namespace_id)
            namespace = self._namespaces().get(one.namespace_id) if space is None else space.namespace
            if (
                namespace is None
                or namespace.chunk_bytes != one.chunk_bytes
                or one.place.sequence <= self._dropped.get(one.namespace_id, -1)
            ):
                self._reject(one)
                continue
            parent = None if one.parent == ROOT or space is None else space.records.get(one.parent)
            if parent is None and one.parent != ROOT:
                self._waiting.setdefault((one.namespace_id, one.parent), []).append(one)
                continue
            if space is None:  # opened only now that there is something to put into it
                space = space_of(self._books, self._namespaces(), one.namespace_id)
                if space is None:
                    self._reject(one)
                    continue
            known = space.records.get(one.key)
            if parent is not None and parent.condemned:
                self._reject(one)
            elif known is None:
                self._add(space, parent, one)
                if self._waiting:
                    ready.extend(self._waiting.pop((one.namespace_id, one.key), ()))
            elif known.place.sequence < one.place.sequence and self._records.movable(known):
                self._records.move(known, one.place)
            else:
                self._records.extents.release(one.place)

    def _reject(self, one: Found) -> None:
        self._records.extents.release(one.place)
        self.orphans += 1

    def _add(self, space: Space, parent: Record | None, one: Found) -> None:
        record = self._records.add(space, one.key, parent, one.place, settle=False)
        self._added.append(record)
        chunk = space.chunks.get(one.key)
        if chunk is not None and chunk.draft is None and chunk.record is None:
            chunk.record = record
