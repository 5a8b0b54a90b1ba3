"""Requests that wait for chunks on their way into the daemon's memory, instead of computing them at once."""

from __future__ import annotations

import time
from dataclasses import dataclass

from kvd_client.adapters.vllm.stats import Tally
from kvd_client.patience import Patience

#: A request waits no longer when nothing has come for this share of the time that it may wait.
STALL_SHARE = 0.25
#: Questions asked again take one part in so many of the engine's time, however many requests wait.
PACE = 5


@dataclass
class _Wait:
    patience: Patience
    arrived: int  # chunks that were there when it began


class Waits:
    """Called on the engine's thread. ``timeout_s``: longest wait of one request; 0: nobody waits."""

    def __init__(self, timeout_s: float, tally: Tally) -> None:
        self._timeout_s = timeout_s
        self._tally = tally
        self._waits: dict[str, _Wait] = {}
        self._over: set[str] = set()  # a request waits once
        self._quiet_until = 0.0

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waits)

    def due(self, request_id: str) -> bool:
        """Whether a request that waits is to ask again now. At its deadline it always is, for the last time."""
        patience, now = self._waits[request_id].patience, time.monotonic()
        return now >= patience.deadline or now >= max(patience.ask_at, self._quiet_until)

    def heard(self, request_id: str, asked_at: float, arrived: int, promoting: int) -> bool:
        """The answer to a request's question of ``asked_at``: chunks that are there, and chunks on their way. True: the
        request waits, and asks again when that is ``due``; False: it takes what there is."""
        now, wait = time.monotonic(), self._waits.get(request_id)
        if wait is not None:
            self._quiet_until = now + PACE * (now - asked_at)
        elif not promoting or request_id in self._over:
            return False
        else:
            wait = _Wait(Patience(now, self._timeout_s, STALL_SHARE * self._timeout_s), arrived)
            self._waits[request_id] = wait
            self._tally.add(promote_waits=1)
        if wait.patience.heard(now, arrived, promoting):
            return True
        del self._waits[request_id]
        self._over.add(request_id)
        self._tally.add(
            promote_seconds=now - wait.patience.began,
            promoted_chunks=max(0, arrived - wait.arrived),
            promote_misses=promoting,
        )
        return False

    def end(self, request_id: str) -> None:
        """The request is gone."""
        self._waits.pop(request_id, None)
        self._over.discard(request_id)
