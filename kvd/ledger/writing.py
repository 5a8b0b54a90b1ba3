"""How chunks are written: reserve, commit, abort, and the death of a writer. Input is checked by the store."""

from __future__ import annotations

from collections.abc import Sequence

from kvd.ledger.books import Books
from kvd.ledger.chunk import Chunk
from kvd.ledger.index import Space
from kvd.ledger.leases import SessionBook, WriteLease
from kvd.ledger.room import RoomMaker
from kvd.types import ROOT, ChunkState, CommitStatus, LeaseId, ReserveResult, ReserveStatus

# Named once: each time that a member of an Enum is named costs as much as a call.
_READY = ChunkState.READY
_GRANTED = ReserveStatus.GRANTED
_STORED, _WAITING_PARENT = CommitStatus.STORED, CommitStatus.WAITING_PARENT
_PRESENT = ReserveResult(ReserveStatus.PRESENT)
_BUSY = ReserveResult(ReserveStatus.BUSY)
_NO_ROOM = ReserveResult(ReserveStatus.NO_ROOM)
_NO_PARENT = ReserveResult(ReserveStatus.NO_PARENT)


class Writing:
    """The writers' side of the books. ``max_writing_bytes`` bounds what one session has reserved and not READY."""

    def __init__(self, books: Books, max_writing_bytes: int) -> None:
        self._books = books
        self._max_writing_bytes = max_writing_bytes

    def reserve(
        self, book: SessionBook, space: Space, lease_id: LeaseId, items: Sequence[tuple[bytes, bytes]]
    ) -> list[ReserveResult]:
        """One answer per (key, parent); what is granted is under the new write lease ``lease_id``."""
        lease = WriteLease(lease_id, space)
        room = RoomMaker(self._books, space, book.node)
        # What is there already must not be evicted for the sake of what is not: the answers would be stale at once.
        present = [chunk for key, _ in items if (chunk := space.chunks.get(key)) is not None]
        for chunk in present:
            self._books.hold(chunk)
        book.writes[lease_id] = lease
        try:
            results = [self._reserve_one(book, lease, room, key, parent) for key, parent in items]
        finally:
            for chunk in present:
                self._books.unhold(chunk)
            if not lease.chunks:
                del book.writes[lease_id]
        for (key, _), result in zip(items, results, strict=True):
            if (result is _NO_ROOM or result is _NO_PARENT) and key not in space.chunks:
                self._books.policy.missed(space, key)
        return results

    def _reserve_one(
        self, book: SessionBook, lease: WriteLease, room: RoomMaker, key: bytes, parent_key: bytes
    ) -> ReserveResult:
        space, counters = lease.space, self._books.counters
        chunk = space.chunks.get(key)
        parent = None if parent_key == ROOT else space.chunks.get(parent_key)
        if (parent is None and parent_key != ROOT) or (chunk is not None and chunk.parent is not parent):
            # The second: held, but under another parent. A lookup along this prefix would not find it.
            counters.no_parent_chunks += 1
            return _NO_PARENT
        if chunk is not None and chunk.state is _READY:
            self._books.lift(chunk.parent)
            self._books.touch(chunk)
            counters.present_chunks += 1
            return _PRESENT
        if chunk is not None:
            counters.busy_chunks += 1
            return _BUSY
        offset = self._slot(book, room, space.slot_bytes, key, parent)
        if offset is None:
            counters.no_room_chunks += 1
            return _NO_ROOM
        counters.reserved_chunks += 1
        return ReserveResult(_GRANTED, self._books.grant(key, parent, offset, book, lease).location)

    def _slot(
        self, book: SessionBook, room: RoomMaker, slot_bytes: int, key: bytes, parent: Chunk | None
    ) -> int | None:
        if book.writing_bytes + slot_bytes > self._max_writing_bytes:
            return None
        if parent is None or parent.holds:
            return room.slot(key, parent)
        self._books.hold(parent)  # it may be an evictable leaf
        try:
            return room.slot(key, parent)
        finally:
            self._books.unhold(parent)

    def commit(self, space: Space, lease: WriteLease | None, items: Sequence[tuple[bytes, int]]) -> list[CommitStatus]:
        """One answer per (key, cells of the grid that are in place now)."""
        chunks = [None if lease is None else lease.chunks.get(key) for key, _ in items]
        first = [self._commit_one(chunk, lease, cells) for chunk, (_, cells) in zip(chunks, items, strict=True)]
        # What had to wait may have become READY, or gone, by a later item of this very request.
        return [
            self._outcome(space, chunk) if status is _WAITING_PARENT and chunk is not None else status
            for chunk, status in zip(chunks, first, strict=True)
        ]

    def _commit_one(self, chunk: Chunk | None, lease: WriteLease | None, cells: int) -> CommitStatus:
        draft = None if chunk is None else chunk.draft
        if chunk is None or draft is None or draft.lease is not lease:
            return CommitStatus.FAILED
        draft.covered |= cells
        if draft.covered != chunk.space.grid.whole:
            # Even if the chunk is lost already: other ranks may be copying into the slot, so it cannot be freed yet.
            return CommitStatus.PARTIAL
        if draft.doomed or draft.poisoned or draft.writes:
            # The last: bytes that still arrive would change a READY chunk.
            self._books.counters.failed_chunks += 1
            self._books.give_up(chunk, draft)
            return CommitStatus.FAILED
        self._books.complete(chunk, draft)
        return self._outcome(chunk.space, chunk)

    @staticmethod
    def _outcome(space: Space, chunk: Chunk) -> CommitStatus:
        if space.chunks.get(chunk.key) is not chunk:
            return CommitStatus.FAILED
        return _STORED if chunk.state is _READY else _WAITING_PARENT

    def abort(self, lease: WriteLease, keys: Sequence[bytes]) -> int:
        """Give up ``keys``, or all that the lease still holds; how many that were. Their slots are free at once."""
        aborted = 0
        for key in list(keys or lease.chunks):
            chunk = lease.chunks.get(key)
            if chunk is not None and chunk.draft is not None:
                self._books.give_up(chunk, chunk.draft)
                aborted += 1
        self._books.counters.aborted_chunks += aborted
        return aborted

    def bury(self, book: SessionBook, quarantine_until: float) -> None:
        """The session's writers are proven dead: what they were writing goes, the slots after the quarantine."""
        for lease in list(book.writes.values()):
            for chunk in list(lease.chunks.values()):
                if chunk.draft is not None:
                    self._books.give_up(chunk, chunk.draft, quarantine_until)
                    self._books.counters.quarantined_chunks += 1
