"""Memory for the bytes of chunks on their way over TCP: a bounded number of equal buffers, used again and again."""

from __future__ import annotations

import mmap
import threading


class Buffers:
    """Buffers of ``size_bytes``, at most ``limit_bytes`` of them together. Thread-safe.

    They are anonymous mappings: made without touching them, so that no large clearing of memory holds anybody up.
    """

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._left = max(1, limit_bytes // size_bytes) if size_bytes else 0
        self._lock = threading.Lock()
        self._free: list[memoryview] = []

    def take(self, count: int) -> list[memoryview] | None:
        """``count`` buffers, holding anything; None when there is not so much room now."""
        with self._lock:
            if count > self._left:
                return None
            self._left -= count
            taken = [self._free.pop() for _ in range(min(count, len(self._free)))]
        return taken + [memoryview(mmap.mmap(-1, self._size_bytes)) for _ in range(count - len(taken))]

    def give(self, buffers: list[memoryview]) -> None:
        """Gives back what ``take`` gave."""
        with self._lock:
            self._free += buffers
            self._left += len(buffers)
