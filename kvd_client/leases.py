"""Leases as scopes: what a Lookup or a Reserve has given ends with its ``with`` block."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from kvd.wire.chunks import CommitStatus, ReserveResult, Stripe
from kvd.wire.errors import KvdError, Unavailable
from kvd_client.messages import Found
from kvd_client.session import Session


class ReadLease:
    """The leased part of the longest stored prefix. It may be empty: then there is nothing to release.

    A read lease may end by time (``SessionInfo.read_lease_s``) unless it is renewed; whoever copies finds that out from
    the data path, which answers False for what must not be used.
    """

    def __init__(
        self,
        session: Session,
        timeout_s: float,
        lease_id: int,
        found: Found,
    ) -> None:
        self._session = session
        self._timeout_s = timeout_s
        self._released = not found.locations
        #: Authorises reads on the data path of the session with this epoch.
        self.lease_id = lease_id
        self.epoch = session.epoch
        #: The slots of ``keys[skip : skip + len(lease)]``.
        self.locations = found.locations
        #: Further chunks on their way into memory, from a disk or because a restarted daemon checks them first: ask
        #: again soon.
        self.promoting = found.promoting
        #: Further chunks that are being written now, as far as the daemon was asked.
        self.writing = found.writing

    def __len__(self) -> int:
        return len(self.locations)

    @property
    def session(self) -> Session:
        """The session that holds the lease."""
        return self._session

    def renew(self, *, timeout_s: float | None = None) -> bool:
        """Extends the lease; False: it has ended and its slots may serve others. Raises as every call does."""
        if self._released:
            return False
        return self._session.renew([self.lease_id], _deadline(timeout_s, self._timeout_s))[0]

    def release(self) -> None:
        """Ends the lease. Never blocks or fails: the daemon is told in the background. May be called twice."""
        if not self._released:
            self._released = True
            self._session.owe_release(self.lease_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class WriteLease:
    """The answer to a Reserve: slots to fill, and the duty to commit or abort every one of them.

    As a context manager it aborts on exit what was not committed. Use it so only where the copies are finished when
    the block ends, however it ends: a slot that is aborted may serve somebody else at once. Whoever copies in the
    background calls ``commit`` and ``abort`` when the copies are done. Thread-safe.
    """

    def __init__(
        self,
        session: Session,
        timeout_s: float,
        namespace_id: bytes,
        lease_id: int,
        keys: Sequence[bytes],
        results: list[ReserveResult],
    ) -> None:
        self._session = session
        self._timeout_s = timeout_s
        self._namespace_id = namespace_id
        self._lock = threading.Lock()
        self._held = {key for key, result in zip(keys, results, strict=True) if result.location is not None}
        #: Authorises writes on the data path of the session with this epoch.
        self.lease_id = lease_id
        self.epoch = session.epoch
        #: One per item, in order.
        self.results = results

    @property
    def session(self) -> Session:
        """The session that holds the lease."""
        return self._session

    @property
    def held(self) -> frozenset[bytes]:
        """Keys that were granted and are neither committed nor aborted yet."""
        with self._lock:
            return frozenset(self._held)

    def commit(
        self, keys: Sequence[bytes], stripes: Sequence[Stripe] = (), *, timeout_s: float | None = None
    ) -> list[CommitStatus]:
        """Says that the bytes of ``keys`` are in place: all of them, or those of ``stripes`` of every key.

        Raises as every call does. After DeadlineExceeded the outcome is not known and the keys stay held: abort them.
        """
        statuses = self._session.commit(
            self._namespace_id, self.lease_id, keys, stripes, _deadline(timeout_s, self._timeout_s)
        )
        with self._lock:
            partial = CommitStatus.PARTIAL
            self._held.difference_update(
                key for key, status in zip(keys, statuses, strict=True) if status is not partial
            )
        return statuses

    def abort(self, keys: Sequence[bytes] = (), *, timeout_s: float | None = None) -> None:
        """Gives up ``keys``, or everything still held. Only when no copy into their slots can be under way.

        Never fails: a daemon that does not answer within ``timeout_s`` is told when it is back.
        """
        given_up = self._give_up(keys)
        if not given_up:
            return
        try:
            self._session.abort(self._namespace_id, self.lease_id, given_up, _deadline(timeout_s, self._timeout_s))
        except Unavailable:
            self._session.owe_abort(self._namespace_id, self.lease_id, given_up)
        except KvdError:
            pass  # the session is over, and the lease with it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        given_up = self._give_up(())
        if given_up:
            self._session.owe_abort(self._namespace_id, self.lease_id, given_up)

    def _give_up(self, keys: Sequence[bytes]) -> list[bytes]:
        with self._lock:
            given_up = [key for key in (keys or list(self._held)) if key in self._held]
            self._held.difference_update(given_up)
            return given_up


def _deadline(timeout_s: float | None, default_s: float) -> float:
    return time.monotonic() + (default_s if timeout_s is None else timeout_s)
