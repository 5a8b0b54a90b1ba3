"""Uses that wait: a lookup says what it has found, and the stamps are put in later, a few at a time.

They are given out at once, so a use counts from when it happened and in the order of the requests. What is chosen by
them is chosen after all of them are in: ``Tree.settle``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from kvd.ledger.books import Books
from kvd.ledger.chunk import Chunk

#: No more than so many uses wait when a lookup adds its own.
_MOST_WAITING = 2048


def _nobody() -> None:
    """Who hears that uses wait when nobody does."""


class Uses:
    """The uses of the pool, and of the records of what is used. ``on_behind`` is called when there is something to
    ``catch_up`` with and there was nothing before."""

    def __init__(self, books: Books, offering: bool) -> None:
        """``offering``: what is used and has not been written, or has no checksum, is offered again."""
        self.on_behind: Callable[[], None] = _nobody
        self._books = books
        self._offering = offering
        #: A prefix, or what is left of one, and the stamp before that of its first chunk.
        self._queue: deque[tuple[Sequence[Chunk], int]] = deque()
        self._waiting = 0
        self._catching_up = False
        books.settle = self._settle
        if books.records is not None:
            books.records.settle = self._settle

    def add(self, prefix: Sequence[Chunk]) -> None:
        """A request has used all of a READY prefix of at least one chunk, which does not change any more."""
        if self._waiting + len(prefix) > _MOST_WAITING:
            self._settle()
        self._queue.append((prefix, self._books.stamps(len(prefix))))
        self._waiting += len(prefix)
        if len(self._queue) == 1:
            self.on_behind()

    def catch_up(self, most: int) -> bool:
        """Put in the oldest uses, at most so many; whether no others wait."""
        if self._catching_up:
            return False  # what is being put in leads to a choice: the others come after it
        self._catching_up = True
        try:
            while self._queue and most > 0:
                prefix, stamp = self._queue.popleft()
                if len(prefix) > most:
                    self._queue.appendleft((prefix[most:], stamp + most))
                    prefix = prefix[:most]
                self._waiting -= len(prefix)
                most -= len(prefix)
                self._use(prefix, stamp)
        finally:
            self._catching_up = False
        return not self._queue

    def _settle(self) -> None:
        if self._queue:
            self.catch_up(self._waiting)

    def _use(self, chunks: Sequence[Chunk], stamp: int) -> None:
        books = self._books
        deepest = chunks[-1]
        if deepest.space.chunks.get(deepest.key) is not deepest:  # what is above it may be there still: leaves go first
            chunks = [chunk for chunk in chunks if chunk.space.chunks.get(chunk.key) is chunk]
        books.use(chunks, stamp)
        if self._offering:
            written = books.records is not None
            for chunk in [one for one in chunks if one.record is None and (written or one.checksum is None)]:
                books.on_ready(chunk)
