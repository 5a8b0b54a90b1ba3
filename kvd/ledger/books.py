"""The books: every chunk, slot, hold and count, and the steps from one consistent state to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

from kvd.ledger.chunk import Chunk, Draft, Home, Leaving
from kvd.ledger.eviction import EvictionPolicy
from kvd.ledger.index import Space
from kvd.ledger.leases import SessionBook, WriteLease
from kvd.ledger.terms import Counters, Generations
from kvd.types import ChunkState, Location

#: The pool is one segment.
SEGMENT = 0


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

    def slot_bytes(self, chunk_bytes: int) -> int:
        """Size of the slot of a chunk."""

    def allocate(self, slot_bytes: int) -> int | None:
        """Offset of a new slot, or None."""

    def free(self, offset: int) -> None:
        """Take a slot back."""

    def slab_of(self, offset: int) -> int:
        """Where the slab of a slot begins."""

    def used_slots(self, slab_offset: int) -> Iterator[int]:
        """Slots in use of a slab."""

    def windows(self, slot_bytes: int) -> Iterable[SlabWindow]:
        """What could be emptied for a slab of this slot size."""

    def audit(self) -> list[str]:
        """What does not agree inside the allocator."""


class Books:
    """State and transitions; every public method leaves the books consistent. Decides nothing and checks no client."""

    def __init__(
        self,
        slots: Slots,
        generations: Generations,
        policy: EvictionPolicy,
        counters: Counters,
        first_generation: int = 0,
    ) -> None:
        self.slots = slots
        self.generations = generations
        self.policy = policy
        self.counters = counters
        self.spaces: dict[bytes, Space] = {}
        self.homes: dict[int, Home] = {}  # by the offset of the slab
        self.by_offset: dict[int, Chunk] = {}  # every slot in use
        self.quarantine: deque[tuple[float, Chunk]] = deque()  # by the time at which each ends
        self.last_generation = first_generation
        self.last_stamp = 0

    # ------------------------------------------------------------ holds and touches

    def hold(self, chunk: Chunk) -> None:
        """One more reason not to evict ``chunk``. O(1), and O(depth) when nothing of its prefix was held."""
        at: Chunk | None = chunk
        while at is not None:
            at.holds += 1
            if at.holds > 1:
                return
            at.home.held += 1
            self.policy.discard(at)
            at = at.parent

    def unhold(self, chunk: Chunk) -> None:
        """One reason less."""
        at: Chunk | None = chunk
        while at is not None:
            at.holds -= 1
            if at.holds:
                return
            at.home.held -= 1
            if at.first_child is None:
                self.policy.add(at)
            at = at.parent

    def touch(self, chunk: Chunk) -> None:
        """A request has used ``chunk``."""
        self.last_stamp = stamp = self.last_stamp + 1
        chunk.home.heat += stamp - chunk.touched
        chunk.touched = stamp
        self.policy.touch(chunk)

    # ------------------------------------------------------------ from reserved to READY

    def grant(self, key: bytes, parent: Chunk | None, offset: int, session: SessionBook, lease: WriteLease) -> Chunk:
        """A new WRITING chunk in the slot at ``offset``, under ``lease``; its generation is published."""
        space = lease.space
        home = self.homes.setdefault(self.slots.slab_of(offset), Home(space.slot_bytes))
        self.last_generation += 1
        self.last_stamp += 1
        location = Location(SEGMENT, offset, self.last_generation)
        chunk = Chunk(key, space, location, home, self.last_stamp, Draft(session, lease), holds=1)
        home.chunks += 1
        home.held += 1
        home.heat += chunk.touched
        space.chunks[key] = self.by_offset[offset] = lease.chunks[key] = chunk
        space.writing += 1
        session.writing_bytes += space.slot_bytes
        if parent is not None:
            parent.adopt(chunk)
            self.hold(parent)
        self.generations.publish(location)
        return chunk

    def complete(self, chunk: Chunk, draft: Draft) -> None:
        """All bytes of a WRITING chunk are there: READY with all that waited for it, or WAITING for its parent."""
        self._end_lease(chunk, draft)
        chunk.state = ChunkState.WAITING
        if chunk.parent is not None and chunk.parent.state is not ChunkState.READY:
            return
        promoted = [chunk]
        for one in promoted:
            promoted.extend(child for child in one.children() if child.state is ChunkState.WAITING)
            if one.draft is not None:
                one.draft.session.writing_bytes -= one.space.slot_bytes
            one.draft = None
            one.state = ChunkState.READY
            one.space.writing -= 1
            one.space.ready += 1
            self.counters.stored_chunks += 1
            self.touch(one)
            self.unhold(one)

    def give_up(self, chunk: Chunk, draft: Draft, quarantine_until: float | None = None) -> None:
        """Take a chunk that is not READY out of the books, for its writer has ended.

        What waited below it goes with it; what is being written below it is doomed: its writer learns at Commit. The
        slot is free at once, unless the data plane still writes into it or ``quarantine_until`` is given.
        """
        self._end_lease(chunk, draft)
        if not draft.doomed:
            for below in reversed(chunk.subtree()):
                self._unlink(below)
                if below is not chunk and below.draft is not None:
                    if below.state is ChunkState.WRITING:
                        below.draft.doomed = True
                    else:
                        self.counters.failed_chunks += 1
                        self._vacate(below, below.draft, None)
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
            self.policy.discard(chunk)
            self._unlink(chunk)
            chunk.space.ready -= 1
            self._free(chunk)
        return len(subtree)

    def forget_if_empty(self, space: Space) -> None:
        """Close the books of a namespace that nobody has open and nothing is stored in."""
        if not space.sessions and not space.slots:
            self.spaces.pop(space.namespace.id, None)

    # ------------------------------------------------------------ the steps inside

    def _end_lease(self, chunk: Chunk, draft: Draft) -> None:
        lease = draft.lease
        if lease is None:
            return
        draft.lease = None
        del lease.chunks[chunk.key]
        if not lease.chunks:
            draft.session.writes.pop(lease.id, None)

    def _unlink(self, chunk: Chunk) -> None:
        """Take a chunk without children out of the index and from its parent."""
        del chunk.space.chunks[chunk.key]
        parent = chunk.parent
        if parent is None:
            return
        chunk.leave()
        if chunk.holds:
            self.unhold(parent)
        elif parent.first_child is None and not parent.holds:
            self.policy.add(parent)

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
        """Give the slot back. Readers must see that its generation is over before anybody else can get it."""
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
        self.slots.free(offset)
        self.forget_if_empty(chunk.space)
