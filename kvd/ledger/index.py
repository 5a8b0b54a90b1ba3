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

    def ready_prefix(self, keys: Sequence[bytes]) -> list[Chunk]:
        """The longest prefix of ``keys`` of READY chunks, each the child of the one before, the first a root."""
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
