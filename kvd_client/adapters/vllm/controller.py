"""The scheduler half's line to the daemon: one thread for everything that may wait, and the one call that does not.

Lookups are made in the scheduler's step, with a short deadline. Reserve, Commit and Abort are made here, in the order
in which they were asked for, and their answers are collected at a later step.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from kvd.wire.chunks import CommitStatus
from kvd.wire.errors import InvalidRequest, KvdError, ProtocolMismatch, Unauthenticated
from kvd_client.adapters.vllm.log import complain, logger
from kvd_client.adapters.vllm.stats import Tally
from kvd_client.client import Client
from kvd_client.leases import ReadLease, WriteLease
from kvd_client.messages import NamespaceHandle
from kvd_client.path import Attachment

#: Deadline of calls on the controller's thread.
CALL_TIMEOUT_S = 2.0
#: Most chunks that may be asked for and not yet stored, dropped or refused. More are not stored.
MAX_CHUNKS = 4096
#: How often the thread looks whether a new session wants its namespace opened.
IDLE_S = 0.5
#: How long the end of the engine waits for the thread.
JOIN_S = 5.0


@dataclass(frozen=True)
class Answer:
    """The answer to one Reserve; ``lease`` None: there was none."""

    ticket: int
    lease: WriteLease | None


class Controller:
    """Calls the daemon for one engine. Its methods are for the engine's thread and, lookup aside, do not wait."""

    def __init__(self, client: Client, lookup_timeout_s: float, tally: Tally) -> None:
        self._client = client
        self._lookup_timeout_s = lookup_timeout_s
        self._tally = tally
        self._namespace: NamespaceHandle | None = None
        self._opened: tuple[int, NamespaceHandle] | None = None
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._answers: deque[Answer] = deque()
        self._thread = threading.Thread(target=self._work, name="kvd-control", daemon=True)
        self._thread.start()

    # -- what the engine's thread asks

    def use(self, namespace: NamespaceHandle | None) -> None:
        """From now on calls are about ``namespace``; None: there is nothing to share."""
        self._namespace = namespace

    @property
    def namespace(self) -> NamespaceHandle | None:
        """What is shared."""
        return self._namespace

    @property
    def ready(self) -> bool:
        """Whether a call made now has a chance: there is something to share, and a daemon."""
        return self._namespace is not None and self._client.connected

    def attachment(self) -> Attachment | None:
        """For the workers: the way to the current session; None without one."""
        try:
            return self._client.attachment()
        except KvdError:
            return None

    @property
    def read_lease_s(self) -> float:
        """How long a read lease lives; 0 without a session."""
        info = self._client.info
        return info.read_lease_s if info is not None else 0.0

    @property
    def epoch(self) -> int:
        """Of the current session."""
        return self._client.epoch

    def await_daemon(self, timeout_s: float) -> None:
        """Waits for a first session. Not having one is fine."""
        try:
            self._client.connect(timeout_s)
        except KvdError:
            pass

    def lookup(self, keys: Sequence[bytes], skip: int, *, again: bool) -> ReadLease | None:
        """The longest prefix in memory, leased. Waits for the daemon, at most the lookup's deadline; None: no answer.

        ``again``: the same request has asked before.
        """
        namespace = self._namespace
        if namespace is None or not self._client.connected:
            return None
        began = time.monotonic()
        try:
            return self._client.lookup(namespace, keys, skip=skip, again=again, timeout_s=self._lookup_timeout_s)
        except KvdError as error:
            self._tally.add(lookup_failures=1)
            complain("lookup", "kvd: a lookup got no answer: %s", error)
            return None
        finally:
            self._tally.add(lookups=1, lookup_seconds=time.monotonic() - began)

    def reserve(self, ticket: int, items: list[tuple[bytes, bytes]]) -> None:
        """Asks for slots; the answer to ``ticket`` comes with ``answers``."""
        namespace = self._namespace
        self._queue.put(lambda: self._reserve(ticket, namespace, items))

    def answers(self) -> list[Answer]:
        """Answers that have come in since the last time."""
        return [self._answers.popleft() for _ in range(len(self._answers))]

    def commit(self, lease: WriteLease, keys: list[bytes]) -> None:
        """The bytes of ``keys`` are in place, all ranks' stripes."""
        self._queue.put(lambda: self._commit(lease, keys))

    def abort(self, lease: WriteLease, keys: list[bytes]) -> None:
        """Gives up ``keys``; nobody may be copying into their slots."""
        self._tally.add(dropped_chunks=len(keys))
        self._queue.put(lambda: lease.abort(keys, timeout_s=CALL_TIMEOUT_S))

    def close(self) -> None:
        """Does what is still queued, as far as that takes JOIN_S, and leaves."""
        self._queue.put(None)
        self._thread.join(JOIN_S)
        self._client.close()

    # -- the thread

    def _work(self) -> None:
        while True:
            self._open_namespace()
            try:
                task = self._queue.get(timeout=IDLE_S)
            except Empty:
                continue
            if task is None:
                return
            try:
                task()
            except Exception:
                complain("control", "kvd: a call to the daemon failed", exc_info=True)

    def _open_namespace(self) -> None:
        """So that the first lookup of a session, in a scheduler's step, takes one call and not two."""
        namespace, epoch = self._namespace, self._client.epoch
        if namespace is None or self._opened == (epoch, namespace):
            return
        if not self._client.connected:
            complain(
                "absent",
                "kvd: no daemon at %s, computing everything: %s",
                self._client.endpoint,
                self._client.last_error,
            )
            return
        try:
            self._client.reserve(namespace, [], timeout_s=CALL_TIMEOUT_S)
        except (InvalidRequest, ProtocolMismatch, Unauthenticated) as error:
            logger.error("kvd: the daemon refuses this engine's chunks, nothing is shared: %s", error)
            self._namespace = None
        except KvdError as error:
            complain("open", "kvd: the namespace could not be opened yet: %s", error)
        else:
            self._opened = (epoch, namespace)
            logger.info("kvd: connected to %s", self._client.endpoint)

    def _reserve(self, ticket: int, namespace: NamespaceHandle | None, items: list[tuple[bytes, bytes]]) -> None:
        lease = None
        try:
            if namespace is not None and self._client.connected:
                lease = self._client.reserve(namespace, items, timeout_s=CALL_TIMEOUT_S)
        except KvdError as error:
            complain("reserve", "kvd: chunks are not stored: %s", error)
        finally:
            self._answers.append(Answer(ticket, lease))

    def _commit(self, lease: WriteLease, keys: list[bytes]) -> None:
        try:
            statuses = lease.commit(keys, timeout_s=CALL_TIMEOUT_S)
            accepted = sum(status in (CommitStatus.STORED, CommitStatus.WAITING_PARENT) for status in statuses)
            self._tally.add(committed_chunks=accepted, dropped_chunks=len(keys) - accepted)
        except KvdError as error:
            complain("commit", "kvd: chunks could not be committed: %s", error)
            self._tally.add(dropped_chunks=len(keys))
            lease.abort(keys, timeout_s=CALL_TIMEOUT_S)
