"""Whether a drive answers as it should: how long its operations have been under way, and how long they take."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType


@dataclass(frozen=True, slots=True)
class Patience:
    """From when on a drive counts as not working."""

    #: One read or write, of 8 MiB at most, under way for longer: the drive hangs.
    stall_s: float = 5.0
    #: The same for what may take long: a sync, an extent given to a file, a file removed.
    long_stall_s: float = 60.0
    #: Operations that take longer than this and many times their usual time: the drive is too slow to be of use.
    slow_s: float = 1.0


#: How many times the usual time is too much.
_FAR = 20.0
#: Operations after which the usual time is known.
_KNOWN = 64
_RECENT_SHARE = 1 / 8
_USUAL_SHARE = 1 / 256


class Health:
    """Operations of one drive. Any thread may call; one that reads sees a state that was true a moment ago."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._tickets = itertools.count()
        self._under_way: dict[int, tuple[float, float]] = {}  # begin, deadline
        self._recent_s = 0.0
        self._usual_s = 0.0
        self._counted = 0

    def begin(self, now: float, *, long: bool = False) -> int:
        """An operation begins; the answer is for ``end``."""
        ticket = next(self._tickets)
        patience = self._patience.long_stall_s if long else self._patience.stall_s
        self._under_way[ticket] = (now, now + patience)
        return ticket

    def end(self, ticket: int, now: float, *, counts: bool) -> None:
        """It has ended. ``counts``: it was an ordinary one and succeeded, so its time says something."""
        begin, _ = self._under_way.pop(ticket)
        if not counts:
            return
        took = now - begin
        self._counted += 1
        if self._counted == 1:
            self._recent_s = self._usual_s = took
        self._recent_s += (took - self._recent_s) * _RECENT_SHARE
        if self._counted < _KNOWN or self._recent_s < 4 * self._usual_s:  # what is wrong now is not what is usual
            self._usual_s += (took - self._usual_s) * (1 / self._counted if self._counted < _KNOWN else _USUAL_SHARE)

    def verdict(self, now: float) -> str | None:
        """What is wrong, in words; None: nothing."""
        hanging = self.hangs(now)
        if hanging is not None:
            return hanging
        limit = max(self._patience.slow_s, _FAR * self._usual_s)
        if self._counted >= _KNOWN and self._recent_s > limit:
            return f"too slow: operations take {self._recent_s:.2f} s, usually {self._usual_s:.4f} s"
        return None

    def hangs(self, now: float) -> str | None:
        """The same for operations under way only."""
        overdue = [begin for begin, deadline in list(self._under_way.values()) if deadline < now]
        return f"an operation has been under way for {now - min(overdue):.0f} s" if overdue else None

    def heal(self) -> None:
        """A probe went well: what was slow lately is forgotten."""
        self._recent_s = self._usual_s


class Operation:
    """One operation, as a ``with`` statement. A class, not a generator: every read passes here."""

    __slots__ = ("_clock", "_health", "_long", "_ticket")

    def __init__(self, health: Health, clock: Callable[[], float], *, long: bool) -> None:
        self._health = health
        self._clock = clock
        self._long = long
        self._ticket = 0

    def __enter__(self) -> None:
        self._ticket = self._health.begin(self._clock(), long=self._long)

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._health.end(self._ticket, self._clock(), counts=kind is None and not self._long)
