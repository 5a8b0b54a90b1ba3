"""Copies between a chunk's host memory and packed staging memory on the device, by the copy engines."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from kvd.wire.chunks import Stripe
from kvd.wire.spans import Span
from kvd_client.copier import Form
from kvd_client.cuda import Device, Stream
from kvd_client.layout import ChunkLayout, Piece, cut
from kvd_client.memory import address_of
from kvd_client.pinning import Pinning


class Side(NamedTuple):
    """What is fixed for one direction, store or load."""

    stripe: Stripe
    #: Where each of the stripe's layers begins in packed memory; the last entry is the length.
    packed: tuple[int, ...]
    #: The kernels' layer table, on the device, and the width of their vectors.
    table: torch.Tensor
    width: int

    @property
    def layer_bytes(self) -> list[int]:
        """Bytes of each layer in one chunk."""
        return [end - begin for begin, end in pairwise(self.packed)]


class HostDma:
    """Starts copies; whoever starts them waits for the stream before the memory is used."""

    def __init__(self, layout: ChunkLayout, device: Device, pinning: Pinning) -> None:
        """``pinning`` knows the edges that no copy may cross."""
        self._layout, self._device, self._pinning = layout, device, pinning

    def start(
        self,
        side: Side,
        piece: Piece,
        memory: memoryview,
        form: Form,
        staging: int,
        stream: Stream,
        *,
        to_host: bool,
        first_layer: int = 0,
    ) -> None:
        """Starts the copies of one chunk's layers of ``piece`` between its memory and packed bytes at ``staging``.
        Packed memory begins with ``first_layer`` of the stripe."""
        address = address_of(memory)
        for span in self._spans(side, piece, form, first_layer):
            edges = [edge - address for edge in self._pinning.edges(address + span.offset, span.end - span.offset)]
            for part in cut(span, edges):
                host = address + part.offset
                if part.count == 1 or part.stride == part.run:
                    target, source = (host, staging) if to_host else (staging, host)
                    self._device.copy(target, source, part.size, stream)
                elif to_host:
                    self._device.copy_rows(host, part.stride, staging, part.run, part.run, part.count, stream)
                else:
                    self._device.copy_rows(staging, part.run, host, part.stride, part.run, part.count, stream)
                staging += part.size

    def _spans(self, side: Side, piece: Piece, form: Form, first_layer: int) -> list[Span]:
        """Where the layers of ``piece`` lie in one chunk's memory."""
        if form is Form.SLOT:
            first = side.stripe.layer_begin
            layers = {"layer_begin": first + piece.layer_begin, "layer_end": first + piece.layer_end}
            return self._layout.spans(side.stripe._replace(**layers))
        begin, end = side.packed[piece.layer_begin], side.packed[piece.layer_end]
        return [Span(begin - side.packed[first_layer], end - begin, end - begin, 1)]
