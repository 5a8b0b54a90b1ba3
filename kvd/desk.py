"""What a session may ask, whichever way it asks: gRPC (``service.py``) and frames (``calls.py``) are codecs over this.

What is around the store is the same for both: who is let in, what is not done while the daemon stops, what is counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from types import TracebackType

from kvd.metrics import Metrics
from kvd.recorder import Recorder
from kvd.session import Session, Sessions
from kvd.store import ChunkStore
from kvd.types import CommitStatus, LeaseId, LookupResult, Namespace, ReserveResult, Stripe
from kvd.wire.errors import Draining, KvdError, SessionUnknown
from kvd.wire.identity import Identity

log = logging.getLogger(__name__)

_IN_PLACE = (CommitStatus.STORED, CommitStatus.WAITING_PARENT)


class Desk:
    """Lives on the event loop. Its requests raise what those of ``ChunkStore`` raise."""

    def __init__(
        self, store: ChunkStore, sessions: Sessions, metrics: Metrics, recorder: Recorder | None = None
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._metrics = metrics
        self._recorder = recorder
        #: When a session last asked for something, by ``time.monotonic``.
        self.last_request_at = 0.0

    # -- around every request

    def answering(self, method: str) -> Answering:
        """A block that answers one request: measured, counted, and nothing but a KvdError comes out of it."""
        return Answering(self._metrics, method)

    def admit(self, session: Session | None) -> Session:
        """The session that asks. Raises SessionUnknown when there is none, or none any more."""
        if session is None or session.ended:
            raise SessionUnknown("the session has ended, or is one of an earlier daemon")
        self.last_request_at = time.monotonic()
        return session

    # -- the requests

    def open_namespace(self, session: Session, identity: Identity, chunk_bytes: int) -> Namespace:
        """The namespace of ``identity`` for the session's tenant."""
        namespace = self._store.open_namespace(session.id, identity, chunk_bytes)
        session.namespaces[namespace.id] = namespace
        return namespace

    def lookup(
        self,
        session: Session,
        namespace_id: bytes,
        lease_id: LeaseId,
        keys: Sequence[bytes],
        skip: int,
        again: bool,
    ) -> LookupResult:
        """Matches and leases the longest READY prefix."""
        found = self._store.lookup(session.id, namespace_id, lease_id, keys, skip, again)
        if self._recorder is not None and not again:
            self._recorder.asked(session.id, session.namespaces[namespace_id], keys)
        return found

    def reserve(
        self, session: Session, namespace_id: bytes, lease_id: LeaseId, items: Sequence[tuple[bytes, bytes]]
    ) -> list[ReserveResult]:
        """Slots for ``items`` (key, parent). Raises Draining as well."""
        if self._sessions.draining:
            raise Draining("the daemon is stopping")
        return self._store.reserve(session.id, namespace_id, lease_id, items)

    def commit(
        self,
        session: Session,
        namespace_id: bytes,
        lease_id: LeaseId,
        items: Sequence[tuple[bytes, Sequence[Stripe]]],
    ) -> list[CommitStatus]:
        """Bytes are in place; ``items`` are (key, stripes)."""
        results = self._store.commit(session.id, namespace_id, lease_id, items)
        if session.path == "shm":
            chunks = sum(result in _IN_PLACE for result in results)
            self._metrics.committed_in_place(chunks * session.namespaces[namespace_id].chunk_bytes)
        return results

    def abort(self, session: Session, namespace_id: bytes, lease_id: LeaseId, keys: Sequence[bytes]) -> int:
        """Gives up reserved chunks; how many there were."""
        return self._store.abort(session.id, namespace_id, lease_id, keys)

    def release(self, session: Session, lease_ids: Sequence[LeaseId]) -> int:
        """Ends read leases; how many there were."""
        return self._store.release(session.id, lease_ids)

    def renew(self, session: Session, lease_ids: Sequence[LeaseId]) -> list[bool]:
        """Extends read leases; whether each is alive."""
        return self._store.renew(session.id, lease_ids)

    def missed(self, lookups: int, chunks: int) -> None:
        """A client has answered so many lookups, of so many chunks, by itself: it knew them to be misses."""
        if lookups or chunks:
            self._store.missed(lookups, chunks)


class Answering:
    """See ``Desk.answering``."""

    __slots__ = ("_method", "_metrics", "_started")

    def __init__(self, metrics: Metrics, method: str) -> None:
        self._metrics = metrics
        self._method = method

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # the daemon stops
        mistake = None
        if error is not None and not isinstance(error, KvdError):
            log.error("%s failed", self._method, exc_info=error)
            mistake = KvdError("the daemon has made a mistake; its log says more")
        failure = mistake or error
        code = failure.code.name if isinstance(failure, KvdError) else "OK"
        self._metrics.answered(self._method, code, time.perf_counter() - self._started)
        if mistake is not None:
            raise mistake from error
