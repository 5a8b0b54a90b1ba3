"""What the daemon is still to be told: leases that are over while it does not answer, or while nobody wants to wait."""

from __future__ import annotations

import threading
from collections import deque

from kvd.wire.pb import kvd_pb2 as pb

#: A lost release costs little: the lease ends by time.
MAX_RELEASES = 4096
#: A lost abort would cost a slot until the session ends.
MAX_ABORTS = 1024


class Debts:
    """A bounded queue of releases and aborts. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._releases: deque[int] = deque(maxlen=MAX_RELEASES)
        self._aborts: deque[pb.AbortRequest] = deque()

    def __len__(self) -> int:
        return len(self._releases) + len(self._aborts)

    def add_release(self, lease_id: int) -> None:
        """A read lease is over, or its Lookup has had no answer."""
        with self._lock:
            self._releases.append(lease_id)

    def add_abort(self, request: pb.AbortRequest) -> bool:
        """Chunks are given up. False: there is no room; only the end of the session can settle this."""
        with self._lock:
            if len(self._aborts) >= MAX_ABORTS:
                return False
            self._aborts.append(request)
            return True

    def take_releases(self) -> list[int]:
        """All releases; the caller delivers them or puts them back one by one."""
        with self._lock:
            taken = list(self._releases)
            self._releases.clear()
            return taken

    def first_abort(self) -> pb.AbortRequest | None:
        """The oldest abort; it stays until ``settled_abort``."""
        return self._aborts[0] if self._aborts else None

    def settled_abort(self) -> None:
        """The oldest abort has been delivered. Only the one thread that settles calls this."""
        with self._lock:
            self._aborts.popleft()
