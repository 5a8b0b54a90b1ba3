"""A regular pattern of bytes inside a slot: what one rank owns of a chunk.

A chunk is ``[layer][block][head][page]``. The pages of heads ``h0..h1`` of layers ``l0..l1`` are runs of equal
length at equal distances, so one ``Span`` names them all, however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Span(NamedTuple):
    """``count`` runs of ``run`` bytes, the first at ``offset`` bytes into the slot, starts ``stride`` bytes apart."""

    offset: int
    run: int
    stride: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs of this

    @property
    def size(self) -> int:
        """Bytes named by the span."""
        return self.run * self.count

    @property
    def end(self) -> int:
        """First byte after the last run, counted from the start of the slot."""
        return self.offset + self.stride * (self.count - 1) + self.run

    def runs(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of each run, in order, adjoining runs merged into one."""
        if self.stride == self.run or self.count == 1:
            yield self.offset, self.size
            return
        for i in range(self.count):
            yield self.offset + i * self.stride, self.run

    def fits(self, slot_bytes: int) -> bool:
        """Whether the span is well-formed and inside a slot of ``slot_bytes``. Never trust a span before this."""
        return (
            self.offset >= 0
            and self.run > 0
            and self.count > 0
            and self.stride >= (self.run if self.count > 1 else 0)
            and self.end <= slot_bytes
        )


def whole(chunk_bytes: int) -> Span:
    """The span of a whole chunk."""
    return Span(0, chunk_bytes, chunk_bytes, 1)
