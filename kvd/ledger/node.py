"""What a chunk of the pool and a record on a disk have in common: a place in a tree, and a history of use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from kvd.ledger.index import Space


@dataclass(slots=True, eq=False)
class Node:
    """One place in the tree of one tier. Children are a linked list: most nodes have one, so a set each would cost
    more than the rest."""

    key: bytes
    space: Space
    touched: int  # when it was last used: a stamp that no two nodes of a tier share, higher = later
    _: KW_ONLY
    parent: Self | None = None
    first_child: Self | None = None
    next_sibling: Self | None = None
    previous_sibling: Self | None = None
    #: How often a request has used it, the one that brought it included.
    uses: int = 0
    #: Reasons not to evict it, and each child that has a reason itself. So 0 says that the whole subtree may go.
    holds: int = 0
    #: The marks of the eviction policy: whether it may go, whether a queue has an entry for it, anything else.
    evictable: bool = False
    queued: bool = False
    mark: Any = None

    @property
    def size_class(self) -> int:
        """Victims are interchangeable within a size class only: slots of one size, or 0 for bytes on a disk."""
        return 0

    def children(self) -> Iterator[Self]:
        """The children, youngest first. The list must not change meanwhile."""
        child = self.first_child
        while child is not None:
            yield child
            child = child.next_sibling

    def subtree(self) -> list[Self]:
        """This node and all below it, parents before their children."""
        found = [self]
        for node in found:
            found.extend(node.children())
        return found

    def adopt(self, child: Self) -> None:
        """Put ``child`` at the head of the children."""
        child.parent = self
        child.next_sibling = self.first_child
        if self.first_child is not None:
            self.first_child.previous_sibling = child
        self.first_child = child

    def leave(self) -> None:
        """Leave the parent's children."""
        parent, before, after = self.parent, self.previous_sibling, self.next_sibling
        if before is not None:
            before.next_sibling = after
        elif parent is not None:
            parent.first_child = after
        if after is not None:
            after.previous_sibling = before
        self.parent = self.next_sibling = self.previous_sibling = None
