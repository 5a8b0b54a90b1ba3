"""S3-FIFO, leaves first: a small queue that most pass through once, a main queue for those that were used again.

Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. Here a queue holds only what may be evicted;
a node that comes back to it has the place that it had.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from kvd.ledger.ghosts import Ghosts
from kvd.ledger.node import Node

if TYPE_CHECKING:
    from kvd.ledger.index import Space

N = TypeVar("N", bound=Node)

#: The small queue may have this share of the tier.
_SMALL_SHARE = 0.1
_MOST_USES = 3
_SWEEP_SLACK = 64

# A node's mark, from the lowest bit: uses since it came to its place (2), whether that is in the main queue, the place.
_MAIN, _PLACE_AT = 4, 3


class _Queues(Generic[N]):
    """Small and main queue of one size class: heaps by place."""

    __slots__ = ("alive", "heaps", "members", "small")

    def __init__(self) -> None:
        self.heaps: tuple[list[tuple[int, N]], list[tuple[int, N]]] = ([], [])
        self.alive = 0  # nodes that may be evicted
        self.members = 0  # nodes in the tier
        self.small = 0  # of these, in the small queue


class S3Fifo(Generic[N]):
    """A policy of the ``EvictionPolicy`` protocol. O(log n) amortised."""

    def __init__(self) -> None:
        self._queues: dict[int, _Queues[N]] = {}
        self._ghosts = Ghosts()
        self._now = 0
        self._nodes = 0

    def enter(self, node: N) -> None:
        """``node`` goes to the small queue, or to the main one if it was in the tier not long ago."""
        self._nodes += 1
        self._ghosts.limit = self._nodes
        queues = self._queues.setdefault(node.size_class, _Queues())
        main = self._ghosts.take(node.key) is not None
        queues.members += 1
        queues.small += not main
        node.mark = self._place(main)

    def leave(self, node: N) -> None:
        """``node`` has left the tier. Those of the small queue are remembered."""
        self._nodes -= 1
        queues = self._queues[node.size_class]
        queues.members -= 1
        if not node.mark & _MAIN:
            queues.small -= 1
            self._ghosts.put(node.key, self._now, 1)
        node.mark = None
        if not queues.members:
            del self._queues[node.size_class]

    def touch(self, nodes: Sequence[N]) -> None:
        """A request has used ``nodes``."""
        for node in nodes:
            if node.mark & _MOST_USES < _MOST_USES:
                node.mark += 1

    def missed(self, space: Space, key: bytes) -> None:
        """Nothing to do."""

    def add(self, node: N) -> None:
        """``node`` may be evicted from now on."""
        queues = self._queues[node.size_class]
        queues.alive += 1
        node.evictable = True
        if not node.queued:
            self._push(queues, node)

    def discard(self, node: N) -> None:
        """``node`` may not be evicted any more."""
        if not node.evictable:
            return
        node.evictable = False
        queues = self._queues[node.size_class]
        queues.alive -= 1
        if sum(map(len, queues.heaps)) > 2 * queues.alive + _SWEEP_SLACK:
            small, main = queues.heaps
            queues.heaps = self._swept(small), self._swept(main)

    def coldest(self, size_class: int) -> N | None:
        """The next victim; those before it that were used go to the main queue, or to its end."""
        queues = self._queues.get(size_class)
        while queues is not None and queues.alive:
            small, main = (self._first(heap) for heap in queues.heaps)
            node = small if main is None or (small is not None and self._small_is_full(queues)) else main
            if node is None:
                break
            uses = node.mark & _MOST_USES
            if not uses or (not node.mark & _MAIN and uses < 2):
                return node
            heapq.heappop(queues.heaps[bool(node.mark & _MAIN)])
            if node.mark & _MAIN:
                node.mark = self._place(True) + uses - 1
            else:
                queues.small -= 1
                node.mark = self._place(True)
            self._push(queues, node)
        return None

    def admits(self, space: Space, key: bytes, parent: N | None, victim: N) -> bool:
        """Always."""
        return True

    def __contains__(self, node: object) -> bool:
        return isinstance(node, Node) and node.evictable

    def __len__(self) -> int:
        return sum(queues.alive for queues in self._queues.values())

    # ------------------------------------------------------------ inside

    def _place(self, main: bool) -> int:
        self._now += 1
        return self._now << _PLACE_AT | (_MAIN if main else 0)

    @staticmethod
    def _small_is_full(queues: _Queues[N]) -> bool:
        return queues.small > queues.members * _SMALL_SHARE

    @staticmethod
    def _push(queues: _Queues[N], node: N) -> None:
        node.queued = True
        heapq.heappush(queues.heaps[bool(node.mark & _MAIN)], (node.mark >> _PLACE_AT, node))

    @staticmethod
    def _first(heap: list[tuple[int, N]]) -> N | None:
        while heap:
            node = heap[0][1]
            if node.evictable:
                return node
            node.queued = False
            heapq.heappop(heap)
        return None

    @staticmethod
    def _swept(heap: list[tuple[int, N]]) -> list[tuple[int, N]]:
        for _, node in heap:
            node.queued = node.evictable
        kept = [entry for entry in heap if entry[1].evictable]
        heapq.heapify(kept)
        return kept
