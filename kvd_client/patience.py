"""How long somebody waits for chunks that are on their way into memory, and how often they ask."""

from __future__ import annotations

import math

#: The next question comes after this share of the time waited so far: what has arrived lies there for little longer
#: than it took to come ...
ASK_SHARE = 0.25
#: ... and no sooner and no later than this, seconds.
ASK_MIN_S, ASK_MAX_S = 0.002, 0.05


class Patience:
    """One wait, from the first answer that spoke of chunks on their way. Times are ``time.monotonic()`` values.

    It ends when nothing is on its way any more, after ``timeout_s``, or when nothing has arrived for ``stall_s``.
    """

    def __init__(self, now: float, timeout_s: float, stall_s: float = math.inf) -> None:
        self.began = now
        self.deadline = now + timeout_s
        self._stall_s = stall_s
        self._moved = now
        self._best = (-1, 0)
        #: Whether the wait is over, for good.
        self.over = False
        #: When to ask again.
        self.ask_at = now

    def heard(self, now: float, arrived: int, promoting: int) -> bool:
        """An answer: so many chunks are there, so many on their way. True: worth asking again, at ``ask_at``."""
        state = (arrived, -promoting)  # more have arrived, or fewer are left to come
        if state > self._best:
            self._best, self._moved = state, now
        self.over |= not promoting or now >= self.deadline or now - self._moved >= self._stall_s
        pause = min(max(ASK_SHARE * (now - self.began), ASK_MIN_S), ASK_MAX_S)
        self.ask_at = min(now + pause, self.deadline)
        return not self.over
