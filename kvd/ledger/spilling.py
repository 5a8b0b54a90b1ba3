"""Writing behind: every chunk that is worth keeping gets its checksum, and a record on a disk, before it is evicted.

A chunk is *offered* when it becomes READY, and again when it is used and has no record. One that is to be written is
held until its record is there: eviction waits for the disk, and what was stored is not lost because it came fast. The
queue is bounded by the time that it stands for, at the speed that the disks have shown: beyond that, and when no disk
works, chunks stay unwritten and may be evicted at once.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvd.ledger.books import Books
from kvd.ledger.chunk import Chunk
from kvd.ledger.index import Space
from kvd.ledger.orders import Orders
from kvd.ledger.reclaiming import Reclaiming
from kvd.ledger.records import Records
from kvd.ledger.terms import Budget
from kvd.types import ROOT, ChunkState, Outcome, Place, Result, Seal, Write

#: Orders under way at a time: more than there are threads to carry them out, so that none waits for the books.
MAX_UNDER_WAY = 32
#: The queue may stand for this much time at the speed that the disks have shown ...
BACKLOG_S = 10.0
#: ... which is taken for this before it was measured, and never for less than the second. Bytes per second.
_FIRST_SPEED = 1 << 30
_LEAST_SPEED = 32 << 20
#: The speed is that of the last spell of so much time in which there was always something to write.
_SPELL_S = 1.0
#: Chunks of a former daemon that are offered again at a time.
_CATCH_UP = 256


@dataclass(frozen=True, slots=True)
class Habits:
    """How disks are used. ``reused_only``: what was not used again after it was stored is not written. ``encode``:
    bytes are made fewer where that pays."""

    reused_only: bool = False
    encode: bool = False


class Spilling:
    """The way of a chunk from READY to sealed and written; with ``records`` None to sealed only."""

    def __init__(
        self,
        books: Books,
        orders: Orders,
        records: Records | None,
        reclaiming: Reclaiming | None,
        budget: Budget | None,
        habits: Habits,
        clock: Callable[[], float],
    ) -> None:
        self._books = books
        self._orders = orders
        self._records = records
        self._reclaiming = reclaiming
        self._budget = budget
        self._habits = habits
        self._clock = clock
        self._queue: deque[Chunk] = deque()
        self._under_way = 0
        #: Chunks whose bytes a thread is reading for their checksum; each is held.
        self.sealing: set[Chunk] = set()
        #: What may have a record that a scan has not found yet, and of that what is held until the scan says.
        self._postponed: OrderedDict[Chunk, None] = OrderedDict()
        self.unsure: set[Chunk] = set()
        self._sure_at = 0.0
        self._scanned = False
        #: Written before their parents were: by parent, what is recorded as soon as that has its record.
        self._early: dict[Chunk, list[tuple[Chunk, Place]]] = {}
        #: Were encoded when there was no room for them: they are written as they are.
        self._plain: set[Chunk] = set()
        #: Of chunks that are to be written, those under way included.
        self.queued_bytes = 0
        self._speed = float(_FIRST_SPEED)
        self._spell_began = clock()
        self._spell_bytes = 0

    @property
    def queued_chunks(self) -> int:
        """Chunks that wait or are under way."""
        return len(self._queue) + self._under_way

    def postpone(self, chunks: Iterable[Chunk]) -> None:
        """These may have records that a scan has not found yet: they are not written before ``scanned``.

        Until then they are held like what is to be written, and not for longer than the queue may stand for.
        """
        if self._records is not None:
            self._sure_at = self._clock() + BACKLOG_S
            for chunk in chunks:
                self._postpone(chunk)

    def scanned(self) -> None:
        """All records are known. What was postponed is offered again, some with every ``catch_up``."""
        self._scanned = True

    def catch_up(self) -> None:
        """Offer some of what was postponed; there may be a pool full of it."""
        if self._scanned:
            for _ in range(min(_CATCH_UP, len(self._postponed))):
                chunk, _ = self._postponed.popitem()
                if chunk in self._books.stale:  # offered when it has been checked
                    self._postponed[chunk] = None
                    self._postponed.move_to_end(chunk, last=False)
                    continue
                if self._is_ready(chunk):
                    self.offer(chunk)
                self._let_go(chunk)
        elif self.unsure and self._clock() >= self._sure_at:
            for _ in range(min(_CATCH_UP, len(self.unsure))):
                self._books.unhold(self.unsure.pop())

    def forget(self, top: Chunk) -> None:
        """``top`` is damaged: it goes, and all below it."""
        for chunk in top.subtree():
            self._postponed.pop(chunk, None)
            self._let_go(chunk)

    def offer(self, chunk: Chunk) -> None:
        """``chunk`` is READY, and may want a checksum or a record."""
        if chunk.to_write:
            return
        if (self._scanned or chunk not in self._postponed) and self._worth_writing(chunk):
            self._queue_prefix(chunk)
        elif chunk.checksum is None:
            self._enqueue(chunk)
        self.pump()

    def pump(self) -> None:
        """Order what can be ordered now."""
        while self._queue and self._under_way < MAX_UNDER_WAY:
            chunk = self._queue.popleft()
            if not self._step(chunk):
                self._queue.appendleft(chunk)
                return

    def withdraw(self, space: Space | None = None) -> None:
        """What only waits to be written, of one namespace or at all, is not to be written any more."""
        for chunk in self._queue:
            if chunk.to_write and (space is None or chunk.space is space):
                self._unwant(chunk)
        if space is None:
            self._sure_at = 0.0
        else:
            for chunk in [chunk for chunk in self.unsure if chunk.space is space]:
                self._let_go(chunk)

    # ------------------------------------------------------------ what is worth writing

    def _worth_writing(self, chunk: Chunk) -> bool:
        records, counters = self._records, self._books.counters
        if records is None or chunk.record is not None:
            return False
        if not records.extents.total_bytes:
            counters.unspilled_degraded += 1
        elif not records.extents.fits(chunk.space.namespace.chunk_bytes):
            counters.unspilled_large += 1
        elif self._habits.reused_only and chunk.uses < 2:
            counters.unspilled_admission += 1
        elif self.queued_bytes > self._speed * BACKLOG_S:
            counters.unspilled_backlog += 1
        else:
            return True
        return False

    def _queue_prefix(self, chunk: Chunk) -> None:
        """Queue ``chunk``, and before it what of its prefix has no record: parents are written first."""
        prefix: list[Chunk] = []
        at: Chunk | None = chunk
        while at is not None and at.record is None and not at.to_write:
            if at in self._postponed and not self._scanned:
                # A scan that waits for a drive may never end: then what is used again is offered again, and no more.
                for one in prefix if self._clock() < self._sure_at else ():
                    self._postpone(one)
                return
            prefix.append(at)
            at = at.parent
        for one in reversed(prefix):
            if self._budget is not None and not self._budget.take(one.space.slot_bytes):
                self._books.counters.unspilled_budget += 1
                if one.checksum is None:
                    self._enqueue(one)
                return
            if not self.queued_bytes:
                self._spell_began, self._spell_bytes = self._clock(), 0
            self._books.hold(one)
            one.to_write = True
            self.queued_bytes += one.space.slot_bytes
            self._enqueue(one)

    def _postpone(self, chunk: Chunk) -> None:
        self._postponed[chunk] = None
        self._books.hold(chunk)
        self.unsure.add(chunk)

    def _let_go(self, chunk: Chunk) -> None:
        """Whether ``chunk`` is to be written is known."""
        if chunk in self.unsure:
            self.unsure.remove(chunk)
            self._books.unhold(chunk)

    def _is_ready(self, chunk: Chunk) -> bool:
        return self._books.by_offset.get(chunk.location.offset) is chunk and chunk.state is ChunkState.READY

    def _enqueue(self, chunk: Chunk) -> None:
        if not chunk.spilling:
            chunk.spilling = True
            self._queue.append(chunk)

    # ------------------------------------------------------------ one chunk's way

    def _step(self, chunk: Chunk) -> bool:
        """Order the next thing for ``chunk``. False: there is no room on the disks now."""
        encode = self._habits.encode and chunk.to_write and chunk not in self._plain
        if chunk.checksum is not None and not encode:
            if chunk.to_write:
                return self._write(chunk, None)
            chunk.spilling = False
        elif not self._is_ready(chunk):
            chunk.spilling = False  # only to be sealed, so it was not held, and is gone
        else:
            self._seal(chunk)
        return True

    def _seal(self, chunk: Chunk) -> None:
        self._under_way += 1
        self.sealing.add(chunk)
        self._books.hold(chunk)  # the slot must not become somebody else's under the reader
        encode = self._habits.encode and chunk.to_write
        self._orders.issue(
            lambda ticket: Seal(ticket, chunk.location.offset, chunk.space.namespace, encode),
            lambda result: self._sealed(chunk, result),
        )

    def _sealed(self, chunk: Chunk, result: Result) -> None:
        self._under_way -= 1
        self.sealing.discard(chunk)
        self._books.unhold(chunk)
        if result.outcome is Outcome.OK and chunk.checksum is None:
            chunk.checksum = result.checksum
            self._books.journal.sealed(chunk.location.offset, result.checksum)
        if chunk.checksum is None or not chunk.to_write:
            self._finish(chunk)
        elif not self._write(chunk, result.encoded):
            self._plain.add(chunk)
            self._queue.appendleft(chunk)
        self.pump()

    def _write(self, chunk: Chunk, encoded: memoryview | None) -> bool:
        """Order the record of a sealed chunk. False: there is no room on the disks now."""
        assert self._records is not None and self._reclaiming is not None and chunk.checksum is not None
        if not self._records.extents.total_bytes:
            self._books.counters.unspilled_degraded += 1
            self._finish(chunk)
            return True
        namespace, checksum, offset = chunk.space.namespace, chunk.checksum, chunk.location.offset
        payload_bytes = namespace.chunk_bytes if encoded is None else len(encoded)
        if not self._reclaiming.drop_for(namespace, payload_bytes):
            self._books.counters.unspilled_share += 1
            self._finish(chunk)
            return True
        place = self._reclaiming.allocate(payload_bytes)
        if place is None:
            return False
        parent = ROOT if chunk.parent is None else chunk.parent.key
        self._under_way += 1
        self._orders.issue(
            lambda ticket: Write(ticket, namespace, chunk.key, parent, offset, checksum, encoded, place),
            lambda result: self._written(chunk, place, result),
        )
        return True

    def _written(self, chunk: Chunk, place: Place, result: Result) -> None:
        self._under_way -= 1
        if result.outcome is Outcome.OK:
            self._measure(place.record_bytes)
            self._record(chunk, place)
        else:
            self._books.counters.unspilled_degraded += 1
            self._lose(chunk, place)
        self.pump()

    def _record(self, chunk: Chunk, place: Place) -> None:
        """The bytes are on the disk; the record counts from the moment that its parent's does."""
        records, counters = self._records, self._books.counters
        assert records is not None
        ready = [(chunk, place)]
        for one, where in ready:
            parent = one.parent
            if parent is not None and parent.record is None and parent.to_write:
                self._early.setdefault(parent, []).append((one, where))
                continue
            reachable = parent is None or (parent.record is not None and not parent.record.condemned)
            if not reachable or one.key in one.space.records:
                self._lose(one, where)
                continue
            above = None if parent is None else parent.record
            one.record = records.add(one.space, one.key, above, where, one.uses - 1)
            counters.spilled_chunks += 1
            counters.spilled_bytes += where.record_bytes
            self._finish(one)
            ready.extend(self._early.pop(one, ()))

    def _lose(self, chunk: Chunk, place: Place) -> None:
        """What was written cannot be used: neither can what was written early below it."""
        assert self._records is not None
        lost = [(chunk, place)]
        for one, where in lost:
            self._records.extents.release(where)
            self._finish(one)
            lost.extend(self._early.pop(one, ()))

    def _finish(self, chunk: Chunk) -> None:
        chunk.spilling = False
        self._unwant(chunk)

    def _unwant(self, chunk: Chunk) -> None:
        if chunk.to_write:
            if chunk.record is None and self._budget is not None:
                self._budget.give(chunk.space.slot_bytes)
            chunk.to_write = False
            self._plain.discard(chunk)
            self.queued_bytes -= chunk.space.slot_bytes
            self._books.unhold(chunk)

    def _measure(self, size_bytes: int) -> None:
        self._spell_bytes += size_bytes
        now = self._clock()
        if now - self._spell_began >= _SPELL_S:
            self._speed = max(_LEAST_SPEED, self._spell_bytes / (now - self._spell_began))
            self._spell_began, self._spell_bytes = now, 0
