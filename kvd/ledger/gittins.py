"""The eviction policy that learns: the leaf goes whose place is worth least.

Leaves are in queues by class, which is how often their key was used so far (1, 2-3, 4-7, ...), uses before an earlier
eviction included. Per class the time to the next use is learnt (``kvd.ledger.reuse``), of what was evicted as well. The
victim is the leaf with the lowest index at its age; who comes to a full tier must be worth more than the victim. Time
is counted in uses: those of the tier's nodes, arrivals, and those who were turned away. Until enough was seen the index
is one over the age, which is leaf-first LRU.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from kvd.ledger.ghosts import MAX_USES, Ghosts
from kvd.ledger.node import Node
from kvd.ledger.reuse import ReuseTimes, bucket

if TYPE_CHECKING:
    from kvd.ledger.index import Space

N = TypeVar("N", bound=Node)

#: Ghosts per node of the tier, and at least so many: small tiers forget what they evict too soon otherwise.
_GHOSTS_PER_NODE = 4
_LEAST_GHOSTS = 1 << 16
#: Entries of nodes that may not go any more are swept when they outnumber the others by this many.
_SWEEP_SLACK = 64

# A node's mark, from the lowest bit: group by cost, uses, depth in chunks, time of its last use.
_USES_AT, _DEPTH_AT, _TIME_AT = 4, 14, 34
_GROUPS = 1 << _USES_AT
_ONE_USE = 1 << _USES_AT
_USES_MASK = MAX_USES << _USES_AT
_DEPTH_MASK = (1 << _TIME_AT - _DEPTH_AT) - 1
_STAYS = (1 << _TIME_AT) - 1
#: From the mark of a node to that of a child that was last used right after it, and as often.
_CHILD = 1 << _TIME_AT | 1 << _DEPTH_AT
_GHOST_TIME = (1 << 34) - 1

#: Tokens before a chunk that double its cost. Chunks are grouped by them from an eighth of that, in doublings.
_COST_TOKENS = 32 * 1024
_GROUP_TOKENS = _COST_TOKENS // 8


class _Shelf(Generic[N]):
    """The leaves of one size class: heaps by last use, of one class and group each."""

    __slots__ = ("alive", "entries", "heaps")

    def __init__(self) -> None:
        self.heaps: dict[int, list[tuple[int, N]]] = {}
        self.alive = 0
        self.entries = 0


class Gittins(Generic[N]):
    """A policy of the ``EvictionPolicy`` protocol. Every operation is O(1) or O(log n) amortised, a victim O(classes).

    ``recompute_weight``: what is deep in a prompt costs more to compute again, 1 + weight x (tokens before it) / 32K,
    and is worth so much more. 0 counts every chunk alike, which gives the most hits; 1 is the work of a usual model.

    A node has at most one good entry in the heaps: ``queued``. Taking it out only marks it; a use makes the entry bad.
    """

    def __init__(self, recompute_weight: float = 0.0) -> None:
        self._weight = recompute_weight
        self._costs = [1.0 + recompute_weight * _middle(group) / _COST_TOKENS for group in range(_GROUPS)]
        self._shelves: dict[int, _Shelf[N]] = {}
        self._reuse = ReuseTimes()
        self._ghosts = Ghosts()
        self._now = 1
        self._nodes = 0

    def enter(self, node: N) -> None:
        """``node`` is in the tier from now on. What is known of its key comes back to it."""
        now = self._tick()
        self._nodes += 1
        self._ghosts.limit = max(_LEAST_GHOSTS, _GHOSTS_PER_NODE * self._nodes)
        uses, depth = self._recall(node.key, now) + 1, _below(node.parent)
        if uses < node.uses:
            uses = node.uses
        if uses > MAX_USES:
            uses = MAX_USES
        group = self._group(node.space, depth) if self._weight else 0
        node.mark = now << _TIME_AT | depth << _DEPTH_AT | uses << _USES_AT | group
        self._reuse.began(uses.bit_length(), now)

    def leave(self, node: N) -> None:
        """``node`` has left the tier, and is a ghost."""
        self._nodes -= 1
        mark = node.mark
        node.mark = None
        self._remember(node.key, mark >> _TIME_AT, (mark & _USES_MASK) >> _USES_AT)

    def touch(self, nodes: Sequence[N]) -> None:
        """A request has used ``nodes``. Every hit comes through here: a run of those that were last used together, and
        as often, is learnt as one."""
        while len(nodes) >= (left := self._reuse.due - self._now):  # it is due when one of them is used
            self._touch(nodes[: left - 1])
            self._reuse.learn(self._now + 1)
            nodes = nodes[left - 1 :]
        self._touch(nodes)

    def _touch(self, nodes: Sequence[N]) -> None:
        step, first = _CHILD, self._now + 1
        mark = after = 0
        for now, node in enumerate(nodes, first):
            mark += step
            after += step
            if node.mark != mark:
                self._learn_run(mark - step, after - step, first, now)
                first, mark = now, node.mark
                after = now << _TIME_AT | (mark & _STAYS) + (_ONE_USE if mark & _USES_MASK < _USES_MASK else 0)
            node.mark = after
            if node.queued:
                node.queued = False
                if node.evictable:
                    self._queue(self._shelves[node.size_class], node)
        self._now += len(nodes)
        self._learn_run(mark, after, first, self._now + 1)

    def missed(self, space: Space, key: bytes) -> None:
        """A request had to do without a place for ``key``: a use, all the same."""
        now = self._tick()
        uses = min(self._recall(key, now) + 1, MAX_USES)
        self._reuse.began(uses.bit_length(), now)
        self._remember(key, now, uses)

    def add(self, node: N) -> None:
        """``node`` may be evicted from now on. O(log n), O(1) when its entry is still there."""
        shelf = self._shelves.get(node.size_class)
        if shelf is None:
            shelf = self._shelves[node.size_class] = _Shelf()
        shelf.alive += 1
        node.evictable = True
        if not node.queued:
            self._queue(shelf, node)

    def discard(self, node: N) -> None:
        """``node`` may not be evicted any more. O(1), amortised."""
        if not node.evictable:
            return
        node.evictable = False
        shelf = self._shelves[node.size_class]
        shelf.alive -= 1
        if shelf.entries > 2 * shelf.alive + _SWEEP_SLACK:
            self._sweep(shelf)
        if not shelf.entries:
            del self._shelves[node.size_class]

    def coldest(self, size_class: int) -> N | None:
        """The leaf of this size class that is worth least, of equals the one used the longest ago."""
        shelf = self._shelves.get(size_class)
        best: N | None = None
        if shelf is None or not shelf.alive:
            return best
        now, worths, costs = self._now + 1, self._reuse.worth, self._costs
        least = float("inf")
        least_at = 0
        for place, heap in list(shelf.heaps.items()):
            used_at, node = heap[0]
            if not node.evictable or node.mark >> _TIME_AT != used_at:
                top = self._top(shelf, heap)
                if top is None:
                    del shelf.heaps[place]
                    continue
                used_at, node = top
            worth = worths[place >> _USES_AT][bucket(now - used_at)] * costs[place & _GROUPS - 1]
            if worth < least or (worth == least and used_at < least_at):
                least, least_at, best = worth, used_at, node
        return best

    def admits(self, space: Space, key: bytes, parent: N | None, victim: N) -> bool:
        """Whether ``key``, arriving now below ``parent``, is worth as much as ``victim``."""
        if not self._reuse.learnt:
            return True
        uses = min(self._ghosts.peek(key) + 1, MAX_USES)
        worths = self._reuse.worth
        mark: int = victim.mark
        there = worths[((mark & _USES_MASK) >> _USES_AT).bit_length()][bucket(self._now + 1 - (mark >> _TIME_AT))]
        group = self._group(space, _below(parent)) if self._weight else 0
        here = worths[uses.bit_length()][0] * self._costs[group]
        return here >= there * self._costs[mark & _GROUPS - 1]

    def __contains__(self, node: object) -> bool:
        return isinstance(node, Node) and node.evictable

    def __len__(self) -> int:
        return sum(shelf.alive for shelf in self._shelves.values())

    # ------------------------------------------------------------ inside

    def _tick(self) -> int:
        self._now = now = self._now + 1
        if now >= self._reuse.due:
            self._reuse.learn(now)
        return now

    def _learn_run(self, mark: int, after: int, first: int, end: int) -> None:
        """What was used from ``first`` up to before ``end``; the marks of the last of it, as it was and as it is."""
        if first < end:
            number = ((mark & _USES_MASK) >> _USES_AT).bit_length()
            following = ((after & _USES_MASK) >> _USES_AT).bit_length()
            age = (after >> _TIME_AT) - (mark >> _TIME_AT)
            self._reuse.again(number, following, first - age, first, end - first)

    def _recall(self, key: bytes, now: int) -> int:
        """How often ``key`` was used before; it is a ghost no longer."""
        ghost = self._ghosts.take(key)
        if ghost is None:
            return 0
        used_at, uses = ghost
        self._reuse.used(uses.bit_length(), self._unwrapped(used_at), now)
        return uses

    def _remember(self, key: bytes, used_at: int, uses: int) -> None:
        forgotten = self._ghosts.put(key, used_at, uses)
        if forgotten is not None:
            used_at, uses = forgotten
            self._reuse.lost(uses.bit_length(), self._unwrapped(used_at), self._now)

    def _unwrapped(self, used_at: int) -> int:
        """A time that was remembered modulo 2**34: the latest that it can be."""
        return self._now - (self._now - used_at & _GHOST_TIME)

    def _group(self, space: Space, depth: int) -> int:
        identity = space.namespace.identity
        tokens = depth * identity.block_tokens * identity.chunk_blocks
        return min((tokens // _GROUP_TOKENS).bit_length(), _GROUPS - 1)

    def _queue(self, shelf: _Shelf[N], node: N) -> None:
        mark = node.mark
        place = ((mark & _USES_MASK) >> _USES_AT).bit_length() << _USES_AT | mark & _GROUPS - 1
        heap = shelf.heaps.get(place)
        if heap is None:
            heap = shelf.heaps[place] = []
        node.queued = True
        heapq.heappush(heap, (mark >> _TIME_AT, node))
        shelf.entries += 1
        if shelf.entries > 2 * shelf.alive + _SWEEP_SLACK:
            self._sweep(shelf)

    def _top(self, shelf: _Shelf[N], heap: list[tuple[int, N]]) -> tuple[int, N] | None:
        """The first good entry of a heap; the bad ones before it go."""
        while heap:
            used_at, node = heap[0]
            good = node.queued and node.mark is not None and node.mark >> _TIME_AT == used_at
            if good and node.evictable:
                return heap[0]
            if good:
                node.queued = False
            heapq.heappop(heap)
            shelf.entries -= 1
        return None

    @staticmethod
    def _sweep(shelf: _Shelf[N]) -> None:
        shelf.entries = 0
        for place, heap in list(shelf.heaps.items()):
            kept = []
            for used_at, node in heap:
                if node.mark is None or node.mark >> _TIME_AT != used_at:
                    continue
                if node.evictable:
                    kept.append((used_at, node))
                else:
                    node.queued = False
            if kept:
                heapq.heapify(kept)
                shelf.heaps[place] = kept
                shelf.entries += len(kept)
            else:
                del shelf.heaps[place]


def _below(parent: Node | None) -> int:
    """The depth of a child of ``parent``."""
    if parent is None or parent.mark is None:
        return 0
    depth: int = parent.mark >> _DEPTH_AT & _DEPTH_MASK
    return min(depth + 1, _DEPTH_MASK)


def _middle(group: int) -> float:
    """Tokens before the chunks of a group, on average."""
    return 0.0 if not group else 0.75 * _GROUP_TOKENS * (1 << group)
