"""The tree of prefixes of one tier: holds, uses, and what the eviction policy is told of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from kvd.ledger.eviction import EvictionPolicy
from kvd.ledger.expiry import Expiry
from kvd.ledger.node import Node
from kvd.ledger.shares import SharedPolicy

if TYPE_CHECKING:
    from kvd.ledger.index import Space
    from kvd.ledger.pins import Pinned

N = TypeVar("N", bound=Node)


def _nothing() -> None:
    """Who is asked for uses that wait when none do."""


class Tree(Generic[N]):
    """Nodes of one tier, every one the child of a node of the same tier or a root."""

    def __init__(self, policy: EvictionPolicy[N]) -> None:
        self.policy = policy
        self.shares: SharedPolicy[N] | None = policy if isinstance(policy, SharedPolicy) else None
        self.pins: Pinned[N] | None = None
        self.expiry = Expiry()
        self.last_stamp = 0
        #: Puts uses that wait (``kvd.ledger.uses``) into the tree; called before anything is decided by them.
        self.settle: Callable[[], None] = _nothing

    def hold(self, node: N) -> None:
        """One more reason not to evict ``node``. O(1), and O(depth) when nothing of its prefix was held."""
        if node.evictable:  # what is above it is not: it has children
            self.policy.discard(node)
        at: N | None = node
        while at is not None:
            at.holds += 1
            if at.holds > 1:
                return
            at = at.parent

    def unhold(self, node: N) -> None:
        """One reason less."""
        at: N | None = node
        while at is not None:
            at.holds -= 1
            if at.holds:
                break
            at = at.parent
        if not node.holds and node.first_child is None:
            self.policy.add(node)

    def touch(self, node: N) -> None:
        """A request has used ``node``, which is in the policy's hands."""
        self.use((node,), self.stamps(1))

    def stamps(self, count: int) -> int:
        """Give out ``count`` stamps; the one before the first of them."""
        before = self.last_stamp
        self.last_stamp = before + count
        return before

    def use(self, nodes: Sequence[N], stamp: int) -> None:
        """A request has used ``nodes`` of one namespace, parents before their children, all in the policy's hands.
        They get the stamps after ``stamp``, which were given out for them."""
        for node in nodes:
            stamp += 1
            node.touched = stamp
            node.uses += 1
        self.policy.touch(nodes)

    def lift(self, node: N | None) -> None:
        """Something below ``node`` is going to be used: ``node`` and all above it are not to expire before it."""
        if node is not None and node.touched <= self.expiry.opened:
            self.settle()  # a use of it may wait
        path = []
        while node is not None and node.touched <= self.expiry.opened:
            path.append(node)
            node = node.parent
        for one in reversed(path):
            self.touch(one)

    def advance(self, now: float) -> None:
        """It is ``now``: what is used from here on is used then."""
        self.expiry.advance(now, self.last_stamp)

    def expired(self, node: N) -> bool:
        """Whether ``node`` was not used for so long that nobody is to find it any more."""
        return node.touched <= self.expiry.dead and (self.pins is None or node not in self.pins)

    def charge(self, space: Space, change_bytes: int) -> None:
        """``space`` takes so much more of the tier, or (below 0) less."""
        if self.shares is not None:
            self.shares.charge(space.namespace, change_bytes)

    def _stamp(self, node: N) -> None:
        """Mark ``node`` as used now."""
        self.last_stamp = node.touched = self.last_stamp + 1
        node.uses += 1

    def _unlink(self, node: N) -> None:
        """Take a node without children from its parent."""
        parent = node.parent
        if parent is None:
            return
        node.leave()
        if node.holds:
            self.unhold(parent)
        elif parent.first_child is None and not parent.holds:
            self.policy.add(parent)
