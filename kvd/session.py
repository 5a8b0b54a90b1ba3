"""Who is connected, what proves that they live, and when nobody can write for them any more.

A session is open as long as its gRPC stream. Its writers are gone when, after that, every lifeline of it is closed and
no data-plane transfer is under way for it: only then does the store hear ``writers_gone`` (law 3).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvd.peers import Credentials
from kvd.store import ChunkStore
from kvd.types import Namespace, SessionId
from kvd.wire.errors import Draining, LimitReached, SessionUnknown, Unauthenticated
from kvd.wire.frames import TOKEN_BYTES
from kvd.wire.pb import kvd_pb2

log = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
#: A TCP session ends when nothing was heard of it for this long: three heartbeats missed, and one of grace.
SILENCE_S = 4 * HEARTBEAT_S
#: A ticket that no session has claimed by then is void.
TICKET_S = 10.0
MAX_SESSIONS = 1024
MAX_TICKETS = 256
MAX_LIFELINES = 4096
MAX_LIFELINES_PER_SESSION = 256
_MAX_NOTES = 8


@dataclass(eq=False)
class Lifeline:
    """One open lifeline socket. It belongs to a session, or carries a ticket that none has claimed yet."""

    credentials: Credentials
    close: Callable[[], None]
    session: Session | None = None
    ticket: bytes = b""
    expires_at: float = 0.0


@dataclass(eq=False)
class Session:
    """One connected engine. ``path``: ``shm`` or ``tcp``. ``peer``: who it is, for people. ``numa_node``: the memory
    node of this machine that it is near, if it has said."""

    id: SessionId
    token: bytes
    tenant: str
    peer: str
    client: str
    path: str
    opened_at: float
    heard_at: float
    numa_node: int | None = None
    #: Notes on their way to the client; None ends the stream.
    notes: asyncio.Queue[kvd_pb2.ServerNote | None] = field(default_factory=lambda: asyncio.Queue(_MAX_NOTES))
    lifelines: set[Lifeline] = field(default_factory=set)
    #: The namespaces that it has opened, by id.
    namespaces: dict[bytes, Namespace] = field(default_factory=dict)
    io_in_flight: int = 0
    ended: bool = False

    def send(self, note: kvd_pb2.ServerNote | None) -> None:
        """Queues a note; a client that does not take its notes loses them, and its stream's end is never lost."""
        if note is None and self.notes.full():
            self.notes.get_nowait()
        if not self.notes.full():
            self.notes.put_nowait(note)


class Sessions:
    """All sessions, tickets and lifelines. Lives on the event loop."""

    def __init__(
        self,
        store: ChunkStore,
        *,
        on_end: Callable[[SessionId], None] = lambda session: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``on_end`` hears the number of a session whose stream has ended, to close its data connections."""
        self._store = store
        self._on_end = on_end
        self._clock = clock
        self._by_id: dict[SessionId, Session] = {}
        self._by_token: dict[bytes, Session] = {}
        self._tickets: dict[bytes, Lifeline] = {}
        self._lifelines: set[Lifeline] = set()
        self._last_id = 0
        self._ticked_at = clock()
        self.draining = False

    # -- sessions

    def open(
        self, *, client: str, tenant: str, peer: str, lifeline: Lifeline | None = None, numa_node: int | None = None
    ) -> Session:
        """Opens a session; ``lifeline`` is the one whose ticket was claimed. Only with one is ``numa_node`` a node of
        this machine. Raises Draining, LimitReached."""
        if self.draining:
            raise Draining("the daemon is stopping")
        if len(self._by_id) >= MAX_SESSIONS:
            raise LimitReached(f"the daemon has {MAX_SESSIONS} sessions already")
        self._last_id += 1
        now = self._clock()
        path = "tcp" if lifeline is None else "shm"
        token = secrets.token_bytes(TOKEN_BYTES)
        near = None if lifeline is None else numa_node
        session = Session(self._last_id, token, tenant, peer, client, path, opened_at=now, heard_at=now, numa_node=near)
        self._store.open_session(session.id, tenant, near)
        self._by_id[session.id] = session
        self._by_token[session.token] = session
        if lifeline is not None:
            self._join(lifeline, session)
        log.info("session %d opened: %s, %s, over %s", session.id, client or "unnamed", peer, path)
        return session

    def end(self, session: Session) -> None:
        """The stream has ended: no requests any more, read leases end. Ending twice is nothing."""
        if session.ended:
            return
        session.ended = True
        del self._by_token[session.token]
        session.send(None)
        self._store.close_session(session.id)
        self._on_end(session.id)
        log.info("session %d ended: %s, %s", session.id, session.client or "unnamed", session.peer)
        self._bury(session)

    def by_token(self, token: bytes) -> Session | None:
        """The open session with this token."""
        return self._by_token.get(token)

    def by_id(self, number: SessionId) -> Session | None:
        """The session with this number, open or ended, as long as its writers may live."""
        return self._by_id.get(number)

    def heard(self, session: Session) -> None:
        """A heartbeat has come."""
        session.heard_at = self._clock()

    def all(self) -> list[Session]:
        """Open sessions, and ended ones whose writers may still live."""
        return list(self._by_id.values())

    def drain(self, deadline_s: float) -> None:
        """Opens no further sessions and tells those that are open that the daemon will be gone in ``deadline_s``."""
        self.draining = True
        note = kvd_pb2.ServerNote(draining=kvd_pb2.Draining(deadline_ms=int(deadline_s * 1000)))
        for session in self._by_token.values():
            session.send(note)

    def tick(self) -> None:
        """Ends TCP sessions that have fallen silent and voids old tickets; called about once a second.

        A session over shared memory is never ended by silence: an engine that is stopped or busy still holds its slots.
        """
        now = self._clock()
        if now - self._ticked_at > HEARTBEAT_S:  # the daemon itself was stopped: the heartbeats wait in its sockets
            for session in self._by_token.values():
                session.heard_at = now
        self._ticked_at = now
        for session in [s for s in self._by_token.values() if s.path == "tcp" and now - s.heard_at > SILENCE_S]:
            log.warning("session %d (%s) has been silent for %.0f s", session.id, session.peer, now - session.heard_at)
            self.end(session)
        for lifeline in [line for line in self._tickets.values() if line.expires_at <= now]:
            lifeline.close()

    # -- lifelines

    def lifeline_opened(self, credentials: Credentials, close: Callable[[], None]) -> Lifeline:
        """A client asks for a ticket. ``close`` must end in ``lifeline_closed``. Raises LimitReached."""
        if len(self._tickets) >= MAX_TICKETS:
            raise LimitReached(f"{MAX_TICKETS} clients hold tickets that they have not used")
        lifeline = self._new_lifeline(credentials, close)
        lifeline.ticket = secrets.token_bytes(TOKEN_BYTES)
        lifeline.expires_at = self._clock() + TICKET_S
        self._tickets[lifeline.ticket] = lifeline
        return lifeline

    def lifeline_attached(self, credentials: Credentials, token: bytes, close: Callable[[], None]) -> Lifeline:
        """A further process joins the session with this token. Raises SessionUnknown, LimitReached."""
        session = self._by_token.get(token)
        if session is None:
            raise SessionUnknown("there is no such session")
        if len(session.lifelines) >= MAX_LIFELINES_PER_SESSION:
            raise LimitReached(f"the session has {MAX_LIFELINES_PER_SESSION} processes already")
        lifeline = self._new_lifeline(credentials, close)
        self._join(lifeline, session)
        return lifeline

    def claim(self, ticket: bytes) -> Lifeline:
        """The lifeline that was given this ticket; a ticket is good once. Raises Unauthenticated."""
        lifeline = self._tickets.pop(ticket, None)
        if lifeline is None:
            raise Unauthenticated("the ticket is not (or no longer) good: open a new lifeline")
        lifeline.ticket = b""
        return lifeline

    def lifeline_closed(self, lifeline: Lifeline) -> None:
        """The kernel says that the process at the other end, and every copy of the socket, is gone."""
        self._lifelines.discard(lifeline)
        self._tickets.pop(lifeline.ticket, None)
        if lifeline.session is not None:
            lifeline.session.lifelines.discard(lifeline)
            self._bury(lifeline.session)

    @property
    def lifelines(self) -> int:
        """Open lifelines, those with unclaimed tickets included."""
        return len(self._lifelines)

    # -- data-plane transfers

    def io_begun(self, session: SessionId) -> None:
        """A transfer of this session has begun; only for sessions that ``is_open``."""
        self._by_id[session].io_in_flight += 1

    def io_ended(self, session: SessionId) -> None:
        """A transfer of this session is over."""
        found = self._by_id[session]
        found.io_in_flight -= 1
        self._bury(found)

    def is_open(self, session: SessionId) -> bool:
        """Whether requests of this session are served."""
        found = self._by_id.get(session)
        return found is not None and not found.ended

    # -- inside

    def _new_lifeline(self, credentials: Credentials, close: Callable[[], None]) -> Lifeline:
        if len(self._lifelines) >= MAX_LIFELINES:
            raise LimitReached(f"the daemon has {MAX_LIFELINES} lifelines already")
        lifeline = Lifeline(credentials, close)
        self._lifelines.add(lifeline)
        return lifeline

    def _join(self, lifeline: Lifeline, session: Session) -> None:
        lifeline.session = session
        session.lifelines.add(lifeline)

    def _bury(self, session: Session) -> None:
        """Forgets an ended session once nobody can write for it any more."""
        if session.ended and not session.lifelines and not session.io_in_flight and session.id in self._by_id:
            del self._by_id[session.id]
            self._store.writers_gone(session.id)
