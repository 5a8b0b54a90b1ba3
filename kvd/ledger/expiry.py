"""Time to live: what nobody has used for too long is not found any more, and goes soon after.

The nodes of a tier have no time, only the stamp of their last use. So a few times are kept beside them: whenever a
bucket of time is over, a *mark* says when it ended and which stamp was the last one by then. What has a stamp up to
that of a mark that is ``ttl`` old has expired. That is never early, and late by no more than a bucket.

A use of a node is one of all above it, in the same bucket (``Tree.lift``): so nothing expires before what is below it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

#: Later than any time.
_NEVER = float("inf")
#: Buckets that the time to live is cut into, at most, and the shortest bucket.
_BUCKETS = 100
_LEAST_BUCKET_S = 1.0


class Mark(NamedTuple):
    """All uses up to ``stamp`` were not later than ``time``."""

    time: float
    stamp: int


class Expiry:
    """The marks of one tier. ``ttl_s``: 0 = nothing expires. Times are of the store's clock.

    What was used at t is expired when the clock shows t + ttl + bucket, and not before t + ttl.
    """

    def __init__(self, ttl_s: float = 0.0) -> None:
        self.ttl_s = ttl_s
        self._bucket_s = max(_LEAST_BUCKET_S, ttl_s / _BUCKETS)
        self._marks: deque[Mark] = deque()
        self._opened_at = -_NEVER  # when the bucket began that is filled now
        self._last_at = -_NEVER  # when it was last asked what time it is
        #: Stamps above this one are of the bucket that is filled now.
        self.opened = 0
        #: Stamps up to this one have expired. Only ever rises.
        self.dead = 0

    def turns(self, now: float) -> bool:
        """Whether ``advance`` at ``now`` would begin a bucket, or let anything expire: uses of before must be in."""
        if not self.ttl_s:
            return False
        return now - self._opened_at >= self._bucket_s or (
            bool(self._marks) and self._marks[0].time <= now - self.ttl_s
        )

    def advance(self, now: float, last_stamp: int) -> None:
        """It is ``now``, and ``last_stamp`` was the last one so far. Called before anything is stamped at ``now``.

        O(1), amortised.
        """
        if not self.ttl_s:
            return
        if now - self._opened_at >= self._bucket_s:
            if last_stamp > self.opened:
                # All that was stamped since the last call was stamped at its time. Before the first, nobody knows when.
                self._marks.append(Mark(now if self._last_at == -_NEVER else self._last_at, last_stamp))
                self.opened = last_stamp
            self._opened_at = now
        self._last_at = now
        while self._marks and self._marks[0].time <= now - self.ttl_s:
            self.dead = self._marks.popleft().stamp

    def save(self, wall: float, last_stamp: int) -> list[list[float]]:
        """The marks as plain data, with times of the wall clock, which shows ``wall``; at most a hundred or so.

        The first is for what has expired, the last for what is used now.
        """
        marks = list(self._marks)
        if self.dead:
            marks.insert(0, Mark(self._last_at - self.ttl_s, self.dead))
        if last_stamp > self.opened:
            marks.append(Mark(self._last_at, last_stamp))
        return [[mark.time - self._last_at + wall, mark.stamp] for mark in marks]

    def restore(self, saved: object, wall: float, now: float, last_stamp: int) -> None:
        """Take over the marks of a former life whose nodes are back in the tier, before anything new is stamped.

        ``saved`` is believed as far as it makes sense; times that have not come yet are taken for now. What is younger
        than the last of the marks counts as used now.
        """
        if not self.ttl_s:
            return
        marks = [Mark(-_NEVER, 0)]
        for at, stamp in _pairs(saved):
            mark = Mark(min(at - wall, 0.0) + now, min(stamp, last_stamp))
            if mark.time < marks[-1].time or mark.stamp <= marks[-1].stamp or len(marks) > 2 * _BUCKETS:
                break
            marks.append(mark)
        if marks[-1].stamp < last_stamp:
            marks.append(Mark(now, last_stamp))
        self._marks = deque(marks[1:])
        self._opened_at = self._last_at = now
        self.opened = last_stamp


def _pairs(saved: object) -> Iterator[tuple[float, int]]:
    """The pairs of a number and a whole number that ``saved`` begins with."""
    for one in saved if isinstance(saved, list) else ():
        if not isinstance(one, list) or len(one) != 2:
            return
        at, stamp = one
        if not isinstance(at, int | float) or not isinstance(stamp, int):
            return
        if not -_NEVER < at < _NEVER:
            return
        yield at, stamp
