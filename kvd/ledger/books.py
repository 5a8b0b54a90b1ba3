"""The books: every chunk, slot, hold and count, and the steps from one consistent state to the next."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from kvd.ledger.chunk import Chunk, Draft, Home, Leaving
from kvd.ledger.coverage import Grid
from kvd.ledger.eviction import EvictionPolicy
from kvd.ledger.index import Space
from kvd.ledger.leases import SessionBook, WriteLease
from kvd.ledger.records import Records
from kvd.ledger.terms import Counters, Generations, Presence, SlotJournal, Unpublished, Unwritten
from kvd.ledger.tree import Tree
from kvd.types import ROOT, ChunkState, Location, Namespace

#: The pool is one segment.
SEGMENT = 0

# Named once: each time that a member of an Enum is named costs as much as a call.
_WRITING, _WAITING, _READY = ChunkState.WRITING, ChunkState.WAITING, ChunkState.READY


class SlabWindow(Protocol):
    """Slabs that would make room for one of another slot size when emptied."""

    @property
    def slabs(self) -> tuple[int, ...]:
        """Where each slab begins, bytes."""

    @property
    def size_bytes(self) -> int:
        """The room that is made."""


class Slots(Protocol):
    """What the books need of the slot allocator (``kvd.memory.slabs.SlabAllocator``)."""

    @property
    def total_bytes(self) -> int:
        """Bytes that can be given out."""

    @property
    def free_bytes(self) -> int:
        """Bytes in no slab."""

    @property
    def taken_bytes(self) -> int:
        """Bytes of slots in use."""

    def room_bytes(self, slot_bytes: int) -> int:
        """Bytes that can be given out in slots of this size with nothing emptied."""

    def slot_bytes(self, chunk_bytes: int) -> int:
        """Size of the slot of a chunk."""

    def allocate(self, slot_bytes: int, near: int | None = None) -> int | None:
        """Offset of a new slot, on the memory node ``near`` if that has one, or None."""

    def free(self, offset: int) -> None:
        """Take a slot back."""

    def claim(self, offset: int, slot_bytes: int) -> None:
        """Give out the slot at ``offset``, as a former life did. Raises ``ValueError`` when it cannot be one."""

    def slab_of(self, offset: int) -> int:
        """Where the slab of a slot begins."""

    def used_slots(self, slab_offset: int) -> Iterator[int]:
        """Slots in use of a slab."""

    def windows(self, slot_bytes: int) -> Iterable[SlabWindow]:
        """What could be emptied for a slab of this slot size."""

    def audit(self) -> list[str]:
        """What does not agree inside the allocator."""


def _ignore(chunk: Chunk) -> None:
    """Who hears of READY chunks when there is nowhere else to keep them."""


class Books(Tree[Chunk]):
    """State and transitions; every public method leaves the books consistent. Decides nothing and checks no client."""

    def __init__(
        self,
        slots: Slots,
        generations: Generations,
        policy: EvictionPolicy[Chunk],
        counters: Counters,
        first_generation: int = 0,
        journal: SlotJournal | None = None,
        records: Records | None = None,
        presence: Presence | None = None,
    ) -> None:
        super().__init__(policy)
        self.slots = slots
        self.generations = generations
        self.counters = counters
        self.journal: SlotJournal = Unwritten() if journal is None else journal
        self._written = journal is not None
        self.presence: Presence = Unpublished() if presence is None else presence
        self.records = records
        if records is not None:
            records.on_empty = self.forget_if_empty
            records.presence = self.presence
        #: Hears of every chunk that has become READY, and of every READY one that was used and has no record.
        self.on_ready: Callable[[Chunk], None] = _ignore
        self.spaces: dict[bytes, Space] = {}
        self.homes: dict[int, Home] = {}  # by the offset of the slab
        self.by_offset: dict[int, Chunk] = {}  # every slot in use
        self.wanted: Counter[Space] = Counter()  # slots, since ``keep_free`` looked
        self.quarantine: deque[tuple[float, Chunk]] = deque()  # by the time at which each ends
        self.stale: dict[Chunk, bool] = {}  # the STALE ones, and whether only their parents are missing
        self.last_generation = first_generation

    # ------------------------------------------------------------ uses and namespaces

    def hold(self, node: Chunk) -> None:
        """See ``Tree``. Every lease comes through here: it is written out, with what the slabs count."""
        if node.evictable:
            self.policy.discard(node)
        at: Chunk | None = node
        while at is not None:
            at.holds = holds = at.holds + 1
            if holds > 1:
                return
            at.home.held += 1
            at = at.parent

    def unhold(self, node: Chunk) -> None:
        """See ``Tree``, and ``hold``."""
        at: Chunk | None = node
        while at is not None:
            at.holds = holds = at.holds - 1
            if holds:
                break
            at.home.held -= 1
            at = at.parent
        if not node.holds and node.first_child is None:
            self.policy.add(node)

    def use(self, nodes: Sequence[Chunk], stamp: int) -> None:
        """See ``Tree``: all are READY. Every hit comes through here: it is written out, with all that keeps count."""
        for chunk in nodes:
            stamp += 1
            chunk.home.heat += stamp - chunk.touched
            chunk.touched = stamp
            chunk.uses += 1
        self.policy.touch(nodes)
        if self._written:
            used = self.journal.used
            for chunk in nodes:
                used(chunk.location.offset, chunk.touched, chunk.uses)
        if self.records is not None:
            known = [chunk.record for chunk in nodes if chunk.record is not None]
            self.records.use(known, self.records.stamps(len(known)))

    def advance(self, now: float) -> None:
        """It is ``now``, in every tier: what is used from here on is used then."""
        records = self.records
        if self.expiry.turns(now) or (records is not None and records.expiry.turns(now)):
            self.settle()
        super().advance(now)
        if records is not None:
            records.advance(now)

    def open_space(self, namespace: Namespace, grid: Grid) -> Space:
        """New books for a namespace that has none."""
        space = Space(namespace, self.slots.slot_bytes(namespace.chunk_bytes), grid)
        self.journal.describe(namespace)
        self.spaces[namespace.id] = space
        return space

    def forget_if_empty(self, space: Space) -> None:
        """Close the books of a namespace that nobody has open and nothing is stored in."""
        empty = not space.sessions and not space.slots and not space.records
        if empty and self.spaces.pop(space.namespace.id, None) is not None:
            self.journal.forget(space.namespace.id)

    # ------------------------------------------------------------ from reserved to READY

    def grant(self, key: bytes, parent: Chunk | None, offset: int, session: SessionBook, lease: WriteLease) -> Chunk:
        """A new WRITING chunk in the slot at ``offset``, under ``lease``; its generation is published."""
        space = lease.space
        slab = self.slots.slab_of(offset)
        home = self.homes.get(slab)
        if home is None:
            home = self.homes[slab] = Home(space.slot_bytes)
        self.last_generation = generation = self.last_generation + 1
        self.last_stamp = stamp = self.last_stamp + 1
        location = Location(SEGMENT, offset, generation)
        parent_key = ROOT if parent is None else parent.key
        chunk = Chunk(key, space, stamp, location, home, Draft(session, lease), holds=1)
        home.chunks += 1
        home.held += 1
        home.heat += stamp
        space.chunks[key] = self.by_offset[offset] = lease.chunks[key] = chunk
        space.writing += 1
        self.charge(space, space.slot_bytes)
        session.writing_bytes += space.slot_bytes
        if parent is not None:
            parent.adopt(chunk)
            self.hold(parent)
        named = space.namespace
        self.journal.granted(offset, generation, named.id, key, parent_key, named.chunk_bytes)
        self.generations.publish(location)
        return chunk

    def complete(self, chunk: Chunk, draft: Draft) -> None:
        """All bytes of a WRITING chunk are there: READY with all that waited for it, or WAITING for its parent."""
        self._end_lease(chunk, draft)
        chunk.state = _WAITING
        if chunk.parent is None or chunk.parent.state is _READY:
            self._make_ready(chunk)

    def sound(self, chunk: Chunk) -> None:
        """The bytes of a STALE chunk are right: it is READY as soon as its parent is, with all that waited for it."""
        self.stale[chunk] = True
        if chunk.parent is not None and chunk.parent.state is not _READY:
            return
        ready = [chunk]
        for one in ready:
            del self.stale[one]
            one.state = _READY
            for child in one.children():
                if child.state is _WAITING:
                    self._make_ready(child)
                elif self.stale.get(child):
                    ready.append(child)
            self.on_ready(one)

    def _make_ready(self, chunk: Chunk) -> None:
        """A WAITING chunk's parent is READY."""
        ready = [chunk]
        for one in ready:
            child = one.first_child
            while child is not None:
                if child.state is _WAITING:
                    ready.append(child)
                child = child.next_sibling
            space, draft = one.space, one.draft
            if draft is not None:
                draft.session.writing_bytes -= space.slot_bytes
                if draft.promoted:
                    self.counters.promoted_chunks += 1
                else:
                    self.counters.stored_chunks += 1
            one.draft = None
            space.writing -= 1
            space.ready += 1
            self.lift(one.parent)
            self._stamp(one)
            self.journal.ready(one.location.offset, one.touched, one.uses)
            if one.checksum is not None:
                self.journal.sealed(one.location.offset, one.checksum)
            one.state = _READY
            one.record = space.sound_record(one.key)
            if one.record is None:
                self.presence.add(space.namespace.id, one.key)
            self.policy.enter(one)
            if self.pins is not None:
                self.pins.entered(one)
            self.unhold(one)
            self.on_ready(one)

    def give_up(self, chunk: Chunk, draft: Draft, quarantine_until: float | None = None) -> None:
        """Take a chunk that is not READY out of the books, for its writer has ended.

        What waited below it goes with it; what is being written below it is doomed: its writer learns at Commit. The
        slot is free at once, unless the data plane still writes into it or ``quarantine_until`` is given.
        """
        self._end_lease(chunk, draft)
        if not draft.doomed:
            for below in reversed(chunk.subtree()):
                self._remove(below)
                if below is not chunk and below.draft is not None:
                    if below.state is _WRITING:
                        below.draft.doomed = True
                    else:
                        self._fail(below, below.draft)
        self._vacate(chunk, draft, quarantine_until)

    def end_write(self, chunk: Chunk, draft: Draft, quarantine_until: float) -> None:
        """A write of the data plane has ended. If the slot was only waiting for that, it goes its way."""
        draft.writes -= 1
        if draft.writes or draft.leaving is None:
            return
        if draft.leaving is Leaving.IN_FLIGHT:
            self._free(chunk)
        else:
            self.quarantine.append((quarantine_until, chunk))

    def end_quarantines(self, now: float) -> None:
        """Free the slots whose quarantine is over."""
        while self.quarantine and self.quarantine[0][0] <= now:
            self._free(self.quarantine.popleft()[1])

    # ------------------------------------------------------------ out of the pool

    def evict(self, top: Chunk) -> int:
        """Free ``top`` and all below it, leaves first; ``top.holds`` must be 0. How many chunks that were."""
        subtree = top.subtree()
        for chunk in reversed(subtree):
            self._let_go(chunk)
            self._free(chunk)
        return len(subtree)

    def replace(self, leaf: Chunk) -> int:
        """Evict ``leaf``, below which there is nothing, for one of the same size: the offset of its slot, which the
        caller has from now on as if it had been allocated."""
        self._let_go(leaf)
        return self._clear(leaf)

    def condemn(self, top: Chunk) -> int:
        """A STALE chunk is damaged: it goes, and all below it. Who writes below it learns at Commit.

        How many chunks went. Below a STALE chunk nothing is READY, so nobody reads there.
        """
        gone = 0
        for chunk in reversed(top.subtree()):
            draft = chunk.draft
            if draft is None:
                gone += 1
                self._let_go(chunk)
                self._free(chunk)
                continue
            self._remove(chunk)
            if chunk.state is _WRITING:
                draft.doomed = True
            else:
                self._fail(chunk, draft)
        self.counters.condemned_chunks += gone
        return gone

    # ------------------------------------------------------------ the steps inside

    def _let_go(self, chunk: Chunk) -> None:
        """Take a READY or STALE chunk without children out of the books; its slot is still to be cleared."""
        if chunk.holds and self.pins is not None:
            self.pins.leaves(chunk)
        self.policy.discard(chunk)
        self.policy.leave(chunk)
        self._remove(chunk)
        space = chunk.space
        space.ready -= 1
        if space.sound_record(chunk.key) is None:
            self.presence.remove(space.namespace.id, chunk.key)
        self.stale.pop(chunk, None)

    def _end_lease(self, chunk: Chunk, draft: Draft) -> None:
        lease = draft.lease
        if lease is None:
            return
        draft.lease = None
        del lease.chunks[chunk.key]
        if not lease.chunks:
            draft.session.writes.pop(lease.id, None)

    def _stamp(self, chunk: Chunk) -> None:
        before = chunk.touched
        super()._stamp(chunk)
        chunk.home.heat += chunk.touched - before

    def _remove(self, chunk: Chunk) -> None:
        """Take a chunk without children out of the index and from its parent."""
        del chunk.space.chunks[chunk.key]
        self._unlink(chunk)

    def _fail(self, chunk: Chunk, draft: Draft) -> None:
        """What a complete chunk waited for will not come."""
        if draft.promoted:
            self.counters.promote_failures += 1
        else:
            self.counters.failed_chunks += 1
        self._vacate(chunk, draft, None)

    def _vacate(self, chunk: Chunk, draft: Draft, quarantine_until: float | None) -> None:
        draft.session.writing_bytes -= chunk.space.slot_bytes
        chunk.space.writing -= 1
        if quarantine_until is None and not draft.writes:
            self._free(chunk)
            return
        self.generations.retract(chunk.location)
        chunk.space.leaving += 1
        if quarantine_until is None:
            draft.leaving = Leaving.IN_FLIGHT
            return
        draft.leaving = Leaving.QUARANTINE
        if not draft.writes:
            self.quarantine.append((quarantine_until, chunk))

    def _free(self, chunk: Chunk) -> None:
        """Give the slot back."""
        self.slots.free(self._clear(chunk))

    def _clear(self, chunk: Chunk) -> int:
        """Nobody has the slot at this offset any more. Readers must see that its generation is over before anybody else
        can get it."""
        offset = chunk.location.offset
        if chunk.draft is None or chunk.draft.leaving is None:
            self.generations.retract(chunk.location)
        else:
            chunk.space.leaving -= 1
        home = chunk.home
        home.chunks -= 1
        home.heat -= chunk.touched
        if chunk.holds:
            home.held -= 1
        if not home.chunks:
            del self.homes[self.slots.slab_of(offset)]
        del self.by_offset[offset]
        self.journal.freed(offset)
        self.charge(chunk.space, -chunk.space.slot_bytes)
        self.forget_if_empty(chunk.space)
        return offset
