"""Slots from slabs: which bytes of a segment are in use. Pure arithmetic; touches no memory.

The segment is cut into equal regions. A slab is a run of neighbouring regions, cut into equal slots of one size; a slab
with no slot in use gives its regions back at once. A slab of k regions begins at a multiple of k regions; when no such
place is free, ``windows`` names the slabs whose emptying would free one. So no mix of sizes can fragment the pool for
ever, provided that the owner of the slots is willing to empty them.

Where the segment lies on several memory nodes, each has a part of its regions, and a slot can be asked for near a node.
A slab that lies across a border counts for the part in which it begins; it is made only when nothing else is left.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from kvd.wire.lifeline import GRANULE_BYTES

_MIB = 1 << 20
_REGION_STEP_BYTES = 2 * _MIB
_MAX_REGION_BYTES = 1024 * _MIB
#: Regions that a large pool is cut into, about.
_REGIONS = 256
#: A pool too small for this many regions of the step gets smaller ones.
_MIN_REGIONS = 16
#: A slab is made of few regions unless more of them leave less than this share unused.
_MAX_WASTE = 0.125
_SHAPES_TRIED = 8


def region_bytes_for(pool_bytes: int) -> int:
    """Size of a region for a pool of ``pool_bytes``."""
    if pool_bytes < _MIN_REGIONS * _REGION_STEP_BYTES:
        return max(GRANULE_BYTES, pool_bytes // _MIN_REGIONS // GRANULE_BYTES * GRANULE_BYTES)
    stepped = pool_bytes // _REGIONS // _REGION_STEP_BYTES * _REGION_STEP_BYTES
    return min(max(stepped, _REGION_STEP_BYTES), _MAX_REGION_BYTES)


class Part(NamedTuple):
    """The bytes ``begin`` to ``end`` of a segment, whole regions, and the memory node that they lie on."""

    node: int
    begin: int
    end: int


class NodeFigures(NamedTuple):
    """Bytes of the segment that lie on a memory node, and of slots in use there."""

    node: int
    bytes: int
    used_bytes: int


class Window(NamedTuple):
    """Slabs (by the offset where each begins) which, emptied, make room for a slab of ``size_bytes``."""

    slabs: tuple[int, ...]
    size_bytes: int


class _Slab:
    """A run of regions cut in equal slots."""

    __slots__ = ("freed", "fresh", "listed", "offset", "part", "regions", "slot_bytes", "slots", "taken", "used")

    def __init__(self, offset: int, part: _Part, regions: int, slot_bytes: int, slots: int) -> None:
        self.offset = offset
        self.part = part
        self.regions = regions
        self.slot_bytes = slot_bytes
        self.slots = slots
        self.taken = 0
        self.used = bytearray(slots)  # 1 = in use
        self.fresh = 0  # slots from here on have never been used: a new slab of many slots costs nothing
        self.freed: list[int] | None = []  # None: to be found from the marks
        self.listed = False  # whether the heap of its class holds it

    def free_before_fresh(self) -> list[int]:
        if self.freed is None:
            self.freed = [index for index in range(self.fresh - 1, -1, -1) if not self.used[index]]
        return self.freed

    def take(self) -> int:
        if self.free_before_fresh():
            index = self.free_before_fresh().pop()
        else:
            index = self.fresh
            self.fresh += 1
        self.used[index] = 1
        self.taken += 1
        return self.offset + index * self.slot_bytes

    def claim(self, offset: int) -> None:
        index, rest = divmod(offset - self.offset, self.slot_bytes)
        if rest or index >= self.slots or self.used[index]:
            raise ValueError(f"no free slot of {self.slot_bytes} bytes begins at offset {offset}")
        self.used[index] = 1
        self.taken += 1
        if index >= self.fresh:
            self.fresh = index + 1
        self.freed = None

    def give(self, offset: int) -> None:
        index, rest = divmod(offset - self.offset, self.slot_bytes)
        if rest or index >= self.slots or not self.used[index]:
            raise ValueError(f"no slot in use begins at offset {offset}")
        self.used[index] = 0
        self.taken -= 1
        if self.freed is not None:
            self.freed.append(index)


class _Part:
    """The regions ``first`` to ``end``: those in no slab, and the bytes of slots in use."""

    __slots__ = ("end", "first", "free_regions", "lacks", "node", "number", "taken_bytes")

    def __init__(self, number: int, node: int, first: int, end: int) -> None:
        self.number = number
        self.node = node
        self.first = first
        self.end = end
        self.free_regions = end - first
        self.taken_bytes = 0
        self.lacks: set[int] = set()  # lengths of free runs that it has not: a full part is not searched each time


class _SizeClass:
    """The slabs of one slot size: how many there are, their free slots, and those with room, by part, lowest offset
    first."""

    __slots__ = ("idle", "roomy", "slabs")

    def __init__(self, parts: int) -> None:
        self.slabs = 0
        self.idle = 0
        self.roomy: list[list[int]] = [[] for _ in range(parts)]


class SlabAllocator:
    """Gives and takes back slots of one segment of ``pool_bytes``.

    Slots begin at multiples of 4 KiB. ``parts``: of a segment on several memory nodes, all of it, in order; none = one.
    Raises ``ValueError`` when the pool is smaller than a slot.
    """

    def __init__(self, pool_bytes: int, parts: Sequence[Part] = ()) -> None:
        if pool_bytes < GRANULE_BYTES:
            raise ValueError(f"a pool of {pool_bytes} bytes is smaller than one slot of {GRANULE_BYTES}")
        self.region_bytes = region_bytes_for(pool_bytes)
        self._regions: list[_Slab | None] = [None] * (pool_bytes // self.region_bytes)
        self._free_regions = len(self._regions)
        self._classes: dict[int, _SizeClass] = {}
        self._parts = [
            _Part(number, part.node, part.begin // self.region_bytes, part.end // self.region_bytes)
            for number, part in enumerate(parts or [Part(0, 0, pool_bytes)])
        ]
        self._near: dict[int | None, _Part] = {part.node: part for part in self._parts} if parts else {}

    @property
    def total_bytes(self) -> int:
        """Bytes that can be given out: the pool without a remainder smaller than a region."""
        return len(self._regions) * self.region_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that are in no slab."""
        return self._free_regions * self.region_bytes

    @property
    def taken_bytes(self) -> int:
        """Bytes of slots in use. What is neither free nor taken is idle: free slots and remainders of slabs."""
        return sum(part.taken_bytes for part in self._parts)

    def nodes(self) -> list[NodeFigures]:
        """What lies on each memory node; nothing when there is one."""
        return [
            NodeFigures(part.node, (part.end - part.first) * self.region_bytes, part.taken_bytes)
            for part in (self._parts if self._near else ())
        ]

    def room_bytes(self, slot_bytes: int) -> int:
        """Bytes for slots of ``slot_bytes`` with nothing emptied: those in no slab, and the free slots of this size."""
        size_class = self._classes.get(slot_bytes)
        return self.free_bytes + (0 if size_class is None else size_class.idle * slot_bytes)

    @staticmethod
    def slot_bytes(chunk_bytes: int) -> int:
        """Size of the slot that a chunk of ``chunk_bytes`` gets."""
        return -(-chunk_bytes // GRANULE_BYTES) * GRANULE_BYTES

    def allocate(self, slot_bytes: int, near: int | None = None) -> int | None:
        """Offset of a free slot of ``slot_bytes``, or None when something has to be emptied first.

        On the memory node ``near`` if that has one, else on any.
        """
        if self.room_bytes(slot_bytes) < slot_bytes:
            return None
        home = self._near.get(near)
        slab = None
        if home is not None:
            slab = self._roomy_slab(slot_bytes, [home]) or self._new_slab(slot_bytes, [home])
        if slab is None:
            slab = self._roomy_slab(slot_bytes, self._parts) or self._new_slab(slot_bytes, self._emptiest_first())
        if slab is None and len(self._parts) > 1:
            slab = self._new_slab(slot_bytes, None)
        return None if slab is None else self._take(slab)

    def claim(self, offset: int, slot_bytes: int) -> None:
        """Mark the slot of ``slot_bytes`` at ``offset`` as in use: an allocator of the same pool has given it out.

        In any order. Raises ``ValueError``, and changes nothing, when no slot of this size can begin there or when it
        overlaps with what is in use.
        """
        if slot_bytes < GRANULE_BYTES or slot_bytes % GRANULE_BYTES or not 0 <= offset < self.total_bytes:
            raise ValueError(f"no slot of {slot_bytes} bytes can begin at offset {offset}")
        slab = self._regions[offset // self.region_bytes]
        if slab is None:
            slab = self._slab_for(offset, slot_bytes)
        elif slab.slot_bytes != slot_bytes:
            raise ValueError(f"slots of another size lie around offset {offset}")
        slab.claim(offset)
        self._classes[slot_bytes].idle -= 1
        slab.part.taken_bytes += slot_bytes

    def free(self, offset: int) -> None:
        """Take the slot at ``offset`` back. Raises ``ValueError`` when no slot in use begins there."""
        slab = self._slab_around(offset)
        slab.give(offset)
        slab.part.taken_bytes -= slab.slot_bytes
        size_class = self._classes[slab.slot_bytes]
        size_class.idle += 1
        if not slab.taken:
            first = slab.offset // self.region_bytes
            self._regions[first : first + slab.regions] = [None] * slab.regions
            self._count_free(first, slab.regions, 1)
            size_class.slabs -= 1
            size_class.idle -= slab.slots
            if not size_class.slabs:
                del self._classes[slab.slot_bytes]
        elif not slab.listed:
            slab.listed = True
            heapq.heappush(size_class.roomy[slab.part.number], slab.offset)

    def slab_of(self, offset: int) -> int:
        """Where the slab that holds the slot at ``offset`` begins. Raises ``ValueError`` when there is none."""
        return self._slab_around(offset).offset

    def used_slots(self, slab_offset: int) -> Iterator[int]:
        """Offsets of the slots in use of the slab that begins at ``slab_offset``."""
        slab = self._slab_around(slab_offset)
        index = slab.used.find(1)
        while index >= 0:
            yield slab.offset + index * slab.slot_bytes
            index = slab.used.find(1, index + 1)

    def windows(self, slot_bytes: int) -> Iterator[Window]:
        """Every place for a slab of this size that slabs of other sizes occupy, with the slabs to be emptied for it."""
        if self._classes.keys() <= {slot_bytes}:
            return
        regions = self._shape(slot_bytes)[0]
        for first in range(0, len(self._regions) - regions + 1, regions):
            inside = dict.fromkeys(slab for slab in self._regions[first : first + regions] if slab is not None)
            if inside and all(slab.slot_bytes != slot_bytes for slab in inside):
                yield Window(tuple(slab.offset for slab in inside), regions * self.region_bytes)

    def audit(self) -> list[str]:
        """What does not agree inside the allocator; empty = nothing."""
        findings = []
        free_regions = 0
        taken_bytes = dict.fromkeys(self._parts, 0)
        slabs: dict[int, tuple[int, int]] = {}
        for slab, regions in self._units():
            if slab is None:
                free_regions += regions
                continue
            count, idle = slabs.get(slab.slot_bytes, (0, 0))
            slabs[slab.slot_bytes] = count + 1, idle + slab.slots - slab.taken
            taken_bytes[slab.part] += slab.taken * slab.slot_bytes
            if not slab.part.first <= slab.offset // self.region_bytes < slab.part.end:
                findings.append(f"slab {slab.offset}: counts for node {slab.part.node}, where it does not begin")
            if not slab.taken or slab.taken != slab.used.count(1):
                findings.append(f"slab {slab.offset}: {slab.taken} slots taken, {slab.used.count(1)} marked")
            freed = slab.free_before_fresh()
            if slab.fresh - len(freed) != slab.taken or len(set(freed)) != len(freed):
                findings.append(f"slab {slab.offset}: its free list does not match its marks")
            roomy = self._classes[slab.slot_bytes].roomy[slab.part.number]
            if slab.taken < slab.slots and slab.offset not in roomy:
                findings.append(f"slab {slab.offset}: has room and is not listed")
        if slabs != {size: (size_class.slabs, size_class.idle) for size, size_class in self._classes.items()}:
            findings.append(f"slabs and free slots by size: {slabs} in the regions, other counts in the classes")
        if free_regions != self._free_regions:
            findings.append(f"{free_regions} free regions, {self._free_regions} counted")
        for part in self._parts:
            free = self._regions[part.first : part.end].count(None)
            if free != part.free_regions:
                findings.append(f"node {part.node}: {free} free regions, {part.free_regions} counted")
            if taken_bytes[part] != part.taken_bytes:
                findings.append(f"node {part.node}: {taken_bytes[part]} bytes taken, {part.taken_bytes} counted")
            for regions in part.lacks:
                if self._free_run(regions, part.first, part.end) is not None:
                    findings.append(f"node {part.node}: has {regions} free regions in a row, and is said to lack them")
        return findings

    def _take(self, slab: _Slab) -> int:
        self._classes[slab.slot_bytes].idle -= 1
        slab.part.taken_bytes += slab.slot_bytes
        return slab.take()

    def _roomy_slab(self, slot_bytes: int, parts: Iterable[_Part]) -> _Slab | None:
        """A slab with a free slot of this size, of the first of ``parts`` that has one."""
        size_class = self._classes.get(slot_bytes)
        if size_class is None:
            return None
        for part in parts:
            roomy = size_class.roomy[part.number]
            while roomy:
                slab = self._slab_from(roomy[0])
                if slab is not None and slab.slot_bytes == slot_bytes and slab.taken < slab.slots:
                    return slab
                heapq.heappop(roomy)
                if slab is not None and slab.slot_bytes == slot_bytes:
                    slab.listed = False
        return None

    def _shape(self, slot_bytes: int) -> tuple[int, int]:
        """Regions and slots of a slab of this slot size."""
        least = -(-slot_bytes // self.region_bytes)
        best, best_waste = least, 1.0
        for regions in range(least, min(least + _SHAPES_TRIED, len(self._regions) + 1)):
            size = regions * self.region_bytes
            waste = size % slot_bytes / size
            if waste < best_waste:
                best, best_waste = regions, waste
            if waste <= _MAX_WASTE:
                break
        return best, best * self.region_bytes // slot_bytes

    def _new_slab(self, slot_bytes: int, parts: Iterable[_Part] | None) -> _Slab | None:
        """A new slab in the first of ``parts`` that has a place for one; None = anywhere, across their borders too."""
        regions, slots = self._shape(slot_bytes)
        if parts is None:
            first = self._free_run(regions, 0, len(self._regions)) if self._free_regions >= regions else None
            return None if first is None else self._cut(first, regions, slot_bytes, slots)
        for part in parts:
            if part.free_regions >= regions and regions not in part.lacks:
                first = self._free_run(regions, part.first, part.end)
                if first is not None:
                    return self._cut(first, regions, slot_bytes, slots)
                part.lacks.add(regions)
        return None

    def _emptiest_first(self) -> list[_Part]:
        """Whoever is near no node leaves room for those who are."""
        return sorted(self._parts, key=lambda part: -part.free_regions)

    def _cut(self, first: int, regions: int, slot_bytes: int, slots: int) -> _Slab:
        """A new slab in the free regions from ``first`` on."""
        part = next(part for part in self._parts if first < part.end)
        slab = _Slab(first * self.region_bytes, part, regions, slot_bytes, slots)
        self._regions[first : first + regions] = [slab] * regions
        self._count_free(first, regions, -1)
        size_class = self._classes.setdefault(slot_bytes, _SizeClass(len(self._parts)))
        size_class.slabs += 1
        size_class.idle += slots
        slab.listed = True
        heapq.heappush(size_class.roomy[part.number], slab.offset)
        return slab

    def _count_free(self, first: int, regions: int, sign: int) -> None:
        """The regions from ``first`` on are free (1), or not any more (-1)."""
        self._free_regions += sign * regions
        for part in self._parts:
            inside = min(part.end, first + regions) - max(part.first, first)
            if inside > 0:
                part.free_regions += sign * inside
                if sign > 0:
                    part.lacks.clear()

    def _slab_for(self, offset: int, slot_bytes: int) -> _Slab:
        """A new slab at the place that the slot at ``offset`` must have come from. Raises ``ValueError``."""
        regions, slots = self._shape(slot_bytes)
        first = offset // self.region_bytes // regions * regions
        index, rest = divmod(offset - first * self.region_bytes, slot_bytes)
        if rest or index >= slots or first + regions > len(self._regions):
            raise ValueError(f"no slot of {slot_bytes} bytes can begin at offset {offset}")
        if any(self._regions[first : first + regions]):
            raise ValueError(f"slots of another size lie around offset {offset}")
        return self._cut(first, regions, slot_bytes, slots)

    def _free_run(self, regions: int, begin: int, end: int) -> int | None:
        """The first place for a slab of so many regions that is free, from region ``begin`` to ``end``, or None.

        Slabs begin at multiples of their length: so those of one size can never stand in each other's way with gaps
        between them that are too short for one more.
        """
        if regions == 1:  # as many are: not looked for one by one
            return self._regions.index(None, begin, end) if None in self._regions[begin:end] else None
        for first in range(-(-begin // regions) * regions, end - regions + 1, regions):
            if not any(self._regions[first : first + regions]):
                return first
        return None

    def _units(self) -> Iterator[tuple[_Slab | None, int]]:
        """The segment from its begin: each slab with its regions, and each free region by itself."""
        index = 0
        while index < len(self._regions):
            slab = self._regions[index]
            regions = 1 if slab is None else slab.regions
            yield slab, regions
            index += regions

    def _slab_from(self, offset: int) -> _Slab | None:
        """The slab that begins at ``offset``, if one does."""
        slab = self._regions[offset // self.region_bytes]
        return slab if slab is not None and slab.offset == offset else None

    def _slab_around(self, offset: int) -> _Slab:
        index = offset // self.region_bytes
        slab = self._regions[index] if 0 <= index < len(self._regions) else None
        if slab is None:
            raise ValueError(f"no slab around offset {offset}")
        return slab
