"""Loads: from leased slots into the engine's pages, chunk by chunk or layer by layer. On the load thread.

*By chunk*, what has come when a deadline passes or a chunk is lost is a shorter prefix. *By layer* the bytes come in
the order in which a forward pass needs them, so it can begin with the first layers before the last have come; what is
late is late with all its chunks, because a chunk counts when all its layers are there. Either way chunks are checked
after their last byte has been copied, and nothing is reported before: a layer that a forward pass has already used may
yet turn out to be part of a failed load, and then the engine drops what it has computed in that step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvd.wire.chunks import Location
from kvd_client.adapters.vllm.buffers import Buffers
from kvd_client.adapters.vllm.log import complain
from kvd_client.adapters.vllm.meta import LoadJob
from kvd_client.copier import Copier, Form, Mark
from kvd_client.layout import bands
from kvd_client.path import DataPath, Piece

if TYPE_CHECKING:
    from kvd.wire.spans import Span

#: Loads by chunk are copied and checked in batches of about so many bytes, so that a deadline or a lost chunk costs
#: little.
BATCH_BYTES = 64 << 20


class Progress:
    """How far loads have come. Told by their thread, waited for by the engine's."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._layers = 0
        self._over = False

    def reach(self, layers: int) -> None:
        """The first ``layers`` layers are in the pages, as far as they have not failed."""
        with self._changed:
            self._layers = layers
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing is under way any more, and every outcome can be collected."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def wait(self, deadline: float, layers: int | None = None) -> bool:
        """Waits until the first ``layers`` layers have come or all is over (None: until all is over). False: the
        deadline (``time.monotonic`` seconds) came first."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._over or (layers is not None and self._layers >= layers),
                max(0.0, deadline - time.monotonic()),
            )


@dataclass
class _Prefix:
    """A job of a load by layers: how many of its chunks are good so far."""

    path: DataPath
    job: LoadJob
    sources: list[memoryview]  # shared memory: the slots; they stay mapped while this lives
    good: int


class Loader:
    """Carries out load jobs with one copier. One thread at a time.

    Every answer is how many chunks at the front of a job are in the pages, checked after their copy.
    """

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._buffers = Buffers(copier.load_bytes, copier.load_bytes)  # one: loads go one after the other

    def by_chunk(self, path: DataPath, job: LoadJob, mark: Mark | None, deadline: float) -> int:
        """One job, until a chunk fails."""
        count = len(job.locations)
        if path.kind == "tcp":
            return self._read(path, job, count, range(self._copier.load_layers), mark, deadline)
        step = max(1, BATCH_BYTES // self._copier.load_bytes)
        for first in range(0, count, step):
            locations, blocks = job.locations[first : first + step], job.blocks[first : first + step]
            sources = self._views(path, locations)
            if not sources or not self._copier.load(blocks, sources, Form.SLOT, deadline, mark):
                return first
            if (good := _front(path.intact(locations))) < len(locations):
                return first + good
        return count

    def by_layer(
        self,
        jobs: Sequence[tuple[DataPath, LoadJob]],
        mark: Mark | None,
        deadline: float,
        reached: Callable[[int], None],
    ) -> list[int]:
        """Several jobs together. ``reached`` hears how many of the first layers have come, of every chunk that is
        still good."""
        prefixes = [self._prefix(path, job) for path, job in jobs]
        total_bytes = sum(prefix.good for prefix in prefixes) * self._copier.load_bytes
        for layers in bands(self._copier.load_layers, total_bytes):
            for prefix in prefixes:
                if prefix.good:
                    prefix.good = self._layers(prefix, layers, mark, deadline)
            reached(layers.stop)
        return [_front(each.path.intact(each.job.locations[: each.good])) for each in prefixes]

    def _prefix(self, path: DataPath, job: LoadJob) -> _Prefix:
        if path.kind == "tcp":
            return _Prefix(path, job, [], len(job.locations))
        sources = self._views(path, job.locations)
        return _Prefix(path, job, sources, len(sources))

    def _layers(self, prefix: _Prefix, layers: range, mark: Mark | None, deadline: float) -> int:
        """Some layers of the chunks that are still good; returns how many are good now."""
        path, job, good = prefix.path, prefix.job, prefix.good
        try:
            if path.kind == "tcp":
                return self._read(path, job, good, layers, mark, deadline)
            sources, blocks = prefix.sources[:good], job.blocks[:good]
            return good if self._copier.load(blocks, sources, Form.SLOT, deadline, mark, layers) else 0
        except Exception:
            complain("load", "kvd: a load failed and is computed instead", exc_info=True)
            return 0

    def _views(self, path: DataPath, locations: Sequence[Location]) -> list[memoryview]:
        """The slots, all or none."""
        views = [path.view(location, self._copier.chunk_bytes) for location in locations]
        found = [view for view in views if view is not None]
        return found if len(found) == len(views) else []

    def _read(self, path: DataPath, job: LoadJob, count: int, layers: range, mark: Mark | None, deadline: float) -> int:
        """``layers`` of the first ``count`` chunks over TCP, as many chunks at a time as the buffer holds."""
        spans = self._copier.load_spans(layers)
        size = sum(span.size for span in spans)
        step = self._copier.load_bytes // size
        taken = self._buffers.take(1)
        assert taken is not None
        try:
            for first in range(0, count, step):
                locations, blocks = job.locations[first : min(first + step, count)], job.blocks[first : first + step]
                parts = [taken[0][i * size : (i + 1) * size] for i in range(len(locations))]
                each = [pieces_of(*at, spans) for at in zip(locations, parts, strict=True)]
                arrived = path.read(job.lease_id, [piece for pieces in each for piece in pieces], deadline)
                good = _front([all(arrived[i : i + len(spans)]) for i in range(0, len(arrived), len(spans))])
                if good and not self._copier.load(blocks[:good], parts[:good], Form.PACKED, deadline, mark, layers):
                    return first
                if good < len(locations):
                    return first + good
            return count
        finally:
            self._buffers.give(taken)


def pieces_of(location: Location, buffer: memoryview, spans: list[Span]) -> list[Piece]:
    """The spans of one chunk, back to back in ``buffer``."""
    pieces, at = [], 0
    for span in spans:
        pieces.append(Piece(location, span, buffer[at : at + span.size]))
        at += span.size
    return pieces


def _front(good: Sequence[bool]) -> int:
    """How many are good before the first that is not."""
    return list(good).index(False) if False in good else len(good)
