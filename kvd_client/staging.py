"""The books of a ring of equal staging slots. No memory in here."""

from __future__ import annotations

import threading
from collections import deque


class Ring:
    """Hands out runs of consecutive slots (modulo ``slots``) and takes them back in any order. Thread-safe.

    A run becomes free again when it and all runs handed out before it were given back.
    """

    def __init__(self, slots: int) -> None:
        """A ring of ``slots`` slots, all free."""
        self.slots = slots
        self._lock = threading.Lock()
        self._runs: deque[list[int]] = deque()  # [first, count, given back?], oldest first
        self._next = 0
        self._free = slots

    @property
    def free(self) -> int:
        """Slots that ``take`` could hand out now."""
        with self._lock:
            return self._free

    def take(self, count: int) -> int | None:
        """First slot of a run of ``count``, or None at once when there is no room."""
        with self._lock:
            if not 0 < count <= self._free:
                return None
            first = self._next
            self._runs.append([first, count, False])
            self._next = (first + count) % self.slots
            self._free -= count
            return first

    def give(self, first: int) -> None:
        """Takes back the run that begins at ``first``."""
        with self._lock:
            for run in self._runs:
                if run[0] == first:
                    run[2] = True
            while self._runs and self._runs[0][2]:
                self._free += self._runs.popleft()[1]
