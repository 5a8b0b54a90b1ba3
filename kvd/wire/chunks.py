"""What both sides say about chunks: places, stripes, and the outcomes of Reserve and Commit."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from itertools import repeat
from typing import Any, NamedTuple

#: Makes named tuples of plain ones, given the type: without the call of a Python function for each.
_named: Any = tuple.__new__

#: Parent of the first chunk of a prefix.
ROOT = b""


class ReserveStatus(IntEnum):
    """Answer to one item of Reserve; the numbers are those of the protocol."""

    GRANTED = 1
    PRESENT = 2
    BUSY = 3
    NO_ROOM = 4
    NO_PARENT = 5


class CommitStatus(IntEnum):
    """Answer to one item of Commit; the numbers are those of the protocol."""

    STORED = 1
    PARTIAL = 2
    WAITING_PARENT = 3
    FAILED = 4


class Location(NamedTuple):
    """Where a slot is: segment index, byte offset in it, and the slot's generation."""

    segment: int
    offset: int
    generation: int


def locations(segments: Iterable[int], offsets: Iterable[int], generations: Iterable[int]) -> list[Location]:
    """The slots in columns; there are often thousands. ValueError when the columns are not equally long."""
    return list(map(_named, repeat(Location), zip(segments, offsets, generations, strict=True)))


class Stripe(NamedTuple):
    """A range of layers x a range of heads of one chunk; ends are exclusive."""

    layer_begin: int
    layer_end: int
    head_begin: int
    head_end: int


class ReserveResult(NamedTuple):
    """Outcome of one item of Reserve; ``location`` is set when GRANTED."""

    status: ReserveStatus
    location: Location | None = None
