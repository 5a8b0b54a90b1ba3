"""Ghosts: a compact memory of when, and how often, keys were used that are in the tier no more."""

from __future__ import annotations

from array import array

#: Uses are counted up to here.
MAX_USES = 1023

# One ghost is 64 bits: 20 of its key's hash, 10 for its uses, 34 for the time. 0 = nobody; uses are never 0.
_TIME_BITS = 34
_TAG_AT = 44
_TIME_MASK = (1 << _TIME_BITS) - 1
_WAYS = 4
_SETS = 1024
_SEGMENT = _WAYS * _SETS
_MIX = 0x9E3779B97F4A7C15
_64 = (1 << 64) - 1


class Ghosts:
    """A lossy table of at most ``limit`` ghosts, 8 bytes each: who finds no room takes that of an older one.

    Sets of four in segments of 4096. The table grows by one segment at a time (linear hashing), so no step takes longer
    than the splitting of one segment. It never shrinks.
    """

    def __init__(self) -> None:
        self.limit = _SEGMENT
        self._segments = [self._empty()]
        self._round = 1  # segments when the round of splits that is under way began, a power of two
        self._filled = 0

    def __len__(self) -> int:
        return self._filled

    def take(self, key: bytes) -> tuple[int, int] | None:
        """Forget ``key``: when it was used and how often, None when that is not known. O(1)."""
        if not self._filled:
            return None
        tag, first, segment = self._find(key)
        for at in range(first, first + _WAYS):
            ghost = segment[at]
            if ghost and ghost >> _TAG_AT == tag:
                segment[at] = 0
                self._filled -= 1
                return ghost & _TIME_MASK, ghost >> _TIME_BITS & MAX_USES
        return None

    def peek(self, key: bytes) -> int:
        """How often ``key`` was used, 0 when that is not known. O(1)."""
        tag, first, segment = self._find(key)
        for at in range(first, first + _WAYS):
            ghost = segment[at]
            if ghost and ghost >> _TAG_AT == tag:
                return ghost >> _TIME_BITS & MAX_USES
        return 0

    def put(self, key: bytes, used_at: int, uses: int) -> tuple[int, int] | None:
        """Remember a key that is not known; the (time, uses) that is forgotten for it. O(1), amortised.

        Times are remembered modulo 2**34.
        """
        if self._filled * 3 > (room := len(self._segments) * _SEGMENT) and room < self.limit:
            self._grow()
        tag, first, segment = self._find(key)
        ghost = tag << _TAG_AT | (uses if uses < MAX_USES else MAX_USES) << _TIME_BITS | used_at & _TIME_MASK
        oldest = first
        for at in range(first, first + _WAYS):
            if not segment[at]:
                segment[at] = ghost
                self._filled += 1
                return None
            if segment[at] & _TIME_MASK < segment[oldest] & _TIME_MASK:
                oldest = at
        gone = segment[oldest]
        segment[oldest] = ghost
        return gone & _TIME_MASK, gone >> _TIME_BITS & MAX_USES

    def _find(self, key: bytes) -> tuple[int, int, array[int]]:
        end = int.from_bytes(key[-8:], "little")
        mixed = ((end ^ end >> 32) * _MIX & _64) >> 34
        tag = mixed >> 10
        number = tag & (self._round - 1)
        if number < len(self._segments) - self._round:
            number = tag & (2 * self._round - 1)
        return tag, (mixed & (_SETS - 1)) * _WAYS, self._segments[number]

    def _grow(self) -> None:
        """Split the next segment of this round in two, by one more bit of the tags."""
        old = self._segments[len(self._segments) - self._round]
        new = self._empty()
        bit = self._round << _TAG_AT
        for at, ghost in enumerate(old):
            if ghost & bit:
                new[at] = ghost
                old[at] = 0
        self._segments.append(new)
        if len(self._segments) == 2 * self._round:
            self._round *= 2

    @staticmethod
    def _empty() -> array[int]:
        return array("Q", [0]) * _SEGMENT
