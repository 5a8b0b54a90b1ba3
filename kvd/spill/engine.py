"""The threads that move bytes: they take the books' orders and answer each of them exactly once.

Every drive has readers and writers of its own, so a drive that hangs holds up nobody else. Checksums of new chunks and
checks of old ones have threads without a drive. An order for a drive that does not work fails at once. One that has
begun is answered when the kernel has let go of its buffers, not before: the slot may then serve somebody else.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvd.spill.codec import Encoder
from kvd.spill.drive import Attachment, Drive, DriveState, Watcher
from kvd.spill.queues import DriveQueue, SealQueue
from kvd.spill.transfer import Buffers, Corrupt, Failed, checksum_of, move_record, read_record, write_record
from kvd.types import Move, Order, Outcome, Read, Result, Seal, Verify, Write

log = logging.getLogger(__name__)

#: Between two looks at the clock for drives that hang.
_WATCH_S = 0.25
#: Unreadable records that count as corrupt before the drive counts as broken: so many within so many seconds.
_BAD_READS = 3
_BAD_READS_S = 60.0


@dataclass(frozen=True, slots=True)
class Threads:
    """How many threads of each kind."""

    readers: int = 8  # per drive
    writers: int = 4  # per drive
    sealers: int = 2

    @property
    def movers(self) -> int:
        """Writers of a drive that may be moving at once."""
        return max(1, self.writers // 2)


@dataclass(slots=True)
class DriveCounters:
    """What has been done on one drive since the start."""

    read_bytes: int = 0
    written_bytes: int = 0
    moved_bytes: int = 0


class _Lane:
    """A drive, what waits for it, and what has become of what did."""

    def __init__(self, drive: Drive, threads: Threads) -> None:
        self.drive = drive
        self.queue = DriveQueue(threads.movers)
        self.counters = DriveCounters()
        self.lock = threading.Lock()
        self.bad_reads: deque[float] = deque(maxlen=_BAD_READS)

    def tolerates_bad_read(self) -> bool:
        """A record cannot be read: whether to blame the spot rather than the drive."""
        now = time.monotonic()
        with self.lock:
            self.bad_reads.append(now)
            return len(self.bad_reads) < _BAD_READS or now - self.bad_reads[0] > _BAD_READS_S


class Movers:
    """Moves bytes between ``pool`` and ``drives`` as ordered.

    ``complete`` hears every result, in a thread of the movers or within ``submit``; it must not wait for anything.
    ``watcher`` hears what becomes of the drives. The pool must stay mapped until ``close`` has returned True.
    """

    def __init__(
        self,
        pool: memoryview,
        drives: Sequence[Drive],
        complete: Callable[[Result], None],
        watcher: Watcher,
        *,
        encoder: Encoder | None = None,
        threads: Threads | None = None,
    ) -> None:
        self._threads = threads or Threads()
        self._pool = pool
        self._lanes = [_Lane(drive, self._threads) for drive in drives]
        self._sealing = SealQueue()
        self._complete = complete
        self._watcher = watcher
        self._encoder = encoder
        self._open: dict[int, Order] = {}  # by ticket; an entry is taken out by whoever answers
        self._closing = threading.Event()
        self._started: list[threading.Thread] = []
        for drive in drives:
            drive.watch(self)

    # -- for the books

    def start(self) -> None:
        """Starts the threads. Drives that are not open yet are opened by theirs."""
        for lane in self._lanes:
            for number in range(self._threads.readers):
                self._spawn(f"kvd-read-{lane.drive.index}.{number}", self._read_all, lane)
            for number in range(self._threads.writers):
                self._spawn(f"kvd-write-{lane.drive.index}.{number}", self._write_all, lane)
            self._spawn(f"kvd-drive-{lane.drive.index}", lane.drive.run)
        for number in range(self._threads.sealers):
            self._spawn(f"kvd-seal-{number}", self._seal_all)
        self._spawn("kvd-drive-watch", self._watch)

    def submit(self, order: Order) -> None:
        """Takes an order; its one result comes to ``complete``, maybe before this returns."""
        self._open[order.ticket] = order
        if isinstance(order, (Seal, Verify)):
            queued = self._sealing.put(order)
        else:
            lane = self._lanes[order.target.drive if isinstance(order, Move) else order.place.drive]
            queued = lane.drive.state is DriveState.WORKING and lane.queue.put(order)
        if not queued:
            self._fail([order])

    def close(self, timeout_s: float) -> bool:
        """Ends what is under way and fails what waits; whether all threads have ended within the time.

        When they have not, the kernel may still use the slots of their orders, which are answered all the same.
        """
        deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._fail(self._sealing.close())
        for lane in self._lanes:
            self._fail(lane.queue.close())
        # Writers first: what they have written shall be synced by the drives' keepers as these end.
        for thread in self._started:
            if not thread.name.startswith("kvd-drive"):
                thread.join(max(0.0, deadline - time.monotonic()))
        for lane in self._lanes:
            lane.drive.close()
        for thread in self._started:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._fail(list(self._open.values()))
        return not any(thread.is_alive() for thread in self._started)

    def counters(self, drive: int) -> DriveCounters:
        """What has been done on a drive."""
        return self._lanes[drive].counters

    def waiting(self, drive: int) -> int:
        """Orders that wait for a drive."""
        return len(self._lanes[drive].queue)

    # -- what the drives say

    def attached(self, drive: int, attachment: Attachment) -> None:
        """Passed on."""
        self._watcher.attached(drive, attachment)

    def state_changed(self, drive: int, state: DriveState, reason: str) -> None:
        """Fails what waits for a drive that does not work; passed on."""
        if state is not DriveState.WORKING:
            self._fail(self._lanes[drive].queue.drain())
        self._watcher.state_changed(drive, state, reason)

    def available(self, drive: int, extents: int) -> None:
        """Passed on."""
        self._watcher.available(drive, extents)

    def lost(self, drive: int, extents: list[int]) -> None:
        """Passed on."""
        self._watcher.lost(drive, extents)

    # -- threads

    def _spawn(self, name: str, run: Callable[..., None], *arguments: object) -> None:
        # As daemons: one that the kernel never lets go of must not keep the process from ending.
        thread = threading.Thread(target=run, args=arguments, name=name, daemon=True)
        self._started.append(thread)
        thread.start()

    def _read_all(self, lane: _Lane) -> None:
        buffers = Buffers()
        while (order := lane.queue.take_read()) is not None:
            self._do(lane, order, buffers)

    def _write_all(self, lane: _Lane) -> None:
        buffers = Buffers()
        while (order := lane.queue.take_write()) is not None:
            try:
                self._do(lane, order, buffers)
            finally:
                if isinstance(order, Move):
                    lane.queue.moved()

    def _seal_all(self) -> None:
        while (order := self._sealing.take()) is not None:
            try:
                self._answer(self._seal(order) if isinstance(order, Seal) else self._verify(order))
            except Exception:
                log.exception("a chunk could not be sealed or verified")
                self._fail([order])

    def _watch(self) -> None:
        while not self._closing.wait(_WATCH_S):
            for lane in self._lanes:
                lane.drive.judge()
                if lane.drive.state is not DriveState.WORKING:
                    self._fail(lane.queue.drain())  # what came in just as the state changed

    # -- orders

    def _do(self, lane: _Lane, order: Read | Write | Move, buffers: Buffers) -> None:
        result = Result(order.ticket, Outcome.FAILED)
        try:
            if lane.drive.state is DriveState.WORKING:
                result = self._move_bytes(lane, order, buffers)
        except Corrupt as error:
            result = Result(order.ticket, Outcome.CORRUPT)
            log.warning("%s: a record is corrupt: %s", lane.drive.path, error)
        except Failed as failure:
            if self._only_this_record(failure):
                result = Result(order.ticket, Outcome.CORRUPT)
        except Exception:
            log.exception("%s: an order could not be done", lane.drive.path)
        finally:
            _count(lane, order, result.outcome)
            buffers.relax()
            self._answer(result)

    def _move_bytes(self, lane: _Lane, order: Read | Write | Move, buffers: Buffers) -> Result:
        if isinstance(order, Read):
            return Result(order.ticket, Outcome.OK, read_record(lane.drive, order, self._pool, buffers))
        if isinstance(order, Write):
            write_record(lane.drive, order, self._pool, buffers)
        else:
            source = self._lanes[order.source.drive].drive
            if source.state is not DriveState.WORKING:
                return Result(order.ticket, Outcome.FAILED)
            move_record(source, lane.drive, order, buffers)
        return Result(order.ticket, Outcome.OK)

    def _only_this_record(self, failure: Failed) -> bool:
        """Tells the drive of a failure, unless it is a spot that cannot be read."""
        lane = self._lanes[failure.drive.index]
        unreadable = failure.reading and isinstance(failure.error, OSError) and failure.error.errno == errno.EIO
        if unreadable and lane.tolerates_bad_read():
            log.warning("%s: a record cannot be read: %s", failure.drive.path, failure)
            return True
        failure.drive.failed(failure.error)
        return False

    def _seal(self, order: Seal) -> Result:
        namespace = order.namespace
        chunk = self._pool[order.offset : order.offset + namespace.chunk_bytes]
        checksum = checksum_of(chunk)
        encoded = self._encoder.encode(chunk, namespace.id) if order.encode and self._encoder is not None else None
        return Result(order.ticket, Outcome.OK, checksum, encoded)

    def _verify(self, order: Verify) -> Result:
        same = checksum_of(self._pool[order.offset : order.offset + order.chunk_bytes]) == order.checksum
        return Result(order.ticket, Outcome.OK if same else Outcome.CORRUPT)

    # -- answers

    def _answer(self, result: Result) -> None:
        if self._open.pop(result.ticket, None) is None:
            return  # answered by ``close``, which did not wait for it any longer
        try:
            self._complete(result)
        except Exception:
            log.exception("nobody heard the result of order %d", result.ticket)

    def _fail(self, orders: Sequence[Order]) -> None:
        for order in orders:
            self._answer(Result(order.ticket, Outcome.FAILED))


def _count(lane: _Lane, order: Read | Write | Move, outcome: Outcome) -> None:
    if outcome is not Outcome.OK:
        return
    with lane.lock:
        counters = lane.counters
        if isinstance(order, Read):
            counters.read_bytes += order.place.record_bytes
        elif isinstance(order, Write):
            counters.written_bytes += order.place.record_bytes
        else:
            counters.moved_bytes += order.target.record_bytes
