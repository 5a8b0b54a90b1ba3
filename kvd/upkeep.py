"""What has to be done now and then: ends of leases and silences, the loop's lag, an audit when all is quiet."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import Callable

from kvd.metrics import Metrics
from kvd.session import Sessions
from kvd.store import ChunkStore

log = logging.getLogger(__name__)

TICK_S = 0.5
#: How often the loop's lag is measured. Whatever holds the loop up for longer than this is seen, at whatever moment.
LAG_TICK_S = 0.02
#: Uses that are put into the books in one turn of the loop: well below a millisecond.
_USES_AT_A_TIME = 512
#: The books are audited when no session has asked anything for this long ...
QUIET_S = 3.0
#: ... and not more often than this, nor for more than one part in a hundred of the time.
AUDIT_EVERY_S = 60.0
_AUDIT_SHARE = 100

#: The books are freed by reference counts, and a full pass of Python's collector over them would stop the loop, the
#: longer the more chunks there are. So full passes are made when all is quiet; young objects are collected as always.
_YOUNG, _MIDDLE, _NEVER = 10_000, 20, 1 << 30


class Upkeep:
    """Runs beside the requests, on the event loop. ``last_request`` tells when a session last asked something."""

    def __init__(
        self, store: ChunkStore, sessions: Sessions, metrics: Metrics, last_request: Callable[[], float]
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._metrics = metrics
        self._last_request = last_request
        self._next_audit = time.monotonic() + AUDIT_EVERY_S
        self._tasks: list[asyncio.Task[None]] = []
        self._catching_up = False
        store.on_behind(self._catch_up_soon)

    def start(self) -> None:
        """Begins."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(_YOUNG, _MIDDLE, _NEVER)
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._measure_lag())]

    async def stop(self) -> None:
        """Ends."""
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self.tick(time.monotonic())
            except Exception:
                log.exception("upkeep failed; it goes on")

    def _catch_up_soon(self) -> None:
        if not self._catching_up:
            self._catching_up = True
            asyncio.get_running_loop().call_soon(self._catch_up)

    def _catch_up(self) -> None:
        """A part of the uses that wait, then whoever else has something to do, then the next part."""
        self._catching_up = False
        caught_up = False
        try:
            caught_up = self._store.catch_up(_USES_AT_A_TIME)
        except Exception:
            log.exception("uses were lost; the others are not")
        if not caught_up:
            self._catch_up_soon()

    async def _measure_lag(self) -> None:
        while True:
            due = time.monotonic() + LAG_TICK_S
            await asyncio.sleep(LAG_TICK_S)
            self._metrics.loop_lag(time.monotonic() - due)

    def tick(self, now: float) -> None:
        """One round."""
        self._store.tick()
        self._sessions.tick()
        if now >= self._next_audit and now - self._last_request() >= QUIET_S:
            self._audit(now)

    def _audit(self, now: float) -> None:
        gc.collect()
        findings = self._store.audit()
        self._metrics.audited(len(findings))
        for finding in findings:
            log.error("the books do not agree: %s", finding)
        took_s = time.monotonic() - now
        self._next_audit = now + max(AUDIT_EVERY_S, took_s * _AUDIT_SHARE)
