"""Eviction policies: which of the chunks that may go is to go next."""

from __future__ import annotations

import heapq
from typing import Protocol

from kvd.ledger.chunk import Chunk

#: Entries of chunks that may not go any more are swept when they outnumber the others by this many.
_SWEEP_SLACK = 64


class EvictionPolicy(Protocol):
    """Knows the chunks that may be evicted: READY, nothing below them in the books, held by nobody.

    Every operation must be O(1) or O(log n), amortised, and the memory bounded by the chunks in the books.
    Victims are asked for by slot size: a slot of another size is no help.
    """

    def add(self, chunk: Chunk) -> None:
        """``chunk`` may be evicted from now on. It was not known before."""

    def discard(self, chunk: Chunk) -> None:
        """``chunk`` may not be evicted any more, or is gone. Nothing happens when it is not known."""

    def touch(self, chunk: Chunk) -> None:
        """A request has used ``chunk``, known or not: ``chunk.touched`` is new."""

    def coldest(self, slot_bytes: int) -> Chunk | None:
        """The next victim with a slot of this size; it stays known. None when there is none."""

    def __contains__(self, chunk: object) -> bool:
        """Whether ``chunk`` is known."""

    def __len__(self) -> int:
        """How many chunks are known."""


class _Queue:
    """The chunks of one slot size: a heap by the stamp that each had when it was pushed."""

    __slots__ = ("alive", "heap")

    def __init__(self) -> None:
        self.heap: list[tuple[int, Chunk]] = []
        self.alive = 0


class LeafLru:
    """Evicts the leaf that was used the longest ago. A policy of the ``EvictionPolicy`` protocol.

    A chunk has at most one entry in the heap. Touching a chunk and taking it out only mark it; the entry is set
    right when it comes to the top. So both are O(1), and a lookup that leases a leaf and releases it moves nothing.
    """

    def __init__(self) -> None:
        self._queues: dict[int, _Queue] = {}

    def add(self, chunk: Chunk) -> None:
        """``chunk`` may be evicted from now on. O(log n), O(1) when its entry is still there."""
        slot_bytes = chunk.space.slot_bytes
        queue = self._queues.get(slot_bytes)
        if queue is None:
            queue = self._queues[slot_bytes] = _Queue()
        queue.alive += 1
        chunk.evictable = True
        if not chunk.queued:
            chunk.queued = True
            heapq.heappush(queue.heap, (chunk.touched, chunk))

    def discard(self, chunk: Chunk) -> None:
        """``chunk`` may not be evicted any more. O(1), amortised."""
        if not chunk.evictable:
            return
        chunk.evictable = False
        queue = self._queues[chunk.space.slot_bytes]
        queue.alive -= 1
        if len(queue.heap) > 2 * queue.alive + _SWEEP_SLACK:
            self._sweep(queue)
        if not queue.heap:
            del self._queues[chunk.space.slot_bytes]

    def touch(self, chunk: Chunk) -> None:
        """Nothing to do: the entry is set right when it comes to the top."""

    def coldest(self, slot_bytes: int) -> Chunk | None:
        """The leaf of this slot size with the oldest stamp. O(log n), amortised."""
        queue = self._queues.get(slot_bytes)
        while queue is not None and queue.heap:
            stamp, chunk = queue.heap[0]
            if not chunk.evictable:
                heapq.heappop(queue.heap)
                chunk.queued = False
            elif chunk.touched != stamp:
                heapq.heapreplace(queue.heap, (chunk.touched, chunk))
            else:
                return chunk
        if queue is not None:
            del self._queues[slot_bytes]
        return None

    def __contains__(self, chunk: object) -> bool:
        return isinstance(chunk, Chunk) and chunk.evictable

    def __len__(self) -> int:
        return sum(queue.alive for queue in self._queues.values())

    @staticmethod
    def _sweep(queue: _Queue) -> None:
        kept = []
        for _, chunk in queue.heap:
            if chunk.evictable:
                kept.append((chunk.touched, chunk))
            else:
                chunk.queued = False
        queue.heap = kept
        heapq.heapify(kept)
