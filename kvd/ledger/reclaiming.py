"""Room on the disks: which records go when they are full, and how whole extents become free again.

Records are appended to extents, so room comes back an extent at a time: the one with the fewest live bytes is emptied
by moving what is still wanted in it. What is live at all is kept below a share of the disks, by dropping the policy's
victims; the remainder is what makes emptying cheap.
"""

from __future__ import annotations

from collections.abc import Callable

from kvd.ledger.orders import Orders
from kvd.ledger.records import Record, Records
from kvd.ledger.terms import Budget, Counters
from kvd.types import ROOT, Move, Namespace, Outcome, Place, Result

#: Live bytes are kept below this share of the disks. At 7/8, moving costs at most 7 bytes per byte gained, and in
#: practice far less: what was written together is dropped together.
LIVE_SHARE = 0.875
#: Records on their way out of an extent at a time.
_MOVES = 8
#: Victims dropped for one allocation, so that no single one takes long.
_DROPS = 16


def _nobody() -> None:
    """Who waits for room when nobody does."""


class Reclaiming:
    """Gives out places and makes room for more. ``on_room`` is called when there may be room again."""

    def __init__(self, orders: Orders, records: Records, counters: Counters, budget: Budget | None) -> None:
        self._budget = budget
        self._orders = orders
        self._records = records
        self._counters = counters
        self._moving = 0
        self.on_room: Callable[[], None] = _nobody

    def drop_for(self, newcomer: Namespace, payload_bytes: int) -> bool:
        """Drop what has to go for a record of ``newcomer``. False: it must not be written, for the sake of shares."""
        records, shares = self._records, self._records.shares
        records.settle()
        size_bytes = records.extents.record_bytes(payload_bytes)
        most = int(records.extents.total_bytes * LIVE_SHARE)
        for _ in range(_DROPS):
            within = shares is None or shares.fits(newcomer, size_bytes)
            if within and records.extents.live_bytes + size_bytes <= most:
                return True
            victim = records.policy.coldest(0) if shares is None else shares.victim(newcomer, size_bytes, 0)
            if victim is None:
                return shares is None
            self._counters.dropped_records += records.drop(victim)
        return shares is None or shares.fits(newcomer, size_bytes)

    def allocate(self, payload_bytes: int) -> Place | None:
        """A place for a record, after ``drop_for``; None when there is none now."""
        extents = self._records.extents
        place = extents.allocate(payload_bytes)
        self.work()
        return place

    def work(self) -> None:
        """Empty extents as long as few are free. Where that would gain nothing, drop what is worth least instead."""
        records, extents = self._records, self._records.extents
        dropped = 0
        while extents.free_extents <= extents.kept_extents and self._moving < _MOVES and dropped < _DROPS:
            where = extents.emptiest()
            inside = () if where is None else records.by_extent.get(where, ())
            if where is None or not inside:
                return
            # Emptied, it takes in what it had and at least one record more.
            if extents.dead_in(*where) * len(inside) >= extents.live_in(*where):
                record = next((record for record in inside if records.movable(record)), None)
                if record is None:
                    return
                if not self._move(record) and (self._moving or not self._clear(where)):
                    return
                continue
            records.settle()
            victim = records.policy.coldest(0)
            if victim is None:
                return
            dropped += 1
            self._counters.dropped_records += records.drop(victim)

    def _clear(self, where: tuple[int, int]) -> bool:
        """Drop what lies in an extent: there is nowhere to move it to, and nothing under way that would change that."""
        gone = 0
        for record in list(self._records.by_extent.get(where, ())):
            if record.space.records.get(record.key) is record and not record.holds:
                gone += self._records.drop(record)
        self._counters.dropped_records += gone
        return gone > 0

    def _move(self, record: Record) -> bool:
        records, source = self._records, record.place
        target = records.extents.allocate(source.record_bytes - records.extents.record_bytes(0), moving=True)
        if target is None:
            return False
        if self._budget is not None:
            self._budget.count(target.record_bytes)
        record.moving = True
        records.hold(record)
        self._moving += 1
        parent = ROOT if record.parent is None else record.parent.key
        self._orders.issue(
            lambda ticket: Move(ticket, record.space.namespace, record.key, parent, source, target),
            lambda result: self._moved(record, target, result),
        )
        return True

    def _moved(self, record: Record, target: Place, result: Result) -> None:
        records = self._records
        self._moving -= 1
        record.moving = False
        if result.outcome is Outcome.OK:
            self._counters.moved_bytes += target.record_bytes
            records.move(record, target)
        else:
            records.extents.release(target)
            if result.outcome is Outcome.CORRUPT:
                self._counters.corrupt_chunks += 1
                records.condemn(record)
        self._counters.dropped_records += records.let_go(record)
        self.work()
        self.on_room()
