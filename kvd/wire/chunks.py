"""What both sides say about chunks: places, stripes, and the outcomes of Reserve and Commit."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

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
