"""What the books have asked the byte movers to do, and what is to be done when they answer."""

from __future__ import annotations

from collections.abc import Callable

from kvd.types import Order, Result


def _nobody() -> None:
    """Who is called when nobody wants to be."""


class Orders:
    """Orders that nobody has taken yet, and the answers that are waited for.

    ``wake`` is called when an order has been added to none: whoever moves bytes then calls ``take``, and ``finish``
    with every order's result, once. ``before`` is called before each of these is made use of.
    """

    def __init__(self) -> None:
        self.wake: Callable[[], None] = _nobody
        self.before: Callable[[], None] = _nobody
        self._last_ticket = 0
        self._new: list[Order] = []
        self._waited_for: dict[int, Callable[[Result], None]] = {}

    def issue(self, make: Callable[[int], Order], done: Callable[[Result], None]) -> None:
        """Add the order that ``make`` makes of a ticket; ``done`` hears how it ended."""
        self._last_ticket += 1
        self._waited_for[self._last_ticket] = done
        self._new.append(make(self._last_ticket))
        if len(self._new) == 1:
            self.wake()

    def take(self) -> list[Order]:
        """The orders since the last time."""
        new, self._new = self._new, []
        return new

    def finish(self, result: Result) -> None:
        """An order has ended. A ticket that is not waited for is a defect of the movers, and ignored."""
        done = self._waited_for.pop(result.ticket, None)
        if done is not None:
            self.before()
            done(result)

    def __len__(self) -> int:
        """Orders not finished."""
        return len(self._waited_for)
