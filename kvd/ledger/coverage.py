"""Which cells of a chunk's layers x heads grid have been written, as the bits of an integer."""

from __future__ import annotations

from kvd.types import Stripe
from kvd.wire.errors import InvalidRequest

#: Most layers x heads that a namespace may have: bounds the integer that a partly written chunk needs.
MAX_CELLS = 1 << 16
#: Distinct stripes whose bits are kept: a namespace sees a few (one per rank), a hostile client many.
_MAX_KEPT = 256


class Grid:
    """The grid of one namespace: ``layers`` x ``heads`` cells, bit ``layer * heads + head`` for each.

    Raises ``InvalidRequest`` when a side is not positive or the grid has more than ``MAX_CELLS`` cells.
    """

    __slots__ = ("_kept", "heads", "layers", "whole")

    def __init__(self, layers: int, heads: int) -> None:
        if layers < 1 or heads < 1 or layers * heads > MAX_CELLS:
            raise InvalidRequest(f"a grid of {layers} layers x {heads} heads is not between 1 and {MAX_CELLS} cells")
        self.layers = layers
        self.heads = heads
        self.whole = (1 << layers * heads) - 1
        self._kept: dict[Stripe, int] = {}

    def bits(self, stripe: Stripe) -> int:
        """The cells of ``stripe``. Raises ``InvalidRequest`` when it is empty or not inside the grid."""
        kept = self._kept.get(stripe)
        if kept is not None:
            return kept
        layer_begin, layer_end, head_begin, head_end = stripe
        if not (0 <= layer_begin < layer_end <= self.layers and 0 <= head_begin < head_end <= self.heads):
            raise InvalidRequest(f"{stripe} is not inside {self.layers} layers x {self.heads} heads")
        row = ((1 << head_end - head_begin) - 1) << head_begin
        # One bit at the begin of each row, times the row's bits: all rows at once.
        every_row = ((1 << self.heads * (layer_end - layer_begin)) - 1) // ((1 << self.heads) - 1)
        cells = (row * every_row) << (layer_begin * self.heads)
        if len(self._kept) < _MAX_KEPT:
            self._kept[stripe] = cells
        return cells
