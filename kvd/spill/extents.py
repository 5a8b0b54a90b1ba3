"""The space on the disks: which extent a record goes to, what lives in each. Pure arithmetic; touches no file.

A drive is cut into equal extents. Records are appended to an open extent; one that the next record does not fit into is
sealed, and a sealed extent without a live record is free again at once. On each drive the last free extent is opened
for moves only, so that the records of an extent that is emptied always have somewhere to go. What a former daemon
wrote is neither free nor usable until a scan has said what is in it, and then counts as sealed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from kvd.spill.record import HEADER_BYTES, PAGE_BYTES, record_bytes
from kvd.types import Place

_MIB = 1 << 20
_MIN_EXTENT_BYTES = _MIB
_MAX_EXTENT_BYTES = 1024 * _MIB
#: Extents that a drive is cut into, unless that makes them too small or too large.
_EXTENTS = 16
#: Of a drive's share; kept for what is not extents: half of it for their indexes, the rest for superblock and
#: descriptions of namespaces.
_OTHER_SHARE = 256


def extent_bytes_for(drive_bytes: int) -> int:
    """Size of the extents of a drive of ``drive_bytes``. ValueError when it is too small to hold any."""
    if drive_bytes < 2 * _MIN_EXTENT_BYTES:
        raise ValueError(f"a drive of {drive_bytes} bytes is smaller than two extents of {_MIN_EXTENT_BYTES}")
    size = _extents_share(drive_bytes) // _EXTENTS
    return min(max(size, _MIN_EXTENT_BYTES), _MAX_EXTENT_BYTES) // PAGE_BYTES * PAGE_BYTES


def extents_in(drive_bytes: int, extent_bytes: int) -> int:
    """How many extents of ``extent_bytes`` a drive of ``drive_bytes`` holds."""
    return _extents_share(drive_bytes) // extent_bytes


def index_bytes_in(drive_bytes: int, extent_bytes: int) -> int:
    """Most that the index of one of these extents may take of the drive."""
    extents = max(1, extents_in(drive_bytes, extent_bytes))
    return (drive_bytes - _extents_share(drive_bytes)) // 2 // extents // PAGE_BYTES * PAGE_BYTES


def _extents_share(drive_bytes: int) -> int:
    return drive_bytes - max(drive_bytes // _OTHER_SHARE, 1 << 18)


class Spare(NamedTuple):
    """A free extent that has a file, and its last life: the file may be removed if no other has begun."""

    extent: int
    life: int


class Use(NamedTuple):
    """What becomes of the bytes of one drive; capacity = live + dead + free. ``extents``: those in use."""

    capacity_bytes: int
    live_bytes: int
    dead_bytes: int
    free_bytes: int
    extents: int


class _State(Enum):
    UNSCANNED = "unscanned"
    FREE = "free"
    OPEN = "open"
    SEALED = "sealed"


class _Extent:
    """One extent: its state, what lives in it, and whether the drive has a file for it."""

    __slots__ = ("has_file", "life", "live_bytes", "number", "records", "state", "used_bytes")

    def __init__(self, number: int, *, has_file: bool) -> None:
        self.number = number
        self.state = _State.UNSCANNED if has_file else _State.FREE
        self.has_file = has_file
        self.live_bytes = 0
        self.records = 0
        self.used_bytes = HEADER_BYTES
        self.life = 0


class _Drive:
    """The extents of one drive. ``writing`` and ``moving`` are open, if any are."""

    def __init__(self) -> None:
        self.extent_bytes = 0
        self.extents: list[_Extent] = []
        self.free: list[tuple[bool, int]] = []  # heap: those with a file first, then lowest number first
        self.writing: _Extent | None = None
        self.moving: _Extent | None = None
        self.working = False
        self.available = 0

    def openable(self) -> int:
        """Free extents for which the file system has room as well."""
        in_use = len(self.extents) - len(self.free)
        return max(0, min(len(self.free), self.available - in_use))

    def make_free(self, extent: _Extent) -> None:
        extent.state = _State.FREE
        extent.used_bytes = HEADER_BYTES
        heapq.heappush(self.free, (not extent.has_file, extent.number))

    def seal(self, extent: _Extent) -> None:
        if extent is self.writing:
            self.writing = None
        elif extent is self.moving:
            self.moving = None
        extent.state = _State.SEALED
        self.settle(extent)

    def settle(self, extent: _Extent) -> None:
        """Frees a sealed extent in which nothing lives."""
        if extent.state is _State.SEALED and not extent.records:
            self.make_free(extent)

    def resumable(self, size: int) -> _Extent | None:
        """The sealed extent with the most room behind its records; not the one that is worth emptying.

        A daemon that ended while it emptied extents into the last free one has left no other room.
        """
        sealed = sorted(
            (extent for extent in self.extents if extent.state is _State.SEALED), key=lambda extent: extent.live_bytes
        )
        roomiest = min(sealed[1:], key=lambda extent: extent.used_bytes, default=None)
        return roomiest if self.fits(roomiest, size) else None

    def fits(self, extent: _Extent | None, size: int) -> bool:
        return extent is not None and extent.used_bytes + size <= self.extent_bytes


class Extents:
    """The space of several drives, as the store's books use it (``kvd.ledger.terms.ExtentSpace``).

    A drive has no extents until ``attach`` says which. ``first_sequence``: above those of all former daemons, as far
    as is known (the time in nanoseconds does); every record that is adopted raises it further.
    """

    def __init__(self, drives: int, first_sequence: int = 1) -> None:
        self._drives = [_Drive() for _ in range(drives)]
        self._sequence = first_sequence
        self._live_bytes = 0
        self._turn = 0

    # -- what there is

    @property
    def total_bytes(self) -> int:
        """Bytes that may be used: of extents on drives that work, as far as their file systems give them."""
        return sum(
            min(len(drive.extents), drive.available) * (drive.extent_bytes - HEADER_BYTES)
            for drive in self._drives
            if drive.working and drive.extents
        )

    @property
    def live_bytes(self) -> int:
        """Bytes of records that are not dead, on all drives."""
        return self._live_bytes

    @property
    def last_sequence(self) -> int:
        """Of the youngest place that was given out or adopted."""
        return self._sequence - 1

    @property
    def free_extents(self) -> int:
        """Extents with nothing in them that can be opened now."""
        return sum(drive.openable() for drive in self._drives if drive.working)

    @property
    def kept_extents(self) -> int:
        """Free extents that are kept for moves: one on each drive that works."""
        return sum(drive.working for drive in self._drives)

    def record_bytes(self, payload_bytes: int) -> int:
        """Size on disk of a record with this much payload."""
        return record_bytes(payload_bytes)

    def fits(self, payload_bytes: int) -> bool:
        """Whether a record with this much payload fits into an extent of some drive at all."""
        size = record_bytes(payload_bytes)
        return any(size <= drive.extent_bytes - HEADER_BYTES for drive in self._drives if drive.extents)

    def works(self, drive: int) -> bool:
        """Whether the drive answers: what lies on it can be had."""
        return self._drives[drive].working

    def live_in(self, drive: int, extent: int) -> int:
        """Live bytes of an extent."""
        return self._drives[drive].extents[extent].live_bytes

    def dead_in(self, drive: int, extent: int) -> int:
        """Bytes of an extent that emptying it would gain."""
        found = self._drives[drive]
        return found.extent_bytes - HEADER_BYTES - found.extents[extent].live_bytes

    def use(self, drive: int) -> Use:
        """Figures of one drive."""
        found = self._drives[drive]
        room = found.extent_bytes - HEADER_BYTES
        in_use = [extent for extent in found.extents if extent.state is not _State.FREE]
        capacity = max(len(in_use), min(len(found.extents), found.available)) * room
        live = sum(extent.live_bytes for extent in in_use)
        open_bytes = sum(
            found.extent_bytes - extent.used_bytes for extent in (found.writing, found.moving) if extent is not None
        )
        free = capacity - len(in_use) * room + open_bytes
        return Use(capacity, live, capacity - live - free, free, len(in_use))

    def emptiest(self) -> tuple[int, int] | None:
        """The sealed extent (drive, number) with the least live bytes, on drives that work; None: there is none."""
        sealed = (
            (extent.live_bytes, number, extent.number)
            for number, drive in enumerate(self._drives)
            if drive.working and not any(extent.state is _State.UNSCANNED for extent in drive.extents)
            for extent in drive.extents
            if extent.state is _State.SEALED
        )
        least = min(sealed, default=None)
        return None if least is None else least[1:]

    # -- records

    def allocate(self, payload_bytes: int, *, moving: bool = False) -> Place | None:
        """A place for a new record; None when there is none now. The last free extent is kept for ``moving``.

        Drives take turns.
        """
        size = record_bytes(payload_bytes)
        for step in range(len(self._drives)):
            number = (self._turn + step) % len(self._drives)
            drive = self._drives[number]
            if not drive.working or size > drive.extent_bytes - HEADER_BYTES:
                continue
            extent = self._room_to_move(drive, size) if moving else self._room_to_write(drive, size)
            if extent is not None:
                self._turn = number + 1
                return self._append(number, extent, size)
        return None

    def release(self, place: Place) -> None:
        """The record at ``place`` is dead, or was never written. Nothing may still read or write it."""
        drive = self._drives[place.drive]
        extent = drive.extents[place.extent]
        if not extent.records or extent.live_bytes < place.record_bytes:
            raise ValueError(f"nothing lives at {place}")
        extent.records -= 1
        extent.live_bytes -= place.record_bytes
        self._live_bytes -= place.record_bytes
        drive.settle(extent)

    # -- what a former daemon left

    def attach(self, drive: int, extent_bytes: int, extents: int, existing: Iterable[int]) -> None:
        """The drive has been opened for the first time: its geometry, and the extents that are there already."""
        found = self._drives[drive]
        if found.extents:
            raise ValueError(f"drive {drive} is attached already")
        there = frozenset(existing)
        found.extent_bytes = extent_bytes
        found.extents = [_Extent(number, has_file=number in there) for number in range(extents)]
        found.free = [(True, number) for number in range(extents) if number not in there]  # ordered: a heap
        found.available = extents
        found.working = True

    def adopt(self, place: Place) -> None:
        """A scan has found the record at ``place``; its extent is not ``scanned`` yet."""
        extent = self._drives[place.drive].extents[place.extent]
        if extent.state is not _State.UNSCANNED:
            raise ValueError(f"extent {place.extent} of drive {place.drive} is not being scanned")
        extent.records += 1
        extent.live_bytes += place.record_bytes
        extent.used_bytes = max(extent.used_bytes, place.offset + place.record_bytes)
        extent.life = place.life
        self._live_bytes += place.record_bytes
        self._sequence = max(self._sequence, place.sequence + 1)

    def scanned(self, drive: int, extent: int) -> None:
        """All that an extent holds has been adopted. It is sealed: free, if that was nothing."""
        found = self._drives[drive].extents[extent]
        if found.state is _State.UNSCANNED:
            found.state = _State.SEALED
            self._drives[drive].settle(found)

    # -- drives that change

    def set_working(self, drive: int, working: bool) -> None:
        """Whether the drive answers. If not, nothing is placed on it; what it holds stays in the books."""
        self._drives[drive].working = working and bool(self._drives[drive].extents)

    def set_available(self, drive: int, extents: int) -> list[Spare]:
        """The file system has room for this many extents, those that exist included.

        The answer names free extents that have a file, should the drive need to give room back.
        """
        found = self._drives[drive]
        found.available = min(extents, len(found.extents))
        return [
            Spare(number, found.extents[number].life) for without_file, number in sorted(found.free) if not without_file
        ]

    def removed(self, drive: int, extents: Iterable[int]) -> None:
        """The files of these extents are gone. The records that lay there are the caller's to release.

        An open one is sealed: nothing further is placed in it.
        """
        found = self._drives[drive]
        for number in extents:
            extent = found.extents[number]
            extent.has_file = False
            if extent.state is _State.OPEN:
                found.seal(extent)
            elif extent.state is _State.UNSCANNED:
                self.scanned(drive, number)
        found.free = [(not found.extents[number].has_file, number) for _, number in found.free]
        heapq.heapify(found.free)

    # -- checks

    def audit(self) -> list[str]:
        """What does not agree inside; empty = nothing."""
        findings = []
        live_bytes = 0
        for number, drive in enumerate(self._drives):
            live_bytes += sum(extent.live_bytes for extent in drive.extents)
            free = sorted(extent.number for extent in drive.extents if extent.state is _State.FREE)
            if free != sorted(extent for _, extent in drive.free):
                findings.append(f"drive {number}: {len(free)} free extents, {len(drive.free)} listed")
            opened = {extent.number for extent in drive.extents if extent.state is _State.OPEN}
            named = {extent.number for extent in (drive.writing, drive.moving) if extent is not None}
            if opened != named:
                findings.append(f"drive {number}: extents {opened} are open, {named} are filled")
            for extent in drive.extents:
                findings += [f"drive {number}, extent {extent.number}: {what}" for what in _oddities(drive, extent)]
        if live_bytes != self._live_bytes:
            findings.append(f"{live_bytes} live bytes in the extents, {self._live_bytes} counted")
        return findings

    # -- inside

    def _room_to_write(self, drive: _Drive, size: int) -> _Extent | None:
        if drive.fits(drive.writing, size):
            return drive.writing
        spare = drive.openable()
        if spare and drive.fits(drive.moving, size):
            # A free extent is kept, so what the moves have begun may be filled up.
            extent, drive.moving = drive.moving, None
        elif spare > 1:
            extent = self._open(drive)
        else:
            return None
        if drive.writing is not None:
            drive.seal(drive.writing)
        drive.writing = extent
        return extent

    def _room_to_move(self, drive: _Drive, size: int) -> _Extent | None:
        if drive.fits(drive.moving, size):
            return drive.moving
        if not drive.openable():
            if drive.fits(drive.writing, size):
                return drive.writing
            extent = drive.resumable(size)
            if extent is None:
                return None
        else:
            extent = self._open(drive)
        if drive.moving is not None:
            drive.seal(drive.moving)
        extent.state = _State.OPEN
        drive.moving = extent
        return extent

    def _open(self, drive: _Drive) -> _Extent:
        _, number = heapq.heappop(drive.free)
        extent = drive.extents[number]
        extent.state = _State.OPEN
        extent.has_file = True
        extent.life = self._next_sequence()
        return extent

    def _append(self, drive: int, extent: _Extent, size: int) -> Place:
        place = Place(drive, extent.number, extent.used_bytes, size, self._next_sequence(), extent.life)
        extent.used_bytes += size
        extent.live_bytes += size
        extent.records += 1
        self._live_bytes += size
        return place

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence - 1


def _oddities(drive: _Drive, extent: _Extent) -> list[str]:
    odd = []
    if (extent.records == 0) != (extent.live_bytes == 0):
        odd.append(f"{extent.records} records of {extent.live_bytes} live bytes")
    if extent.live_bytes > drive.extent_bytes - HEADER_BYTES:
        odd.append(f"{extent.live_bytes} live bytes of {drive.extent_bytes}")
    if extent.state is _State.SEALED and not extent.records:
        odd.append("sealed, and nothing lives in it")
    if extent.state is _State.FREE and extent.records:
        odd.append("free, and something lives in it")
    return odd
