"""Eviction policies: which of the nodes that may go is to go next."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from kvd.ledger.node import Node

if TYPE_CHECKING:
    from kvd.ledger.index import Space

#: Entries of nodes that may not go any more are swept when they outnumber the others by this many.
_SWEEP_SLACK = 64

N = TypeVar("N", bound=Node)


class EvictionPolicy(Protocol[N]):
    """Knows the nodes of one tier (chunks in the pool, or records on the disks) and says which is to go next.

    ``enter`` and ``leave`` tell what is in the tier, ``add`` and ``discard`` what of that may be evicted: nothing below
    it in the tier, held by nobody. Every operation must be O(1) or O(log n), amortised, and the memory bounded by the
    nodes in the tier, what is remembered of those that left it included. Victims are asked for by size class: a node of
    another one is no help. ``node.touched`` rises with every use of a node of the tier; a policy may count for itself.
    """

    def enter(self, node: N) -> None:
        """``node`` is in the tier from now on, used for the first time since: ``touched`` and ``uses`` are set."""

    def leave(self, node: N) -> None:
        """``node`` has left the tier: evicted or dropped. It has been discarded before."""

    def add(self, node: N) -> None:
        """``node`` may be evicted from now on. It was not evictable before."""

    def discard(self, node: N) -> None:
        """``node`` may not be evicted any more, or is gone. Nothing happens when it could not be."""

    def touch(self, nodes: Sequence[N]) -> None:
        """A request has used ``nodes``, all of one namespace, evictable or not, parents before their children."""

    def coldest(self, size_class: int) -> N | None:
        """The next victim of this size class; it stays known. None when there is none."""

    def admits(self, space: Space, key: bytes, parent: N | None, victim: N) -> bool:
        """Whether ``key``, which would come in below ``parent`` in place of ``victim``, is worth as much as that."""

    def missed(self, space: Space, key: bytes) -> None:
        """A request would have stored ``key``, and there was no place for it."""

    def __contains__(self, node: object) -> bool:
        """Whether ``node`` may be evicted."""

    def __len__(self) -> int:
        """How many nodes may be evicted."""


class _Queue(Generic[N]):
    """The nodes of one slot size: a heap by the stamp that each had when it was pushed."""

    __slots__ = ("alive", "heap")

    def __init__(self) -> None:
        self.heap: list[tuple[int, N]] = []
        self.alive = 0


class LeafLru(Generic[N]):
    """Evicts the leaf that was used the longest ago. A policy of the ``EvictionPolicy`` protocol.

    A node has at most one entry in the heap. Touching a node and taking it out only mark it; the entry is set
    right when it comes to the top. So both are O(1), and a lookup that leases a leaf and releases it moves nothing.
    """

    def __init__(self) -> None:
        self._queues: dict[int, _Queue[N]] = {}

    def add(self, node: N) -> None:
        """``node`` may be evicted from now on. O(log n), O(1) when its entry is still there."""
        size_class = node.size_class
        queue = self._queues.get(size_class)
        if queue is None:
            queue = self._queues[size_class] = _Queue()
        queue.alive += 1
        node.evictable = True
        if not node.queued:
            node.queued = True
            heapq.heappush(queue.heap, (node.touched, node))

    def discard(self, node: N) -> None:
        """``node`` may not be evicted any more. O(1), amortised."""
        if not node.evictable:
            return
        node.evictable = False
        queue = self._queues[node.size_class]
        queue.alive -= 1
        if len(queue.heap) > 2 * queue.alive + _SWEEP_SLACK:
            self._sweep(queue)
        if not queue.heap:
            del self._queues[node.size_class]

    def enter(self, node: N) -> None:
        """Nothing to do."""

    def leave(self, node: N) -> None:
        """Nothing to do."""

    def touch(self, nodes: Sequence[N]) -> None:
        """Nothing to do: the entry is set right when it comes to the top."""

    def coldest(self, size_class: int) -> N | None:
        """The leaf of this slot size with the oldest stamp. O(log n), amortised."""
        queue = self._queues.get(size_class)
        while queue is not None and queue.heap:
            stamp, node = queue.heap[0]
            if not node.evictable:
                heapq.heappop(queue.heap)
                node.queued = False
            elif node.touched != stamp:
                heapq.heapreplace(queue.heap, (node.touched, node))
            else:
                return node
        if queue is not None:
            del self._queues[size_class]
        return None

    def admits(self, space: Space, key: bytes, parent: N | None, victim: N) -> bool:
        """Always: who is new was used last."""
        return True

    def missed(self, space: Space, key: bytes) -> None:
        """Nothing to do."""

    def __contains__(self, node: object) -> bool:
        return isinstance(node, Node) and node.evictable

    def __len__(self) -> int:
        return sum(queue.alive for queue in self._queues.values())

    @staticmethod
    def _sweep(queue: _Queue[N]) -> None:
        kept = []
        for _, node in queue.heap:
            if node.evictable:
                kept.append((node.touched, node))
            else:
                node.queued = False
        queue.heap = kept
        heapq.heapify(kept)
