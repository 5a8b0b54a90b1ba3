"""What the daemon is still to be told: leases that are over while it does not answer, or while nobody wants to wait;
lookups that it was not asked because their answer was known."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from kvd.wire.calls import MAX_MISSED, MAX_RELEASED

#: A lost release costs little: the lease ends by time.
MAX_RELEASES = 4096
#: A lost abort would cost a slot until the session ends.
MAX_ABORTS = 1024


class Abort(NamedTuple):
    """Chunks that are given up; no keys = all that the lease holds."""

    namespace_id: bytes
    lease_id: int
    keys: Sequence[bytes]


class Riders(NamedTuple):
    """What a request takes along: (lookups, chunks) that were not asked, and read leases that are over."""

    missed: tuple[int, int] = (0, 0)
    released: Sequence[int] = ()


class Debts:
    """Bounded queues of releases and aborts, and two numbers. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._releases: deque[int] = deque(maxlen=MAX_RELEASES)
        self._aborts: deque[Abort] = deque()
        self._missed_lookups = 0
        self._missed_chunks = 0

    def __len__(self) -> int:
        return len(self._releases) + len(self._aborts)

    def add_release(self, lease_id: int) -> None:
        """A read lease is over, or its Lookup has had no answer."""
        with self._lock:
            self._releases.append(lease_id)

    def add_abort(self, abort: Abort) -> bool:
        """Chunks are given up. False: there is no room; only the end of the session can settle this."""
        with self._lock:
            if len(self._aborts) >= MAX_ABORTS:
                return False
            self._aborts.append(abort)
            return True

    def take_releases(self) -> list[int]:
        """The oldest releases, as many as one request takes along; the caller delivers them or puts them back."""
        with self._lock:
            return [self._releases.popleft() for _ in range(min(len(self._releases), MAX_RELEASED))]

    def first_abort(self) -> Abort | None:
        """The oldest abort; it stays until ``settled_abort``."""
        return self._aborts[0] if self._aborts else None

    def settled_abort(self) -> None:
        """The oldest abort has been delivered. Only the one thread that settles calls this."""
        with self._lock:
            self._aborts.popleft()

    def add_miss(self, chunks: int) -> None:
        """A lookup of so many chunks was not asked: it was known to be a miss."""
        with self._lock:
            self._missed_lookups += 1
            self._missed_chunks += chunks

    def take_misses(self) -> tuple[int, int]:
        """(lookups, chunks) that were not asked since the last time, as far as the protocol's numbers reach."""
        with self._lock:
            taken = min(self._missed_lookups, MAX_MISSED), min(self._missed_chunks, MAX_MISSED)
            self._missed_lookups = self._missed_chunks = 0
            return taken

    def take_riders(self) -> Riders:
        """For a request that is going to be sent. What it takes along is lost if it is not: leases end by time."""
        return Riders(self.take_misses(), self.take_releases())
