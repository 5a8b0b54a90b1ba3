"""The books, as the data plane's threads see them: every question is asked and answered on the event loop (law 2)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar

from kvd.session import Sessions
from kvd.store import ChunkStore, IoTicket
from kvd.types import LeaseId, SessionId
from kvd.wire.errors import LimitReached, SessionUnknown
from kvd.wire.frames import Item, ItemStatus, Op

#: How long a data-plane thread waits for the loop.
ANSWER_TIMEOUT_S = 5.0

T = TypeVar("T")


class LoopAuthority:
    """Answers ``kvd.transport.tcp.Authority`` from any thread but the loop's own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sessions: Sessions, store: ChunkStore) -> None:
        self._loop = loop
        self._sessions = sessions
        self._store = store

    def admit(self, token: bytes) -> SessionId | None:
        """The open session with this token. Raises LimitReached when the loop does not answer in time."""
        return self._ask(lambda: self._admit(token))

    def begin_io(
        self, session: SessionId, op: Op, lease_id: LeaseId, items: Sequence[Item]
    ) -> tuple[IoTicket, list[ItemStatus]]:
        """Pins the slots of the items that come back OK. Raises SessionUnknown, LimitReached."""
        return self._ask(lambda: self._begin_io(session, op, lease_id, items))

    def end_io(self, ticket: IoTicket, failed: Collection[int], checksums: Mapping[int, int]) -> None:
        """Unpins. Returns once the books know, or after the deadline; they hear of it in any case."""
        self._ask(lambda: self._end_io(ticket, failed, checksums), must_run=True)

    # -- on the loop

    def _admit(self, token: bytes) -> SessionId | None:
        session = self._sessions.by_token(token)
        return None if session is None else session.id

    def _begin_io(
        self, session: SessionId, op: Op, lease_id: LeaseId, items: Sequence[Item]
    ) -> tuple[IoTicket, list[ItemStatus]]:
        if not self._sessions.is_open(session):
            raise SessionUnknown("the session has ended")
        answer = self._store.begin_io(session, op, lease_id, items)
        self._sessions.io_begun(session)
        return answer

    def _end_io(self, ticket: IoTicket, failed: Collection[int], checksums: Mapping[int, int]) -> None:
        self._store.end_io(ticket, failed, checksums)
        self._sessions.io_ended(ticket.session)

    # -- the hop

    def _ask(self, question: Callable[[], T], *, must_run: bool = False) -> T:
        answer: Future[T] = Future()

        def on_loop() -> None:
            if not answer.set_running_or_notify_cancel():
                return  # nobody waits any more: what is not done need not be undone
            try:
                answer.set_result(question())
            except Exception as error:
                answer.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(on_loop)
        except RuntimeError as error:  # the loop is closed: the daemon has ended around this thread
            raise SessionUnknown("the daemon has stopped") from error
        try:
            return answer.result(ANSWER_TIMEOUT_S)
        except TimeoutError:
            if must_run or answer.cancel():
                raise LimitReached(f"the event loop has not answered for {ANSWER_TIMEOUT_S} s") from None
            return answer.result(ANSWER_TIMEOUT_S)  # it is being answered this very moment
