"""The prefix index: per namespace the chunks by key, and the tenants that the namespaces belong to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvd.ledger.chunk import Chunk
from kvd.ledger.coverage import Grid
from kvd.types import ChunkState, Namespace

if TYPE_CHECKING:
    from kvd.ledger.records import Record


@dataclass(slots=True, eq=False)
class Space:
    """The books of one namespace: its chunks in the pool and its records on the disks.

    The three counts are of slots: together, what the namespace has in the pool.
    """

    namespace: Namespace
    slot_bytes: int
    grid: Grid
    chunks: dict[bytes, Chunk] = field(default_factory=dict)
    records: dict[bytes, Record] = field(default_factory=dict)
    sessions: int = 0  # that have it open
    touched: int = 0  # stamp of the last request
    ready: int = 0  # READY and STALE
    writing: int = 0  # WRITING and WAITING
    leaving: int = 0  # of no chunk any more, not free yet
    record_bytes: int = 0  # of all records on the disks

    @property
    def slots(self) -> int:
        """Slots in the pool, whatever their state."""
        return self.ready + self.writing + self.leaving

    def sound_record(self, key: bytes) -> Record | None:
        """The record of ``key``, if there is one that is not known to be damaged."""
        record = self.records.get(key)
        return None if record is None or record.condemned else record

    def in_pool(self, key: bytes) -> bool:
        """Whether ``key`` has a chunk that is READY or STALE."""
        chunk = self.chunks.get(key)
        return chunk is not None and chunk.draft is None

    def ready_prefix(self, keys: Sequence[bytes]) -> list[Chunk]:
        """The longest prefix of ``keys`` of READY chunks, each the child of the one before, the first a root.

        A key names all before it, and what is READY has a READY parent. So the deepest is found by bisection, and the
        others by climbing from it; they are walked one by one only if they turn out not to be of one prefix.
        """
        at: Chunk | None = None
        get = self.chunks.get
        ready = ChunkState.READY
        there, gone = -1, len(keys)
        middle = gone - 1
        while there < middle:
            chunk = get(keys[middle])
            if chunk is not None and chunk.state is ready:
                there, at = middle, chunk
            else:
                gone = middle
            middle = (there + gone) // 2
        found: list[Chunk] = []
        for key in reversed(keys[: there + 1]):
            if at is None or at.key != key:
                return self._walk(keys)
            found.append(at)
            at = at.parent
        if at is not None:
            return self._walk(keys)
        found.reverse()
        return found

    def _walk(self, keys: Sequence[bytes]) -> list[Chunk]:
        """``ready_prefix``, whatever the keys are."""
        found: list[Chunk] = []
        previous: Chunk | None = None
        get = self.chunks.get
        ready = ChunkState.READY
        for key in keys:
            chunk = get(key)
            if chunk is None or chunk.state is not ready or chunk.parent is not previous:
                break
            found.append(chunk)
            previous = chunk
        return found

    def being_written(self, keys: Iterable[bytes], previous: Chunk | None) -> int:
        """How many of ``keys``, from the first on, continue the prefix that ends in ``previous`` and are not READY."""
        count = 0
        for key in keys:
            chunk = self.chunks.get(key)
            if chunk is None or chunk.draft is None or chunk.parent is not previous:
                break
            count += 1
            previous = chunk
        return count
