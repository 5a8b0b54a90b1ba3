"""What stands in for memory and disks when nothing is stored: slots and records that are only counted."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kvd.ledger.books import SlabWindow
from kvd.ledger.orders import Orders
from kvd.ledger.reclaiming import LIVE_SHARE
from kvd.types import Location, Outcome, Place, Result
from kvd.wire.lifeline import GRANULE_BYTES

#: Size of every chunk, slot and record.
CHUNK_BYTES = GRANULE_BYTES
_RECORDS_PER_EXTENT = 1024


class EqualSlots:
    """The ``Slots`` of a pool of exactly so many chunks."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._fresh = 0
        self._freed: list[int] = []

    @property
    def total_bytes(self) -> int:
        """Bytes of all slots."""
        return self._slots * CHUNK_BYTES

    @property
    def free_bytes(self) -> int:
        """Bytes of the free ones."""
        return self.total_bytes - self.taken_bytes

    @property
    def taken_bytes(self) -> int:
        """Bytes of those in use."""
        return (self._fresh - len(self._freed)) * CHUNK_BYTES

    def room_bytes(self, slot_bytes: int) -> int:
        """All that is free."""
        return self.free_bytes

    def slot_bytes(self, chunk_bytes: int) -> int:
        """All are equal."""
        return CHUNK_BYTES

    def allocate(self, slot_bytes: int, near: int | None = None) -> int | None:
        """Offset of a free slot, or None."""
        if self._freed:
            return self._freed.pop()
        if self._fresh == self._slots:
            return None
        self._fresh += 1
        return (self._fresh - 1) * CHUNK_BYTES

    def free(self, offset: int) -> None:
        """Take a slot back."""
        self._freed.append(offset)

    def claim(self, offset: int, slot_bytes: int) -> None:
        """There was no former life."""
        raise ValueError("a replay has no former life")

    def slab_of(self, offset: int) -> int:
        """All slots are of one slab."""
        return 0

    def used_slots(self, slab_offset: int) -> Iterator[int]:
        """Slots in use."""
        return iter(sorted(set(range(0, self._fresh * CHUNK_BYTES, CHUNK_BYTES)) - set(self._freed)))

    def windows(self, slot_bytes: int) -> Iterator[SlabWindow]:
        """There is one size of slots, so none has to make way for another."""
        return iter(())

    def audit(self) -> list[str]:
        """Nothing can disagree."""
        return []


class NoGenerations:
    """A generation table that nobody reads."""

    def publish(self, location: Location) -> None:
        """Nothing."""

    def retract(self, location: Location) -> None:
        """Nothing."""


class EqualRecords:
    """The ``ExtentSpace`` of disks that hold exactly so many records, and never have to move any."""

    def __init__(self, records: int) -> None:
        # The books keep what is live below a share of the disks; that share is what counts here.
        self.total_bytes = math.ceil(records * CHUNK_BYTES / LIVE_SHARE)
        self.live_bytes = 0
        self.last_sequence = 0
        self.free_extents = 1
        self.kept_extents = 0

    def record_bytes(self, payload_bytes: int) -> int:
        """Headers are not counted."""
        return payload_bytes

    def fits(self, payload_bytes: int) -> bool:
        """Always."""
        return True

    def allocate(self, payload_bytes: int, *, moving: bool = False) -> Place | None:
        """A place for a record, None when all are taken and nothing can be dropped."""
        if self.live_bytes + payload_bytes > self.total_bytes * LIVE_SHARE:
            return None
        self.live_bytes += payload_bytes
        self.last_sequence += 1
        extent, slot = divmod(self.last_sequence, _RECORDS_PER_EXTENT)
        return Place(0, extent, slot * CHUNK_BYTES, payload_bytes, self.last_sequence)

    def release(self, place: Place) -> None:
        """The record is dead."""
        self.live_bytes -= place.record_bytes

    def adopt(self, place: Place) -> None:
        """There was no former life."""

    def emptiest(self) -> tuple[int, int] | None:
        """Nothing has to be moved."""
        return None

    def live_in(self, drive: int, extent: int) -> int:
        """Nothing is asked."""
        return 0

    def dead_in(self, drive: int, extent: int) -> int:
        """Nothing is asked."""
        return 0

    def works(self, drive: int) -> bool:
        """Always."""
        return True

    def audit(self) -> list[str]:
        """Nothing can disagree."""
        return []


def carry_out(orders: Orders) -> None:
    """Answer all orders, and those that follow from the answers, at once: the bytes have been moved."""
    while new := orders.take():
        for order in new:
            orders.finish(Result(order.ticket, Outcome.OK))
