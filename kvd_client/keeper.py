"""Keeps a session up: connects, notices the end, probes a daemon that hangs, connects again."""

from __future__ import annotations

import logging
import random
import threading
import time

from kvd.wire.endpoints import Endpoint
from kvd.wire.errors import KvdError, ProtocolMismatch, Unauthenticated, Unavailable
from kvd_client.breaker import Breaker
from kvd_client.mapping import housekeeper
from kvd_client.path import Kind
from kvd_client.session import Session

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 5.0
#: Between attempts to open a session, and between probes of a daemon that hangs.
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0
#: A daemon that answers no probe for so long is taken for gone, whatever its connection says.
GIVE_UP_S = 30.0
#: The keeper looks around at least so often; everything that matters wakes it earlier.
IDLE_S = 5.0
#: What is owed to the daemon waits so long for a request that takes it along; a call of its own would be in the way of
#: the next lookup.
GATHER_S = 0.02
CLOSE_TIMEOUT_S = 5.0


class SessionKeeper:
    """One thread that keeps ``session`` the session with the daemon at ``endpoint``, or None."""

    def __init__(
        self, endpoint: Endpoint, name: str, kind: Kind, connections: int, numa_node: int | None = None
    ) -> None:
        self._endpoint = endpoint
        self._name = name
        self._kind: Kind = kind
        self._connections = connections
        self._numa_node = numa_node
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._condition = threading.Condition()  # guards session, epoch, error
        self._session: Session | None = None
        self._epoch = 0
        self._error: KvdError = Unavailable(f"not connected to {endpoint} yet")
        self._failed = False
        self.breaker = Breaker(self._wake.set)
        self._thread = threading.Thread(target=self._run, name="kvd-keeper", daemon=True)

    def start(self) -> None:
        """Begins to connect."""
        self._thread.start()

    @property
    def session(self) -> Session | None:
        """The session, if there is one."""
        session = self._session
        return None if session is None or session.ended else session

    @property
    def connected(self) -> bool:
        """Whether there is a session and the daemon answers."""
        return self.session is not None and not self.breaker.is_open

    @property
    def epoch(self) -> int:
        """Number of the current or last session; 0 before the first."""
        return self._epoch

    @property
    def last_error(self) -> str:
        """What went wrong last; empty when nothing ever did."""
        return str(self._error) if self._failed else ""

    def require(self) -> Session:
        """The session. Raises Unavailable at once when there is none or the breaker is open."""
        session = self.session
        if session is None:
            raise Unavailable(f"no session with the daemon at {self._endpoint}: {self._error}")
        self.breaker.check()
        return session

    def connect(self, deadline: float) -> Session:
        """Waits for a session. Raises the last error at the deadline, and at once what waiting does not mend."""
        with self._condition:
            while True:
                if self._closing.is_set():
                    raise Unavailable("the client is closed")
                if self.session is not None and not self.breaker.is_open:
                    return self.session
                if isinstance(self._error, (Unauthenticated, ProtocolMismatch)):
                    raise self._error
                if not self._condition.wait(min(0.1, deadline - time.monotonic())) and time.monotonic() >= deadline:
                    raise self._error

    def close(self) -> None:
        """Ends the session and the thread."""
        self._closing.set()
        self._wake.set()
        with self._condition:
            self._condition.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_S)
        housekeeper.release()

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._closing.is_set():
            session = Session(
                self._endpoint, self._kind, self._connections, self._epoch + 1, self.breaker, self._wake.set
            )
            try:
                session.open(self._name, time.monotonic() + OPEN_TIMEOUT_S, self._numa_node)
            except Exception as error:
                session.close(keep_memory=True)  # a daemon that is about to stop, perhaps
                self._note(error)
                self._pause(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                continue
            pause_s = FIRST_PAUSE_S
            self._publish(session)
            try:
                self._watch(session)
            finally:
                self._publish(None)
                session.close(keep_memory=not self._closing.is_set())

    def _watch(self, session: Session) -> None:
        """Serves a session until it ends, is given up, or the client closes."""
        silent_since: float | None = None
        pause_s = FIRST_PAUSE_S
        while not self._closing.is_set() and not session.ended:
            self._wake.clear()
            try:
                if self.breaker.is_open:
                    session.probe()
                    self.breaker.close()
                session.settle()
                silent_since, pause_s = None, FIRST_PAUSE_S
                if self._wake.wait(IDLE_S):
                    self._closing.wait(GATHER_S)
            except KvdError as error:
                self._note(error)
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > GIVE_UP_S:
                    log.warning("the daemon at %s has not answered for %.0f s", self._endpoint, GIVE_UP_S)
                    return
                self._pause(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _publish(self, session: Session | None) -> None:
        with self._condition:
            self._session = session
            if session is not None:
                self._epoch = session.epoch
                self.breaker.close()
                log.info("session %d with the daemon at %s", session.epoch, self._endpoint)
            else:
                self._error = Unavailable(f"the session with the daemon at {self._endpoint} has ended")
            self._condition.notify_all()

    def _note(self, error: Exception) -> None:
        if not isinstance(error, KvdError):
            log.exception("cannot open a session with the daemon at %s", self._endpoint)
            error = Unavailable(f"{type(error).__name__}: {error}")
        with self._condition:
            self._error, self._failed = error, True
            self._condition.notify_all()

    def _pause(self, seconds: float) -> None:
        """Waits, unless the client closes; not all clients of a daemon come back at the same moment."""
        self._closing.wait(seconds * random.uniform(0.5, 1.0))
