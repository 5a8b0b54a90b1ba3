"""Who goes next: the orders that wait for a drive, and those that need no drive."""

from __future__ import annotations

import threading
import time
from collections import deque

from kvd.types import Move, Order, Read, Seal, Verify, Write

#: A write waits this long at most for the reads that are queued on its drive, seconds.
WRITE_PATIENCE_S = 0.02


class DriveQueue:
    """Orders of one drive: reads for the readers; writes and, after them, moves for the writers.

    While reads are queued no write is begun, but none waits for longer than ``WRITE_PATIENCE_S``. At most
    ``moves_at_once`` writers move, so that writes never wait for a queue of moves.
    """

    def __init__(self, moves_at_once: int) -> None:
        self._lock = threading.Lock()
        self._for_readers = threading.Condition(self._lock)
        self._for_writers = threading.Condition(self._lock)
        self._reads: deque[Read] = deque()
        self._writes: deque[Write] = deque()
        self._moves: deque[Move] = deque()
        self._moving = 0
        self._moves_at_once = moves_at_once
        self._closed = False

    def put(self, order: Read | Write | Move) -> bool:
        """Queues an order; False after ``close``."""
        with self._lock:
            if self._closed:
                return False
            if isinstance(order, Read):
                self._reads.append(order)
                self._for_readers.notify()
            elif isinstance(order, Write):
                self._writes.append(order)
                self._for_writers.notify()
            else:
                self._moves.append(order)
                self._for_writers.notify()
        return True

    def take_read(self) -> Read | None:
        """The next read; waits for one. None after ``close``."""
        with self._lock:
            while not self._reads:
                if self._closed:
                    return None
                self._for_readers.wait()
            order = self._reads.popleft()
            if not self._reads:
                self._for_writers.notify_all()
            return order

    def take_write(self) -> Write | Move | None:
        """The next write or move; waits for one. None after ``close``. A move must be ``moved`` when it has ended."""
        until: float | None = None
        with self._lock:
            while not self._closed:
                if not self._writes and (not self._moves or self._moving >= self._moves_at_once):
                    until = None
                    self._for_writers.wait()
                    continue
                if self._reads:
                    now = time.monotonic()
                    until = until or now + WRITE_PATIENCE_S
                    if now < until:
                        self._for_writers.wait(until - now)
                        continue
                if self._writes:
                    return self._writes.popleft()
                self._moving += 1
                return self._moves.popleft()
        return None

    def moved(self) -> None:
        """A move has ended."""
        with self._lock:
            self._moving -= 1
            self._for_writers.notify()

    def drain(self) -> list[Order]:
        """Takes everything that waits."""
        with self._lock:
            orders: list[Order] = [*self._reads, *self._writes, *self._moves]
            self._reads.clear()
            self._writes.clear()
            self._moves.clear()
            self._for_writers.notify_all()
        return orders

    def close(self) -> list[Order]:
        """Nothing is queued from now on; the answer is what waited."""
        with self._lock:
            self._closed = True
            self._for_readers.notify_all()
            self._for_writers.notify_all()
        return self.drain()

    def __len__(self) -> int:
        return len(self._reads) + len(self._writes) + len(self._moves)


class SealQueue:
    """Orders that need no drive: checks of what was found in the pool first, then checksums of new chunks."""

    def __init__(self) -> None:
        self._ready = threading.Condition(threading.Lock())
        self._verifies: deque[Verify] = deque()
        self._seals: deque[Seal] = deque()
        self._closed = False

    def put(self, order: Seal | Verify) -> bool:
        """Queues an order; False after ``close``."""
        with self._ready:
            if self._closed:
                return False
            if isinstance(order, Verify):
                self._verifies.append(order)
            else:
                self._seals.append(order)
            self._ready.notify()
        return True

    def take(self) -> Seal | Verify | None:
        """The next order; waits for one. None after ``close``."""
        with self._ready:
            while not self._closed:
                if self._verifies:
                    return self._verifies.popleft()
                if self._seals:
                    return self._seals.popleft()
                self._ready.wait()
        return None

    def close(self) -> list[Order]:
        """Nothing is queued from now on; the answer is what waited."""
        with self._ready:
            self._closed = True
            orders: list[Order] = [*self._verifies, *self._seals]
            self._verifies.clear()
            self._seals.clear()
            self._ready.notify_all()
        return orders

    def __len__(self) -> int:
        return len(self._verifies) + len(self._seals)
