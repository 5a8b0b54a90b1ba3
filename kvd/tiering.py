"""Between the books, which live on the event loop, and the threads that move bytes for them.

Orders go out as soon as the books have made some; results, and news of the drives, come back as calls on the loop. What
a former daemon wrote is scanned beside the requests: what has been found so far is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from kvd.ledger.restoring import RecordRestorer
from kvd.spill.budget import WriteBudget
from kvd.spill.codec import Encoder
from kvd.spill.drive import Attachment, Drive, DriveFailed, DriveState
from kvd.spill.engine import Movers
from kvd.spill.extents import Extents
from kvd.spill.scan import Batch, Scan
from kvd.store import ChunkStore
from kvd.types import DriveFigures, Namespace, Outcome, Read, Result

log = logging.getLogger(__name__)

#: How often ``settle`` looks whether everything is sealed and written.
_POLL_S = 0.02
#: Records whose parents have not been found are kept this long for a drive that is missing.
MISSING_DRIVE_S = 60.0
#: How long a scan waits for the books to take in what it has found.
FOUND_TIMEOUT_S = 30.0
_DAY_S = 86400
_SCAN_STOP_S = 5.0


class DailyBudget:
    """A ``WriteBudget`` by this machine's clocks: what the books ask before they write."""

    def __init__(self, rate_bytes_s: int, daily_bytes: int) -> None:
        self._budget = WriteBudget(rate_bytes_s, daily_bytes, now=time.monotonic(), day=_today())

    def take(self, size_bytes: int) -> bool:
        """Whether so much may be written now; then it counts as written."""
        return self._budget.take(size_bytes, now=time.monotonic(), day=_today())

    def give(self, size_bytes: int) -> None:
        """What was taken and not written after all."""
        self._budget.give(size_bytes, day=_today())

    def count(self, size_bytes: int) -> None:
        """So much is written whatever the budget says."""
        self._budget.count(size_bytes, now=time.monotonic(), day=_today())

    @property
    def today_bytes(self) -> int:
        """Written today."""
        return self._budget.today_bytes(_today())

    def save(self) -> str:
        """The day's account, for ``restore``."""
        return self._budget.save()

    def restore(self, text: str) -> None:
        """Takes over the account of a former daemon, if it is of today."""
        self._budget.restore(text)


class Tiering:
    """Has the books' orders carried out. Lives on the event loop; ``pool`` must stay mapped until ``stop`` is over."""

    def __init__(
        self,
        store: ChunkStore,
        pool: memoryview,
        drives: Sequence[Drive] = (),
        extents: Extents | None = None,
        *,
        budget: DailyBudget | None = None,
        encoder: Encoder | None = None,
        promoted: Callable[[float], None],
    ) -> None:
        """``promoted`` hears how long each read of a record took, waiting included, seconds."""
        self._tiers = store.tiers
        self._drives = drives
        self._extents = extents
        self._budget = budget
        self._loop = asyncio.get_running_loop()
        self._promoted = promoted
        self._reads: dict[int, float] = {}  # when each was given out, by ticket
        self._results: deque[Result] = deque()
        self._scans: dict[int, Scan] = {}
        self._running: set[int] = set()
        self._attached_drives: set[int] = set()
        self._opening = set(range(len(drives)))
        self._opened = asyncio.Event()
        self._namespaces: dict[bytes, Namespace] = {}
        self._restorer: RecordRestorer | None = None
        if extents is not None:
            self._restorer = self._tiers.scan(lambda: self._namespaces)
        self._movers = Movers(pool, drives, self._complete, self, encoder=encoder)

    # -- life

    async def start(self, timeout_s: float) -> None:
        """Begins to carry out orders. Waits until the drives are open, at most ``timeout_s``: a disk may hang."""
        self._tiers.orders.wake = self._woken
        self._movers.start()
        self._give_out()
        if self._opening:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._opened.wait(), timeout_s)

    async def settle(self, timeout_s: float) -> None:
        """Waits until every chunk has its checksum, and its record if it is to have one; at most ``timeout_s``."""
        deadline = self._loop.time() + timeout_s
        while self._tiers.spilling.queued_chunks and self._loop.time() < deadline:
            await asyncio.sleep(_POLL_S)

    async def stop(self, timeout_s: float) -> bool:
        """Ends. False: a drive hangs, and the kernel may still use the pool."""
        scans = list(self._scans.values())
        for scan in scans:
            scan.stop()
        for scan in scans:
            await asyncio.to_thread(scan.join, _SCAN_STOP_S)
        return await asyncio.to_thread(self._movers.close, timeout_s)

    # -- orders and results

    def _woken(self) -> None:
        # Not at once: the request that has made the first order may make more.
        self._loop.call_soon(self._give_out)

    def _give_out(self) -> None:
        for order in self._tiers.orders.take():
            if isinstance(order, Read):
                self._reads[order.ticket] = time.monotonic()
            self._movers.submit(order)

    def _complete(self, result: Result) -> None:
        """From a thread, or from within ``submit``."""
        self._results.append(result)
        self._on_loop(self._finish)

    def _finish(self) -> None:
        while self._results:
            result = self._results.popleft()
            began = self._reads.pop(result.ticket, None)
            if began is not None and result.outcome is Outcome.OK:
                self._promoted(time.monotonic() - began)
            self._tiers.orders.finish(result)

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> bool:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed: the daemon has ended around this thread
            return False
        return True

    # -- news of the drives, from threads

    def attached(self, drive: int, attachment: Attachment) -> None:
        """The drive was opened: it takes records from now on, and what it holds already is looked for."""
        namespaces: dict[bytes, Namespace] = {}
        with contextlib.suppress(OSError, DriveFailed):
            namespaces = self._drives[drive].namespaces()
        self._on_loop(self._attached, drive, attachment, namespaces)

    def state_changed(self, drive: int, state: DriveState, reason: str) -> None:
        """The drive works, or does not."""
        self._on_loop(self._working, drive, state is DriveState.WORKING)

    def available(self, drive: int, extents: int) -> None:
        """The file system has room for this many extents of the drive."""
        self._on_loop(self._available, drive, extents)

    def lost(self, drive: int, extents: list[int]) -> None:
        """These extents are gone."""
        self._on_loop(self._lost, drive, extents)

    def found(self, batch: Batch) -> None:
        """A part of a scan. Waits until the books have it: the scan is not to run ahead of them."""
        done = threading.Event()
        if self._on_loop(self._found, batch, done):
            done.wait(FOUND_TIMEOUT_S)

    def ended(self, drive: int) -> None:
        """The scan of a drive is through."""
        self._on_loop(self._ended, drive)

    # -- the same on the loop

    def _attached(self, drive: int, attachment: Attachment, namespaces: dict[bytes, Namespace]) -> None:
        assert self._extents is not None
        self._extents.attach(drive, *attachment)
        self._attached_drives.add(drive)
        self._namespaces.update(namespaces)
        self._running.add(drive)
        scan = Scan(self._drives[drive], attachment.existing, self.found, lambda: self.ended(drive))
        self._scans[drive] = scan
        self._tiers.drives_changed()
        scan.start()
        self._open_or_not(drive)

    def _found(self, batch: Batch, done: threading.Event) -> None:
        assert self._restorer is not None and self._extents is not None
        try:
            self._restorer.found(batch.found)
            if batch.last:
                self._extents.scanned(batch.drive, batch.extent)
        finally:
            done.set()

    def _ended(self, drive: int) -> None:
        self._running.discard(drive)
        progress = self._scans[drive].progress
        told = ", ".join(f"{count} {reason}" for reason, count in progress.skipped.items()) or "nothing"
        log.info(
            "%s: %d records found in %d extents in %.1f s; skipped: %s",
            self._drives[drive].path,
            progress.records,
            progress.extents,
            progress.seconds,
            told,
        )
        if len(self._attached_drives) == len(self._drives):
            self._end_scan()
        else:
            self._loop.call_later(MISSING_DRIVE_S, self._end_scan)

    def _end_scan(self) -> None:
        if not self._running and self._restorer is not None:
            self._restorer.end()
            if self._restorer.orphans:
                log.info("%d records are of no use: without their parents, unknown, or dropped", self._restorer.orphans)
            self._tiers.scanned()

    def _working(self, drive: int, working: bool) -> None:
        assert self._extents is not None
        self._extents.set_working(drive, working)
        self._tiers.drives_changed()
        self._open_or_not(drive)

    def _open_or_not(self, drive: int) -> None:
        """It has turned out what becomes of the drive."""
        self._opening.discard(drive)
        if not self._opening:
            self._opened.set()

    def _available(self, drive: int, extents: int) -> None:
        assert self._extents is not None
        self._drives[drive].give_back(self._extents.set_available(drive, extents))
        self._tiers.drives_changed()

    def _lost(self, drive: int, extents: list[int]) -> None:
        assert self._extents is not None
        self._tiers.lost(drive, extents)
        self._extents.removed(drive, extents)
        self._tiers.drives_changed()

    # -- figures

    def figures(self) -> list[DriveFigures]:
        """Every drive as it is now."""
        return [self._figures(number) for number in range(len(self._drives))]

    def _figures(self, number: int) -> DriveFigures:
        assert self._extents is not None and self._tiers.records is not None
        drive, done = self._drives[number], self._movers.counters(number)
        use = self._extents.use(number)
        records = sum(len(inside) for (on, _), inside in self._tiers.records.by_extent.items() if on == number)
        progress = self._scans[number].progress if number in self._scans else None
        return DriveFigures(
            directory=drive.path,
            reason=drive.reason,
            capacity_bytes=use.capacity_bytes,
            live_bytes=use.live_bytes,
            dead_bytes=use.dead_bytes,
            free_bytes=use.free_bytes,
            records=records,
            extents=use.extents,
            read_bytes=done.read_bytes,
            written_bytes=done.written_bytes + done.moved_bytes,
            queue=self._movers.waiting(number),
            scanned_extents=0 if progress is None else progress.extents_done,
            found_extents=0 if progress is None else progress.extents,
        )


def _today() -> int:
    """Days since 1970, UTC."""
    return int(time.time()) // _DAY_S
