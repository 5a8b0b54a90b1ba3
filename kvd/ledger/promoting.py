"""The way back: records that a lookup wants are read into slots, and chunks of a former daemon are checked.

The books themselves are the writer of what they promote: a slot is reserved like any other, a thread reads the record
into it and checks it, and only then it is READY. Until then nobody can see it (laws 1 and 4).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from kvd.ledger.books import Books
from kvd.ledger.chunk import Chunk, Draft
from kvd.ledger.index import Space
from kvd.ledger.leases import SessionBook, WriteLease
from kvd.ledger.orders import Orders
from kvd.ledger.records import Record, Records
from kvd.ledger.room import RoomMaker
from kvd.types import ROOT, ChunkState, Outcome, Place, Read, Result, SessionId, Verify

#: The session that the books write in; those of clients are higher.
DAEMON: SessionId = 0
#: Share of the pool that may be on its way into it, or has just arrived and is kept for who asked.
MAX_SHARE = 0.25
#: A chunk that has arrived is kept this long for the lookup that waits for it.
GRACE_S = 2.0
#: Chunks of a former daemon that are checked at a time when nobody has asked for them.
_VERIFY_AHEAD = 4


def _nobody(chunk: Chunk) -> None:
    """Who hears of damage when nobody has plans for what a former daemon left."""


class Promoting:
    """What is on its way into the pool, or into sight."""

    def __init__(
        self, books: Books, orders: Orders, records: Records | None, clock: Callable[[], float], pool_bytes: int
    ) -> None:
        self._books = books
        self._orders = orders
        self._records = records
        self._clock = clock
        self._most_bytes = int(pool_bytes * MAX_SHARE)
        self.session = SessionBook(DAEMON, "")
        self._last_lease = 0
        self._coming_bytes = 0
        #: Arrived and not leased by anybody yet, with the time until which each is kept.
        self._kept: dict[Chunk, float] = {}
        self._verifying: set[Chunk] = set()
        self._ahead: deque[Chunk] = deque()
        self._reads: dict[Chunk, Record] = {}
        #: Hears of a STALE chunk that is damaged, before it goes.
        self.on_damaged: Callable[[Chunk], None] = _nobody

    @property
    def chunks(self) -> int:
        """Chunks being read or checked."""
        return len(self.session.writes) + len(self._verifying)

    @property
    def keeps(self) -> bool:
        """Whether anything has arrived that nobody has leased yet."""
        return bool(self._kept)

    def kept(self) -> list[Chunk]:
        """Chunks that are held because they have just arrived; for the audit."""
        return list(self._kept)

    def reading(self) -> list[Record]:
        """Records that are held because they are being read; for the audit."""
        return list(self._reads.values())

    def follow(self, space: Space, keys: Sequence[bytes], previous: Chunk | None, near: int | None = None) -> int:
        """How many of ``keys``, from the first on, continue the READY prefix that ends in ``previous`` and are on their
        way. What lies on a disk sets out now, to the memory node ``near`` if that has room."""
        coming = 0
        above = previous
        for key in keys:
            chunk = space.chunks.get(key)
            if chunk is None:
                chunk = self._promote(space, key, above, near)
            elif self._books.expired(chunk):
                break
            elif chunk.state is ChunkState.STALE:
                self._verify(chunk)
            elif chunk.draft is None or not chunk.draft.promoted:
                break
            if chunk is None or chunk.parent is not above:
                break
            coming += 1
            above = chunk
        return coming

    def leased(self, chunk: Chunk) -> None:
        """Somebody has leased ``chunk``: it need not be kept any more."""
        if self._kept.pop(chunk, None) is not None:
            self._coming_bytes -= chunk.space.slot_bytes
            self._books.unhold(chunk)

    def tick(self, now: float) -> None:
        """Let go of what nobody came for, and check some of what a former daemon left."""
        while self._kept and (first := next(iter(self._kept))) and self._kept[first] <= now:
            self.leased(first)
        self._verify_ahead()

    # ------------------------------------------------------------ from a disk

    def _promote(self, space: Space, key: bytes, above: Chunk | None, near: int | None) -> Chunk | None:
        """Begin to read a record into a slot; None when there is no such record, or no slot."""
        records = self._records
        record = space.records.get(key)
        if records is None or record is None or not records.readable(record) or records.expired(record):
            return None
        parent_key = ROOT if record.parent is None else record.parent.key
        if parent_key != (ROOT if above is None else above.key):
            return None
        offset = self._slot(space, above, near)
        if offset is None:
            self._books.counters.unpromoted_no_room += 1
            return None
        self._last_lease += 1
        lease = WriteLease(self._last_lease, space)
        self.session.writes[lease.id] = lease
        chunk = self._books.grant(key, above, offset, self.session, lease)
        draft = chunk.draft
        assert draft is not None
        draft.promoted = True
        self._coming_bytes += space.slot_bytes
        place = records.begin_read(record)
        records.touch(record)
        self._reads[chunk] = record
        self._orders.issue(
            lambda ticket: Read(ticket, space.namespace, key, parent_key, place, offset),
            lambda result: self._read(chunk, draft, record, place, result),
        )
        return chunk

    def _slot(self, space: Space, above: Chunk | None, near: int | None) -> int | None:
        if self._coming_bytes and self._coming_bytes + space.slot_bytes > self._most_bytes:
            return None  # in a small pool a single chunk may be more than that
        if above is not None:
            self._books.hold(above)  # room must not be made of what the chunk hangs on
        try:
            return RoomMaker(self._books, space, near).slot()
        finally:
            if above is not None:
                self._books.unhold(above)

    def _read(self, chunk: Chunk, draft: Draft, record: Record, place: Place, result: Result) -> None:
        books, records = self._books, self._records
        assert records is not None
        del self._reads[chunk]
        good = result.outcome is Outcome.OK and not draft.doomed
        if good:
            chunk.checksum = result.checksum
            chunk.uses = record.uses - 1  # arriving counts as the use that it was read for
            books.hold(chunk)
            books.complete(chunk, draft)
            self._kept[chunk] = self._clock() + GRACE_S
        else:
            books.counters.promote_failures += 1
            self._coming_bytes -= chunk.space.slot_bytes
            books.give_up(chunk, draft)
        damaged = result.outcome is Outcome.CORRUPT
        if damaged:
            books.counters.corrupt_chunks += 1
        if damaged or (result.outcome is Outcome.FAILED and records.extents.works(place.drive)):
            # The second: the drive works but for this record. It would fail the next one who asks as well.
            books.counters.dropped_records += records.condemn(record)
        books.counters.dropped_records += records.end_read(record)

    # ------------------------------------------------------------ from a former daemon

    def check(self, chunks: Iterable[Chunk]) -> None:
        """These STALE chunks are to be checked when nobody has asked for others, in this order."""
        self._ahead.extend(chunks)
        self._verify_ahead()

    def _verify(self, chunk: Chunk) -> None:
        if chunk in self._verifying or self._books.stale[chunk]:
            return
        checksum = chunk.checksum
        if checksum is None:  # a crash came between the last byte and the checksum: it is taken as it is
            self._books.sound(chunk)
            return
        self._verifying.add(chunk)
        chunk_bytes = chunk.space.namespace.chunk_bytes
        self._orders.issue(
            lambda ticket: Verify(ticket, chunk.location.offset, chunk_bytes, checksum),
            lambda result: self._verified(chunk, result),
        )

    def _verified(self, chunk: Chunk, result: Result) -> None:
        self._verifying.discard(chunk)
        if chunk in self._books.stale:  # otherwise it had to give way meanwhile
            if result.outcome is Outcome.OK:
                self._books.sound(chunk)
            else:
                self._books.counters.corrupt_chunks += 1
                self.on_damaged(chunk)
                self._books.condemn(chunk)
        self._verify_ahead()

    def _verify_ahead(self) -> None:
        while self._ahead and len(self._verifying) < _VERIFY_AHEAD:
            chunk = self._ahead.popleft()
            if chunk in self._books.stale:
                self._verify(chunk)
