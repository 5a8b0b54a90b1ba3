"""How much may be written to the disks: a rate, and a sum for each day. Pure arithmetic; the caller has the clocks."""

from __future__ import annotations

import json
from typing import Any

#: A rate may be exceeded for a moment by what it gives in this time, seconds.
BURST_S = 2.0
_MAX_TEXT = 256


class WriteBudget:
    """``rate_bytes_s`` and ``daily_bytes``; 0 = no limit.

    Times are seconds of a clock that never goes back; days are numbers that the caller counts (days since 1970, UTC).
    A write is granted while anything is left, however large it is; what it takes too much is missing afterwards.
    """

    def __init__(self, rate_bytes_s: int, daily_bytes: int, *, now: float, day: int) -> None:
        self._rate = rate_bytes_s
        self._daily_bytes = daily_bytes
        self._tokens = rate_bytes_s * BURST_S
        self._then = now
        self._day = day
        self._today_bytes = 0

    def take(self, size: int, *, now: float, day: int) -> bool:
        """Whether ``size`` bytes may be written now; they count as written then."""
        if self.wait_s(now=now, day=day) > 0 or self.spent(day):
            return False
        self._tokens -= size
        self._today_bytes += size
        return True

    def count(self, size: int, *, now: float, day: int) -> None:
        """These bytes were or will be written whatever the budget says: moves, which make room."""
        self._refill(now, day)
        self._tokens -= size
        self._today_bytes += size

    def give(self, size: int, *, day: int) -> None:
        """What was taken and not written after all."""
        self._tokens += size
        if day == self._day:
            self._today_bytes = max(0, self._today_bytes - size)

    def wait_s(self, *, now: float, day: int) -> float:
        """How long until the rate lets the next write pass, seconds."""
        self._refill(now, day)
        return 0.0 if not self._rate or self._tokens > 0 else (1 - self._tokens) / self._rate

    def spent(self, day: int) -> bool:
        """Whether the day's bytes are used up."""
        return bool(self._daily_bytes) and day <= self._day and self._today_bytes >= self._daily_bytes

    def today_bytes(self, day: int) -> int:
        """Bytes written on ``day``, which is today."""
        return self._today_bytes if day <= self._day else 0

    def save(self) -> str:
        """The day's account as text, for ``restore``."""
        return json.dumps({"day": self._day, "bytes": self._today_bytes})

    def restore(self, text: str) -> None:
        """Takes over the account of the same day from a former daemon; anything else is ignored."""
        try:
            said: Any = json.loads(text[:_MAX_TEXT])
        except (ValueError, RecursionError):
            return
        match said:
            case {"day": int(day), "bytes": int(size)} if day == self._day and 0 <= size < 1 << 63:
                self._today_bytes += size

    def _refill(self, now: float, day: int) -> None:
        if day > self._day:
            self._day, self._today_bytes = day, 0
        elapsed, self._then = max(0.0, now - self._then), max(now, self._then)
        self._tokens = min(self._rate * BURST_S, self._tokens + elapsed * self._rate)
