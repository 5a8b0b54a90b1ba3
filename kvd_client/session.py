"""One session with one life of the daemon: the stream that proves life, and the calls."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import grpc

from kvd.wire.chunks import CommitStatus, ReserveResult, Stripe
from kvd.wire.endpoints import Endpoint, UnixEndpoint
from kvd.wire.errors import DeadlineExceeded, KvdError, ProtocolMismatch, SessionUnknown, Unavailable, from_rpc_error
from kvd.wire.identity import NAMESPACE_ID_BYTES
from kvd.wire.lifeline import socket_path
from kvd.wire.pb import kvd_pb2 as pb
from kvd.wire.version import PROTOCOL_MAX, PROTOCOL_MIN, VERSION
from kvd_client.breaker import Breaker
from kvd_client.calls import GrpcCalls
from kvd_client.channel import CallChannel, FrameCalls
from kvd_client.debts import Abort, Debts
from kvd_client.lifeline import Lifeline
from kvd_client.messages import Found, NamespaceHandle, SessionInfo, short
from kvd_client.numa import node_of_process
from kvd_client.path import Attachment, DataPath, Kind, open_path
from kvd_client.presence import PresenceView
from kvd_client.shm import ShmPath
from kvd_client.tcp import open_call_connection

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Answers stay small: payload never travels here.
MAX_MESSAGE_BYTES = 16 << 20
#: How long the keeper's own calls wait.
SETTLE_TIMEOUT_S = 1.0

_CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    # A call that gRPC itself tries again, because the daemon was about to stop, and that cannot connect then, has its
    # status and never ends (grpcio 1.85): who waits for its answer waits for ever. The keeper tries again anyway.
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a failure of an earlier channel must not delay this one
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]


class Session:
    """A session, from Welcome to its end. Thread-safe. Deadlines are ``time.monotonic()`` values.

    Calls raise Unavailable (nobody answers, or the breaker is open), DeadlineExceeded (what the daemon did is not
    known), SessionUnknown, and what the daemon answers. ``changed`` is called when the session ends and when it owes
    the daemon something: then somebody calls ``settle``.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        kind: Kind,
        connections: int,
        epoch: int,
        breaker: Breaker,
        changed: Callable[[], None],
    ) -> None:
        self.epoch = epoch
        self._endpoint = endpoint
        self._kind: Kind = kind
        self._connections = connections
        self._breaker = breaker
        self._changed = changed
        self._ended = threading.Event()
        self._heartbeat_s = 1.0  # until Welcome says
        self._debts = Debts()
        self._namespaces: dict[tuple[bytes, int], bytes] = {}
        #: Tells what the daemon may hold without a call; None where there is no way to see that.
        self.presence: PresenceView | None = None
        self._path: DataPath | None = None
        self._path_lock = threading.Lock()
        self._lifeline: Lifeline | None = None
        self._channel: CallChannel | None = None
        self._grpc: GrpcCalls | None = None

    # -- life

    def open(self, name: str, deadline: float, numa_node: int | None = None) -> None:
        """Opens the session, near ``numa_node`` or where this process runs. Raises as calls do, and Unauthenticated,
        ProtocolMismatch; then ``close`` it."""
        ticket = b""
        daemon_id = None
        if isinstance(self._endpoint, UnixEndpoint):
            lifeline = Lifeline.open(socket_path(self._endpoint.path), deadline - time.monotonic())
            ticket, daemon_id = lifeline.ticket, lifeline.daemon_id
            self._channel = CallChannel(lifeline.take_channel(), self._debts.take_riders)
            self.presence = _presence_of(lifeline)
            if self._kind == "shm":
                self._path = ShmPath(lifeline)
            else:
                lifeline.drop_descriptors()
                self._lifeline = lifeline
        self._grpc = GrpcCalls(grpc.insecure_channel(self._endpoint.grpc_target, _CHANNEL_OPTIONS))
        hello = pb.Hello(
            protocol_min=PROTOCOL_MIN,
            protocol_max=PROTOCOL_MAX,
            client_name=short(name, 128),
            client_version=VERSION,
            pid=os.getpid(),
            ticket=ticket,
            numa_node=node_of_process() if numa_node is None else numa_node,
        )
        stream = self._grpc.session(self._notes(hello))
        welcome = _first_note(stream, deadline)
        if not PROTOCOL_MIN <= welcome.protocol <= PROTOCOL_MAX:
            raise ProtocolMismatch(f"the daemon speaks protocol {welcome.protocol}")
        if daemon_id not in (None, welcome.daemon_id):
            raise Unavailable("the daemon was restarted in between")
        self._heartbeat_s = max(0.05, welcome.heartbeat_interval_ms / 1000)
        self._token: bytes = welcome.session_token
        self._data_port: int = welcome.data_port
        self.max_chunks: int = welcome.max_chunks_per_request
        self._grpc.token = self._token
        self.info = SessionInfo(
            self.epoch,
            self._kind,
            welcome.daemon_id,
            welcome.daemon_version,
            welcome.tenant,
            welcome.read_lease_ms / 1000,
            welcome.max_chunks_per_request,
            welcome.max_chunk_bytes,
        )
        if self._channel is None:
            self._channel = CallChannel(open_call_connection(self.attachment(), deadline), self._debts.take_riders)
        self._channel.max_chunks = self.max_chunks
        self._calls = FrameCalls(self._channel)
        threading.Thread(target=self._listen, args=(stream,), name="kvd-session", daemon=True).start()

    @property
    def ended(self) -> bool:
        """Whether the session is over."""
        return self._ended.is_set()

    def end(self) -> None:
        """The session is of no use any more."""
        self._ended.set()
        self._changed()

    def close(self, *, keep_memory: bool = False) -> None:
        """Ends everything the session holds. Mapped memory stays as long as somebody has a view of it.

        ``keep_memory``: the daemon has gone, and the next session may well find the same pool; it stays for a while.
        """
        self._ended.set()
        self.presence = None
        for way in (self._channel, self._grpc):
            if way is not None:
                way.close()
        with self._path_lock:
            if self._path is not None:
                if keep_memory and isinstance(self._path, ShmPath):
                    self._path.retain()
                self._path.close()
        if self._lifeline is not None:
            self._lifeline.close()

    # -- the data path

    def attachment(self) -> Attachment:
        """What another process needs to open a data path of this session. Raises Unavailable: there is none."""
        if self._kind == "shm" and isinstance(self._endpoint, UnixEndpoint):
            address, port = socket_path(self._endpoint.path), 0
        else:
            address = "127.0.0.1" if isinstance(self._endpoint, UnixEndpoint) else self._endpoint.host
            port = self._data_port
            if not port:
                raise Unavailable("the daemon has no data plane")
        return Attachment(self._kind, address, port, self._token, self.info.daemon_id, self.epoch, self._connections)

    def path(self, deadline: float) -> DataPath:
        """This process's path; a TCP path that has died is replaced. Raises as ``open_path`` does."""
        if not self._path_lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise DeadlineExceeded("the data path is still being opened")
        try:
            if self.ended:
                raise Unavailable("the session has ended")
            if self._path is not None and self._path.alive:
                return self._path
            if self._kind == "shm":
                raise Unavailable("the daemon has closed the lifeline")
            if self._path is not None:
                self._path.close()
            self._path = open_path(self.attachment(), timeout_s=deadline - time.monotonic())
            return self._path
        finally:
            self._path_lock.release()

    # -- calls

    def namespace_id(self, namespace: NamespaceHandle, deadline: float) -> bytes:
        """The id of a namespace in this session; asked for once."""
        known = self._namespaces.get(namespace.key)
        if known is None:
            assert self._grpc is not None
            known = self._call(self._grpc.namespace_id, namespace, deadline=deadline)
            if len(known) != NAMESPACE_ID_BYTES:
                raise ProtocolMismatch(f"a namespace id of {len(known)} bytes")
            self._namespaces[namespace.key] = known
        return known

    def lookup(
        self, namespace_id: bytes, lease_id: int, keys: Sequence[bytes], skip: int, deadline: float, *, again: bool
    ) -> Found:
        """One Lookup. A lease whose answer does not arrive is released when the daemon is back."""
        self._check(deadline)
        try:
            return self._send(self._calls.lookup, namespace_id, lease_id, keys, skip, again, deadline=deadline)
        except Unavailable:
            self.owe_release(lease_id)
            raise

    def reserve(
        self, namespace_id: bytes, lease_id: int, items: Sequence[tuple[bytes, bytes]], deadline: float
    ) -> list[ReserveResult]:
        """One Reserve. A lease whose answer does not arrive is aborted when the daemon is back."""
        self._check(deadline)
        try:
            return self._send(self._calls.reserve, namespace_id, lease_id, items, deadline=deadline)
        except Unavailable:
            self.owe_abort(namespace_id, lease_id, ())  # nobody has learnt where the slots are: no copy is under way
            raise

    def commit(
        self,
        namespace_id: bytes,
        lease_id: int,
        keys: Sequence[bytes],
        stripes: Sequence[Stripe],
        deadline: float,
    ) -> list[CommitStatus]:
        """Commits ``keys``, in as many calls as the daemon's bound asks for."""
        statuses: list[CommitStatus] = []
        for part in self._parts(keys):
            statuses += self._call(self._calls.commit, namespace_id, lease_id, part, stripes, deadline=deadline)
        return statuses

    def abort(self, namespace_id: bytes, lease_id: int, keys: Sequence[bytes], deadline: float) -> None:
        """Aborts ``keys``."""
        for part in self._parts(keys):
            self._call(self._calls.abort, namespace_id, lease_id, part, deadline=deadline)

    def renew(self, lease_ids: Sequence[int], deadline: float) -> list[bool]:
        """Extends read leases; one answer each. With none it is the cheapest question there is."""
        return self._call(self._calls.renew, lease_ids, deadline=deadline)

    def stats(self, deadline: float) -> pb.StatsResponse:
        """The state of the daemon."""
        assert self._grpc is not None
        return self._call(self._grpc.stats, deadline=deadline)

    def note_miss(self, chunks: int) -> None:
        """A Lookup of so many chunks was not asked: it was known to be a miss. The daemon hears of it, to count it."""
        self._debts.add_miss(chunks)

    # -- what is owed

    def owe_release(self, lease_id: int) -> None:
        """The daemon is told that a read lease is over: with the next request, or soon in the background."""
        self._debts.add_release(lease_id)
        self._changed()

    def owe_abort(self, namespace_id: bytes, lease_id: int, keys: Sequence[bytes]) -> None:
        """The daemon is told in the background that ``keys`` (none: everything) of a write lease are given up."""
        for part in self._parts(keys) if keys else [()]:
            if not self._debts.add_abort(Abort(namespace_id, lease_id, part)):
                log.warning("too many aborts are owed to the daemon: the session is given up")
                self.end()
                return
        self._changed()

    def settle(self) -> None:
        """Tells the daemon what it is owed. Raises Unavailable: the rest stays owed. Only ever one thread at a time."""
        while releases := self._debts.take_releases():
            try:
                self._deliver(self._calls.release, releases)
            except Unavailable:
                for lease_id in releases:
                    self._debts.add_release(lease_id)
                raise
        while (abort := self._debts.first_abort()) is not None:
            self._deliver(self._calls.abort, *abort)
            self._debts.settled_abort()

    def probe(self) -> None:
        """Asks whether the daemon answers, breaker or not. Raises as calls do."""
        self._send(self._calls.renew, (), deadline=time.monotonic() + SETTLE_TIMEOUT_S)

    # -- inside

    def _call(self, call: Callable[..., T], *what: object, deadline: float) -> T:
        self._check(deadline)
        return self._send(call, *what, deadline=deadline)

    def _check(self, deadline: float) -> None:
        """Raises what makes a call senseless, before anything is sent."""
        if self.ended:
            raise Unavailable("the session has ended")
        self._breaker.check()
        if time.monotonic() >= deadline:
            raise DeadlineExceeded("the deadline passed before the call")

    def _send(self, call: Callable[..., T], *what: object, deadline: float) -> T:
        try:
            return call(*what, deadline)
        except SessionUnknown:
            self.end()
            raise
        except Unavailable as error:
            if not self._calls.alive:
                self.end()
            elif not self.ended:
                self._breaker.open(str(error))
            raise

    def _deliver(self, call: Callable[..., object], *what: object) -> None:
        """Tells something that is owed; what the daemon refuses is not owed any more."""
        try:
            self._send(call, *what, deadline=time.monotonic() + SETTLE_TIMEOUT_S)
        except Unavailable:
            raise
        except KvdError as error:
            log.debug("the daemon does not want to know: %s", error)

    def _parts(self, keys: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
        return (keys[first : first + self.max_chunks] for first in range(0, len(keys), self.max_chunks))

    def _notes(self, hello: pb.Hello) -> Iterator[pb.ClientNote]:
        """Hello, then heartbeats until the session ends; gRPC draws from it on a thread of its own."""
        yield pb.ClientNote(hello=hello)
        sequence = 0
        while not self._ended.wait(self._heartbeat_s):
            sequence += 1
            lookups, chunks = self._debts.take_misses()  # what no frame has reported
            beat = pb.Heartbeat(sequence=sequence, missed_lookups=lookups, missed_chunks=chunks)
            yield pb.ClientNote(heartbeat=beat)

    def _listen(self, stream: Iterable[pb.ServerNote]) -> None:
        """Hears the daemon's notes until the stream ends, and the session with it."""
        try:
            for note in stream:
                if note.HasField("draining"):
                    log.info("the daemon is stopping")
        except grpc.RpcError as error:
            if not self.ended:
                log.info("the session with the daemon has ended: %s", from_rpc_error(error))
        finally:
            self.end()


def _presence_of(lifeline: Lifeline) -> PresenceView | None:
    """The presence table that came with a lifeline, if one did. The lifeline is closed when this raises."""
    table = lifeline.take_presence()
    try:
        return None if table is None else PresenceView(*table, lifeline.daemon_id, lifeline.socket)
    except KvdError:
        lifeline.close()
        raise


def _first_note(stream: Any, deadline: float) -> pb.Welcome:
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), stream.cancel)
    timer.daemon = True
    timer.start()
    try:
        note: pb.ServerNote = next(stream)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
    except StopIteration:
        raise Unavailable("the daemon ended the session at once") from None
    finally:
        timer.cancel()
    if not note.HasField("welcome"):
        raise ProtocolMismatch("the daemon did not say welcome")
    return note.welcome
