"""Copier for KV caches in CUDA memory: kernels inside device memory, copy engines between device and host.

Store: one gather kernel in the engine's stream packs the pages into a ring of staging slots; from then on the pages are
free. The transfer thread that waits for the store moves the bytes to host memory on a stream of its own.
Load: piece by piece, host memory to staging to pages, on another stream, two pieces in flight.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvd.wire.chunks import Stripe
from kvd_client import kernels
from kvd_client.copier import MAX_INFLIGHT_BYTES, Form, Mark, Pending
from kvd_client.cuda import CupyDevice, Device, Event, Stream
from kvd_client.dma import HostDma, Side
from kvd_client.layout import ChunkLayout, Piece, Shard, consecutive, is_empty, pieces
from kvd_client.memory import RankPages, address_of
from kvd_client.pinning import Pinning
from kvd_client.staging import Ring

log = logging.getLogger(__name__)

#: Bytes handed to a copy engine at once: small enough that the engine's own small copies do not queue for long.
PIECE_BYTES = 8 << 20
#: How often a thread looks whether the engine's stream has come to an event. CUDA has no wait with a deadline.
POLL_S = 0.0005
_ALIGN = 256


class _Ids(NamedTuple):
    """A table of block ids, one row per chunk: in pinned host memory, and on the device."""

    host: torch.Tensor
    device: torch.Tensor


@dataclass
class _Lane:
    """One of the pieces of a load that are in flight."""

    staging: torch.Tensor
    ids: _Ids
    event: Event | None = None


class CupyCopier(RankPages):
    """The ``Copier`` for CUDA tensors."""

    def __init__(
        self,
        kv_caches: Mapping[str, torch.Tensor],
        layout: ChunkLayout,
        shard: Shard,
        *,
        max_inflight_bytes: int = MAX_INFLIGHT_BYTES,
        piece_bytes: int = PIECE_BYTES,
        device: Device | None = None,
    ) -> None:
        """Takes views as ``make_copier`` does; allocates the staging memory. ``piece_bytes`` bounds one device copy.

        Raises LayoutError when the views do not fit, ImportError without CuPy, RuntimeError when the device refuses.
        """
        super().__init__(kv_caches, layout, shard)
        self._device = device or CupyDevice(self.caches[0].device)
        self._pinning = Pinning(self._device)
        self._dma = HostDma(layout, self._device, self._pinning)
        self._load_lock = threading.Lock()
        self._piece_bytes = piece_bytes
        self._slot_bytes = -(-max(self.store_bytes, 1) // _ALIGN) * _ALIGN
        self._ring = Ring(max(1, max_inflight_bytes // self._slot_bytes) if self.store_bytes else 1)
        self._left_lock = threading.Lock()
        #: Stores whose waiters left before the gather was done: their slots are free when it is.
        self._left: list[tuple[int, Event]] = []
        #: Stores of which the device could not say that they are over: their memory stays mapped.
        self._lost: list[_Store] = []
        # Engines register their caches in inference mode; tensors made in it could not be written by transfer threads.
        with self._device.current(), torch.inference_mode(False):
            self._store_side, self._load_side = self._side(self.stripe), self._side(self.load_stripe)
            self._staging = self._device.memory(self._ring.slots * self._slot_bytes)
            self._ids = self._new_ids(self._ring.slots)
            self._store_stream, self._load_stream = self._device.stream(), self._device.stream()
            # The memory may have been the engine's a moment ago; its last use must be over before other streams write.
            self._device.engine_stream().synchronize()
            layer_bytes = self._load_side.layer_bytes
            # A piece of a load by layers may be one layer of many chunks.
            rows, size = max(1, piece_bytes // min(layer_bytes)), max(piece_bytes, *layer_bytes)
            self._lanes = [_Lane(self._device.memory(size), self._new_ids(rows)) for _ in range(2)]

    def room(self) -> int:
        """Free slots of the staging ring."""
        self._reclaim()
        return self._ring.free

    def start_store(self, chunks: Sequence[Sequence[int]], targets: Sequence[memoryview], form: Form) -> Pending | None:
        """One launch in the engine's stream; see ``Copier``."""
        self.check_store(chunks, targets, form)
        if not chunks or is_empty(self.stripe):
            return _Nothing()
        self._reclaim()
        first = self._ring.take(len(chunks))
        if first is None:
            return None
        try:
            with self._device.current():
                stream = self._device.engine_stream()
                rows = [(first + chunk) % self._ring.slots for chunk in range(len(chunks))]
                self._upload(self._ids, rows, chunks, stream)
                whole = Piece(0, len(chunks), 0, len(self._store_side.layer_bytes))
                ring = (self._staging.data_ptr(), self._slot_bytes, first, self._ring.slots)
                self._launch("gather", self._store_side, whole, self._ids, ring, stream)
                gathered = self._device.record(stream)
        except BaseException:
            # Only the engine's stream may have touched the slots, and their next user comes later in that stream.
            self._ring.give(first)
            raise
        return _Store(self, first, list(targets), form, gathered)

    def mark(self) -> Mark | None:
        """An event in the engine's stream."""
        with self._device.current():
            return self._device.record(self._device.engine_stream())

    def load(
        self,
        chunks: Sequence[Sequence[int]],
        sources: Sequence[memoryview],
        form: Form,
        deadline: float,
        after: Mark | None = None,
        layers: range | None = None,
    ) -> bool:
        """Copies in prefix order; see ``Copier``. One load at a time, others wait for it up to their deadline."""
        wanted = layers if layers is not None else range(self.load_layers)
        self.check_load(chunks, sources, form, wanted)
        if not self._load_lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return False
        try:
            with self._device.current():
                if after is not None and not _passed(after, deadline):
                    return False
                try:
                    return self._load_pieces(chunks, sources, form, deadline, wanted)
                finally:
                    self._load_stream.synchronize()
        finally:
            self._load_lock.release()

    def register(self, memory: memoryview) -> None:
        """Registers in the background; see ``Copier``."""
        self._pinning.add(memory)

    def unregister(self, memory: memoryview) -> None:
        """Waits for the piece being registered, then undoes all."""
        self._pinning.remove(address_of(memory))

    def close(self) -> None:
        """Waits for the streams and lets go of memory and registrations."""
        with self._device.current():
            self._store_stream.synchronize()
            self._load_stream.synchronize()
        self._pinning.clear()
        self._lanes, self.caches = [], []
        self._staging = torch.empty(0)

    def _side(self, stripe: Stripe) -> Side:
        pages = self.geometries[self.local_layers(stripe)] if not is_empty(stripe) else []
        packed = self.layout.packed_offsets(stripe)
        rows = [word for row in kernels.layer_rows(pages, packed) for word in row]
        table = self._device.words(max(1, len(rows)))
        if rows:
            table.copy_(torch.tensor(rows, dtype=torch.int64))
        return Side(stripe, packed, table, kernels.vector_bytes(pages) if pages else 1)

    def _new_ids(self, rows: int) -> _Ids:
        words = rows * self.layout.chunk_blocks
        return _Ids(self._device.pinned_words(words), self._device.words(words))

    def _upload(self, ids: _Ids, rows: Sequence[int], chunks: Sequence[Sequence[int]], stream: Stream) -> None:
        """Starts to write the block ids of each chunk into its row of the table on the device."""
        width = self.layout.chunk_blocks
        for row, blocks in zip(rows, chunks, strict=True):
            ids.host[row * width : (row + 1) * width] = torch.tensor(blocks, dtype=torch.int64)
        for run in consecutive(rows):
            begin, size = run.block * width * 8, run.length * width * 8
            self._device.copy(ids.device.data_ptr() + begin, ids.host.data_ptr() + begin, size, stream)

    def _launch(
        self, direction: str, side: Side, piece: Piece, ids: _Ids, ring: tuple[int, int, int, int], stream: Stream
    ) -> None:
        """Starts the kernel over chunks and layers of ``piece``. ``ring``: staging address, slot stride, first slot,
        number of slots."""
        heads = side.stripe.head_end - side.stripe.head_begin
        chunks, layers = piece.chunk_end - piece.chunk_begin, piece.layer_end - piece.layer_begin
        most = kernels.GATHER_BLOCKS if direction == "gather" else kernels.SCATTER_BLOCKS
        width = self.layout.chunk_blocks
        blocks = min(most, chunks * layers * width * heads)
        args = (side.table.data_ptr(), piece.layer_begin, layers, ids.device.data_ptr(), chunks, width, heads, *ring)
        self._device.launch(kernels.kernel_name(direction, side.width), blocks, args, stream)

    def _load_pieces(
        self,
        chunks: Sequence[Sequence[int]],
        sources: Sequence[memoryview],
        form: Form,
        deadline: float,
        layers: range,
    ) -> bool:
        side, stream = self._load_side, self._load_stream
        for number, piece in enumerate(pieces(side.layer_bytes, len(chunks), self._piece_bytes, layers)):
            lane = self._lanes[number % len(self._lanes)]
            if lane.event is not None:
                lane.event.synchronize()
            if time.monotonic() > deadline:
                return False
            members = range(piece.chunk_begin, piece.chunk_end)
            self._upload(lane.ids, range(len(members)), [chunks[chunk] for chunk in members], stream)
            per_chunk = side.packed[piece.layer_end] - side.packed[piece.layer_begin]
            for index, chunk in enumerate(members):
                staging = lane.staging.data_ptr() + index * per_chunk
                self._dma.start(
                    side, piece, sources[chunk], form, staging, stream, to_host=False, first_layer=layers.start
                )
            ring = (lane.staging.data_ptr(), per_chunk, 0, len(members))
            self._launch("scatter", side, piece, lane.ids, ring, stream)
            lane.event = self._device.record(stream)
        return True

    def _finish(self, store: _Store, deadline: float) -> bool:
        """Moves a gathered store to its targets. Called once per store."""
        if not _passed(store.gathered, deadline):
            with self._left_lock:
                self._left.append((store.first, store.gathered))
            return False
        arrived = False
        with self._device.current():
            try:
                arrived = self._store_pieces(store, deadline)
            except RuntimeError as error:
                log.warning("a store to host memory failed: %s", error)
            try:
                self._store_stream.synchronize()
            except RuntimeError:
                # Nobody can say whether the device still writes: the memory must not go back to anyone.
                self._lost.append(store)
                raise
        self._ring.give(store.first)
        return arrived

    def _store_pieces(self, store: _Store, deadline: float) -> bool:
        side, stream = self._store_side, self._store_stream
        under_way: deque[Event] = deque()
        for piece in pieces(side.layer_bytes, len(store.targets), self._piece_bytes):
            if len(under_way) == 2:
                under_way.popleft().synchronize()
            if time.monotonic() > deadline:
                return False
            for chunk in range(piece.chunk_begin, piece.chunk_end):
                slot = (store.first + chunk) % self._ring.slots
                staging = self._staging.data_ptr() + slot * self._slot_bytes + side.packed[piece.layer_begin]
                self._dma.start(side, piece, store.targets[chunk], store.form, staging, stream, to_host=True)
            under_way.append(self._device.record(stream))
        return True

    def _reclaim(self) -> None:
        """Frees the slots of stores that nobody waits for any more and whose gather is over."""
        with self._left_lock:
            over = [item for item in self._left if item[1].done]
            self._left = [item for item in self._left if item not in over]
        for first, _ in over:
            self._ring.give(first)


class _Nothing:
    """A store of no bytes."""

    def wait(self, deadline: float) -> bool:
        """Always True."""
        return True


class _Store:
    """A store whose gather was launched."""

    def __init__(self, copier: CupyCopier, first: int, targets: list[memoryview], form: Form, gathered: Event) -> None:
        """Holds the ring slots from ``first`` on, and the targets: as long as they may be written they stay mapped."""
        self.first, self.targets, self.form, self.gathered = first, targets, form, gathered
        self._copier = copier
        self._lock = threading.Lock()
        self._answer: bool | None = None

    def wait(self, deadline: float) -> bool:
        """Waits for the gather, then copies to the targets; see ``Pending``."""
        with self._lock:
            if self._answer is None:
                self._answer = self._copier._finish(self, deadline)
                self.targets = []
            return self._answer


def _passed(event: Mark, deadline: float) -> bool:
    """Waits until the engine's stream has come to ``event``; False when the deadline comes first."""
    while not event.done:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
