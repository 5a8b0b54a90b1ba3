"""In the engine's process: a synchronous load and the forward pass that needs it, taking turns layer by layer."""

from __future__ import annotations

import threading
from typing import Any

from kvd_client import layout

#: Longer than a load's own deadline.
TURN_TIMEOUT_S = 30.0


class LockStep:
    """Cuts loads into bands of one layer, and copies none before the forward pass has asked for it. An engine that
    waited for more than the layer that it is about to use would wait until the load has failed.

    ``fail_layer``: the copy of that layer raises.
    """

    def __init__(self, worker: Any) -> None:
        layout.MIN_BAND_BYTES = 1
        self.fail_layer: int | None = None
        self._worker, self._asked, self._turn = worker, -1, threading.Condition()
        copier = worker._transfers._copier
        self._begin, self._await_layer, self._load = worker.load, worker.await_layer, copier.load
        worker.load, worker.await_layer, copier.load = self._step, self._ask, self._copy

    def _step(self, *args: Any, **kwargs: Any) -> None:
        with self._turn:
            self._asked = -1
        self._begin(*args, **kwargs)

    def _ask(self, name: str) -> None:
        with self._turn:
            self._asked = max(self._asked, self._worker._layers[name])
            self._turn.notify_all()
        self._await_layer(name)

    def _copy(self, chunks: Any, sources: Any, form: Any, deadline: float, after: Any, layers: range) -> bool:
        with self._turn:
            if not self._turn.wait_for(lambda: self._asked >= layers.start, TURN_TIMEOUT_S):
                return False
        if layers.start == self.fail_layer:
            raise RuntimeError("this layer cannot be copied")
        return bool(self._load(chunks, sources, form, deadline, after, layers))
