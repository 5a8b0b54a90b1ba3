"""The client: lookup, load, reserve, store. Synchronous, thread-safe, every call with a deadline.

with Client() as client:
    namespace = client.namespace(Identity(model="m", weights_revision="1"), chunk_bytes=1 << 20)
    client.store(namespace, [(key, ROOT)], [data])
    count = client.load(namespace, [key], [buffer])
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from kvd.wire.endpoints import Endpoint, TcpEndpoint, UnixEndpoint, find_socket, parse_endpoint
from kvd.wire.errors import Draining, InvalidRequest, LimitReached, SessionUnknown, Unavailable
from kvd.wire.identity import Identity
from kvd.wire.pb import kvd_pb2 as pb
from kvd.wire.spans import whole
from kvd_client import rounds
from kvd_client.keeper import SessionKeeper
from kvd_client.leases import ReadLease, WriteLease
from kvd_client.messages import Found, NamespaceHandle, SessionInfo
from kvd_client.path import Attachment, DataPath, Piece
from kvd_client.patience import Patience
from kvd_client.rounds import ROUND_BYTES, StoreOutcome

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Client", "StoreOutcome"]

#: What makes a load a shorter prefix and a store a FAILED: the daemon cannot serve now. Everything else is a mistake.
_NOT_NOW = (Unavailable, SessionUnknown, Draining, LimitReached)


class Client:
    """A connection to one daemon that keeps itself up.

    Making a client never fails and never waits for lack of a daemon: a thread connects, and connects again. While there
    is no session, or the breaker is open because the daemon did not answer, calls raise Unavailable at once.

    ``endpoint``: ``unix:PATH`` or ``tcp://HOST:PORT``; None looks for the socket of this node (``find_socket``).
    ``name``: shown on status pages. ``timeout_s``: deadline of calls that are given none.
    ``transport``: "auto" is shared memory over a Unix socket, else TCP; "tcp" over a Unix socket uses the data plane on
    127.0.0.1. ``data_connections``: most TCP data connections of one path. ``numa_node``: the memory node of this
    machine near which the daemon gives slots if it can; None = that of the CPUs that this process may run on, when a
    session is opened, if they have one. ValueError for what cannot be.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        name: str = "",
        timeout_s: float = 2.0,
        transport: Literal["auto", "shm", "tcp"] = "auto",
        data_connections: int = 4,
        numa_node: int | None = None,
    ) -> None:
        where: Endpoint = UnixEndpoint(find_socket()) if endpoint is None else parse_endpoint(endpoint)
        if transport == "shm" and isinstance(where, TcpEndpoint):
            raise ValueError(f"shared memory needs a Unix socket, and {where} is none")
        if transport not in ("auto", "shm", "tcp"):
            raise ValueError(f"transport is 'auto', 'shm' or 'tcp', not {transport!r}")
        if not 1 <= data_connections <= 32:
            raise ValueError(f"data_connections is 1 to 32, not {data_connections}")
        if numa_node is not None and not 0 <= numa_node < 1 << 32:
            raise ValueError(f"numa_node is the number of a memory node, not {numa_node}")
        self.endpoint = where
        self.timeout_s = timeout_s
        shared = isinstance(where, UnixEndpoint) and transport != "tcp"
        self._lease_ids = itertools.count(1)
        self._keeper = SessionKeeper(where, name, "shm" if shared else "tcp", data_connections, numa_node)
        self._keeper.start()

    # -- the connection

    def connect(self, timeout_s: float | None = None) -> SessionInfo:
        """Waits for a session. Raises what stands in the way: Unavailable, Unauthenticated, ProtocolMismatch, ..."""
        return self._keeper.connect(self._deadline(timeout_s)).info

    @property
    def connected(self) -> bool:
        """Whether a call made now would be tried: there is a session, and the breaker is closed."""
        return self._keeper.connected

    @property
    def info(self) -> SessionInfo | None:
        """What the daemon has said of itself and of this session; None without a session."""
        session = self._keeper.session
        return None if session is None else session.info

    @property
    def epoch(self) -> int:
        """Rises with every new session. Leases, paths and attachments of another epoch are void."""
        return self._keeper.epoch

    @property
    def last_error(self) -> str:
        """Why there is no session, or why the breaker opened last; empty when nothing ever went wrong."""
        return self._keeper.last_error

    def path(self, timeout_s: float | None = None) -> DataPath:
        """This process's data path of the current session. Raises Unavailable."""
        deadline = self._deadline(timeout_s)
        return self._keeper.require().path(deadline)

    def attachment(self) -> Attachment:
        """What another process of this engine needs for ``open_path``. Raises Unavailable."""
        return self._keeper.require().attachment()

    def close(self) -> None:
        """Ends the session. Leases end with it; calls under way fail. May be called twice."""
        self._keeper.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the calls

    def namespace(self, identity: Identity, chunk_bytes: int) -> NamespaceHandle:
        """Names a namespace; asks nothing of the daemon. It is opened in each session when it is first used."""
        return NamespaceHandle(identity, chunk_bytes)

    def lookup(
        self,
        namespace: NamespaceHandle,
        keys: Sequence[bytes],
        *,
        skip: int = 0,
        again: bool = False,
        wait_s: float = 0.0,
        timeout_s: float | None = None,
    ) -> ReadLease:
        """Leases the longest prefix of ``keys`` that is in memory, for reading, without its first ``skip`` chunks.

        What follows it on a disk is on its way into memory from now on: ``promoting`` of the lease says how many
        chunks. ``wait_s``: waits so long for them and leases what has come by then; ``timeout_s`` is the deadline of
        each question meanwhile. Who waits by other means asks ``again`` (it is not another use of the chunks), and
        releases the former lease after that: what it holds may be evicted otherwise.

        On the daemon's node a miss takes microseconds and no call: the presence table shows it, and the daemon hears of
        it later. Then ``writing`` of the lease is 0, whatever is being written.

        Keys beyond the daemon's bound are not asked for: the answer is the longest prefix up to there. Raises
        Unavailable (at once when the breaker is open), DeadlineExceeded, InvalidRequest, LimitReached.
        """
        lease = self._lookup(namespace, keys, skip, again, timeout_s)
        patience = Patience(time.monotonic(), wait_s)
        while patience.heard(time.monotonic(), len(lease), lease.promoting):
            time.sleep(max(0.0, patience.ask_at - time.monotonic()))
            with lease:
                lease = self._lookup(namespace, keys, skip, True, timeout_s)
        return lease

    def _lookup(
        self, namespace: NamespaceHandle, keys: Sequence[bytes], skip: int, again: bool, timeout_s: float | None
    ) -> ReadLease:
        deadline = self._deadline(timeout_s)
        session = self._keeper.require()
        keys = keys[: session.max_chunks]
        if skip >= len(keys):
            return ReadLease(session, self.timeout_s, 0, Found([], 0, 0))
        namespace_id = session.namespace_id(namespace, deadline)
        presence = session.presence
        if presence is not None and presence.may_hold(namespace_id, keys) <= skip:
            if not again:
                session.note_miss(len(keys) - skip)
            return ReadLease(session, self.timeout_s, 0, Found([], 0, 0))
        lease_id = next(self._lease_ids)
        found = session.lookup(namespace_id, lease_id, keys, skip, deadline, again=again)
        return ReadLease(session, self.timeout_s, lease_id, found)

    def reserve(
        self,
        namespace: NamespaceHandle,
        items: Sequence[tuple[bytes, bytes]],
        *,
        timeout_s: float | None = None,
    ) -> WriteLease:
        """Asks for slots for ``items`` (key, parent key or ROOT), parents before their children.

        At most ``info.max_chunks`` items: InvalidRequest. Raises otherwise as ``lookup`` does, and Draining.
        """
        deadline = self._deadline(timeout_s)
        session = self._keeper.require()
        if len(items) > session.max_chunks:
            raise InvalidRequest(f"{len(items)} items; the daemon takes {session.max_chunks} in one request")
        namespace_id = session.namespace_id(namespace, deadline)
        lease_id = next(self._lease_ids)
        results = session.reserve(namespace_id, lease_id, items, deadline) if items else []
        return WriteLease(session, self.timeout_s, namespace_id, lease_id, [key for key, _ in items], results)

    def load(
        self,
        namespace: NamespaceHandle,
        keys: Sequence[bytes],
        buffers: Sequence[Buffer],
        *,
        timeout_s: float | None = None,
    ) -> int:
        """Fills ``buffers`` (chunk_bytes each, writable) with the longest stored prefix of ``keys``.

        Returns how many chunks arrived intact, counted from the first; buffers beyond hold anything. Chunks on a disk
        are waited for, for half of the time at most. A daemon that is missing, slow or restarting makes the prefix
        shorter, down to 0.
        """
        _same_length(keys, buffers)
        deadline = self._deadline(timeout_s)
        half = _remaining(deadline) / 2
        try:
            with self.lookup(namespace, keys, wait_s=half, timeout_s=half) as lease:
                span = whole(namespace.chunk_bytes)
                pieces = [Piece(at, span, buffer) for at, buffer in zip(lease.locations, buffers, strict=False)]
                intact = lease.session.path(deadline).read(lease.lease_id, pieces, deadline) if pieces else []
        except _NOT_NOW:
            return 0
        return next((i for i, good in enumerate(intact) if not good), len(intact))

    def store(
        self,
        namespace: NamespaceHandle,
        items: Sequence[tuple[bytes, bytes]],
        buffers: Sequence[Buffer],
        *,
        timeout_s: float | None = None,
    ) -> list[StoreOutcome]:
        """Stores chunks: ``items`` (key, parent key or ROOT), parents first, with their bytes (chunk_bytes each).

        One outcome per item. A daemon that is missing, slow or restarting makes outcomes FAILED.
        """
        _same_length(items, buffers)
        deadline = self._deadline(timeout_s)
        outcomes = [StoreOutcome.FAILED] * len(items)

        def reserve(part: slice) -> WriteLease:
            return self.reserve(namespace, items[part], timeout_s=_remaining(deadline))

        try:
            session = self._keeper.require()
            most = ROUND_BYTES[session.info.kind] // namespace.chunk_bytes
            chunks = max(1, min(most, session.max_chunks))
            if items:
                keys = [key for key, _ in items]
                rounds.store(reserve, keys, buffers, namespace.chunk_bytes, chunks, deadline, outcomes)
        except _NOT_NOW:
            pass
        return outcomes

    def renew(self, leases: Sequence[ReadLease], *, timeout_s: float | None = None) -> list[bool]:
        """Extends read leases in one call; False where a lease has ended. Raises as ``lookup`` does."""
        session = self._keeper.require()
        mine = [lease.lease_id for lease in leases if lease.session is session]
        alive = iter(session.renew(mine, self._deadline(timeout_s)))
        return [lease.session is session and next(alive) for lease in leases]

    def stats(self, timeout_s: float | None = None) -> pb.StatsResponse:
        """The state of the daemon. Raises as ``lookup`` does."""
        deadline = self._deadline(timeout_s)
        return self._keeper.require().stats(deadline)

    # -- inside

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)


def _remaining(deadline: float) -> float:
    return deadline - time.monotonic()


def _same_length(items: Sequence[object], buffers: Sequence[object]) -> None:
    if len(items) != len(buffers):
        raise ValueError(f"{len(items)} chunks and {len(buffers)} buffers")
