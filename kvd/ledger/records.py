"""The books of the disks: every record, the space that it takes, and the steps from one consistent state to the next.

A record's parent has a record too, so whatever lies on the disks can be reached from its root. Records are evicted
leaves first, like chunks, by a policy of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvd.ledger.eviction import EvictionPolicy
from kvd.ledger.index import Space
from kvd.ledger.node import Node
from kvd.ledger.terms import ExtentSpace, Presence, Unpublished
from kvd.ledger.tree import Tree
from kvd.types import Place


@dataclass(slots=True, eq=False)
class Record(Node):
    """One record on a disk. Reasons to hold it: it is being read or moved, or pinned."""

    place: Place
    #: Found damaged: nobody reads it any more, and it goes as soon as nobody holds it.
    condemned: bool = False
    moving: bool = False  # on its way to another place
    #: Reads under way, and where they read if the record was moved meanwhile: that place is not free before they end.
    reads: int = 0
    left: Place | None = None


def _ignore(space: Space) -> None:
    """Who hears of empty namespaces when nobody does."""


class Records(Tree[Record]):
    """State and transitions, as in ``Books``. Also knows which records each extent holds."""

    def __init__(self, extents: ExtentSpace, policy: EvictionPolicy[Record]) -> None:
        super().__init__(policy)
        self.extents = extents
        self.by_extent: dict[tuple[int, int], set[Record]] = {}
        self.count = 0
        #: Hears of every namespace of which no record is left.
        self.on_empty: Callable[[Space], None] = _ignore
        #: Where clients see which keys can be found; the same as the books'.
        self.presence: Presence = Unpublished()

    def add(
        self, space: Space, key: bytes, parent: Record | None, place: Place, uses: int = 0, *, settle: bool = True
    ) -> Record:
        """A new record at ``place``, which is allocated. ``uses``: of the chunk so far, this one not included.

        Without ``settle`` it has to be ``settled`` before anything can be evicted: when its children have come, maybe.
        """
        self.lift(parent)
        record = Record(key, space, self.last_stamp, place, uses=uses)
        self._stamp(record)
        space.records[key] = record
        if not space.in_pool(key):
            self.presence.add(space.namespace.id, key)
        space.record_bytes += place.record_bytes
        self.charge(space, place.record_bytes)
        self._enter_extent(record)
        self.count += 1
        if parent is not None:
            if parent.first_child is None:
                self.policy.discard(parent)
            parent.adopt(record)
        self.policy.enter(record)
        if self.pins is not None:
            self.pins.entered(record)
        if settle:
            self.settled(record)
        return record

    def settled(self, record: Record) -> None:
        """A record that is new may be evicted from now on, unless something else forbids it."""
        if record.first_child is None and not record.holds:
            self.policy.add(record)

    def readable(self, record: Record) -> bool:
        """Whether the record may be read now: it is sound as far as is known, and its drive works."""
        return not record.condemned and self.extents.works(record.place.drive)

    def begin_read(self, record: Record) -> Place:
        """Somebody reads the record: it is held, and the place that this returns stays as it is."""
        self.hold(record)
        record.reads += 1
        return record.place

    def end_read(self, record: Record) -> int:
        """The end of ``begin_read``. How many records went, because they had been condemned meanwhile."""
        record.reads -= 1
        if not record.reads and record.left is not None:
            self.extents.release(record.left)
            record.left = None
        return self.let_go(record)

    def movable(self, record: Record) -> bool:
        """Whether the record may be given another place now."""
        return not record.moving and not record.condemned and record.left is None

    def move(self, record: Record, place: Place) -> None:
        """The record's bytes are at ``place`` now."""
        former = record.place
        self._leave_extent(record)
        if record.reads:
            record.left = former
        else:
            self.extents.release(former)
        record.space.record_bytes += place.record_bytes
        self.charge(record.space, place.record_bytes)
        record.place = place
        self._enter_extent(record)

    def drop(self, top: Record) -> int:
        """Forget ``top`` and all below it, leaves first; ``top.holds`` must be 0. How many records that were."""
        subtree = top.subtree()
        for record in reversed(subtree):
            self.policy.discard(record)
            self.policy.leave(record)
            self._unlink(record)
            del record.space.records[record.key]
            self._hide(record)
            chunk = record.space.chunks.get(record.key)
            if chunk is not None and chunk.record is record:
                chunk.record = None
            self._leave_extent(record)
            self.extents.release(record.place)
            self.count -= 1
        if not top.space.records:
            self.on_empty(top.space)
        return len(subtree)

    def condemn(self, top: Record) -> int:
        """``top`` is damaged: it goes, and all below it, now or when the last of them is let go of.

        How many records went now.
        """
        for record in top.subtree():
            self._hide(record)
            record.condemned = True
            if self.pins is not None:
                self.pins.leaves(record)
        return 0 if top.holds else self.drop(top)

    def let_go(self, record: Record) -> int:
        """End a hold; what was condemned meanwhile goes. How many records went."""
        self.unhold(record)
        gone = 0
        while record.condemned and not record.holds:
            parent = record.parent
            gone += self.drop(record)
            if parent is None:
                break
            record = parent
        return gone

    def lost(self, drive: int, extents: Iterable[int]) -> int:
        """What lay in these extents is not there any more. How many records went now."""
        gone = 0
        for extent in extents:
            for record in list(self.by_extent.get((drive, extent), ())):
                if record.space.records.get(record.key) is record:
                    gone += self.condemn(record)
        return gone

    def _hide(self, record: Record) -> None:
        """The record cannot be found any more, if it could until now."""
        if not record.condemned and not record.space.in_pool(record.key):
            self.presence.remove(record.space.namespace.id, record.key)

    def _enter_extent(self, record: Record) -> None:
        where = (record.place.drive, record.place.extent)
        inside = self.by_extent.get(where)
        if inside is None:
            inside = self.by_extent[where] = set()
        inside.add(record)

    def _leave_extent(self, record: Record) -> None:
        where = (record.place.drive, record.place.extent)
        inside = self.by_extent[where]
        inside.discard(record)
        if not inside:
            del self.by_extent[where]
        record.space.record_bytes -= record.place.record_bytes
        self.charge(record.space, -record.place.record_bytes)
