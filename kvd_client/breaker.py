"""The circuit breaker: a daemon that does not answer is left alone until it answers again."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvd.wire.errors import Unavailable


class Breaker:
    """Closed: calls go through. Open: they are refused at once, without waiting for a daemon that hangs.

    The first call that gets no answer opens it; somebody who probes in the background (``on_open`` wakes them) closes
    it. Thread-safe.
    """

    def __init__(self, on_open: Callable[[], None]) -> None:
        self._on_open = on_open
        self._lock = threading.Lock()
        self._reason = ""
        self._opened = 0

    @property
    def is_open(self) -> bool:
        """Whether calls are refused."""
        return bool(self._reason)

    @property
    def opened(self) -> int:
        """How often it has opened."""
        return self._opened

    def check(self) -> None:
        """Raises Unavailable when it is open."""
        reason = self._reason
        if reason:
            raise Unavailable(f"the daemon did not answer lately ({reason})")

    def open(self, reason: str) -> None:
        """A call got no answer."""
        with self._lock:
            news = not self._reason
            self._reason = reason or "no answer"
            self._opened += news
        if news:
            self._on_open()

    def close(self) -> None:
        """The daemon has answered."""
        with self._lock:
            self._reason = ""
