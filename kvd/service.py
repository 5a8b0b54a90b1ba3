"""The control plane: protobuf in, desk, store and sessions asked, protobuf out. No decisions are made here."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status

from kvd import convert
from kvd.desk import Desk
from kvd.metrics import Metrics
from kvd.peers import DEFAULT_TENANT, Access, Identified, parse_grpc_peer
from kvd.session import HEARTBEAT_S, Session, Sessions
from kvd.store import ChunkStore
from kvd.wire import errors
from kvd.wire.pb import kvd_pb2 as pb
from kvd.wire.version import PROTOCOL_MAX, PROTOCOL_MIN, VERSION

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

SERVICES = ("kvd.v1.Kvd", "kvd.v1.Admin")
#: A stream that has not said Hello by then is closed.
HELLO_TIMEOUT_S = 5.0
WRITE_TIMEOUT_S = 5.0
_TOKEN_KEY = "kvd-session-bin"

# What the stubs do not know of grpc.aio.
Context = Any
_EOF = cast(Any, grpc.aio).EOF
Call = Callable[[Any, Context], Awaitable[Message]]


@dataclass(frozen=True)
class Facts:
    """What the service tells clients about the daemon. ``stats`` makes the answer to Stats; ``remembered`` returns when
    operators' wishes are where the next daemon finds them."""

    daemon_id: int
    listen_port: int
    data_port: int
    read_lease_s: float
    max_chunks_per_request: int
    stats: Callable[[], pb.StatsResponse]
    remembered: Callable[[], Awaitable[None]]


class ControlService:
    """Both gRPC services, as handlers for a ``grpc.aio`` server. Lives on the event loop."""

    def __init__(
        self,
        store: ChunkStore,
        sessions: Sessions,
        access: Access,
        metrics: Metrics,
        facts: Facts,
        desk: Desk,
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._access = access
        self._metrics = metrics
        self._facts = facts
        self._desk = desk

    def handlers(self) -> list[grpc.GenericRpcHandler[Any, Any]]:
        """What to add to the server."""
        kvd = {
            "Session": grpc.stream_stream_rpc_method_handler(cast(Any, self._session), response_serializer=_serialize),
            "OpenNamespace": self._unary("OpenNamespace", pb.OpenNamespaceRequest, self._in_session(self._open)),
            "Lookup": self._unary("Lookup", pb.LookupRequest, self._in_session(self._lookup)),
            "Reserve": self._unary("Reserve", pb.ReserveRequest, self._in_session(self._reserve)),
            "Commit": self._unary("Commit", pb.CommitRequest, self._in_session(self._commit)),
            "Abort": self._unary("Abort", pb.AbortRequest, self._in_session(self._abort)),
            "Release": self._unary("Release", pb.ReleaseRequest, self._in_session(self._release)),
            "Renew": self._unary("Renew", pb.RenewRequest, self._in_session(self._renew)),
            "Stats": self._unary("Stats", pb.StatsRequest, self._stats),
        }
        admin = {
            "Drop": self._unary("Drop", pb.DropRequest, self._drop),
            "Pin": self._unary("Pin", pb.PinRequest, self._pin),
            "Unpin": self._unary("Unpin", pb.UnpinRequest, self._unpin),
            "ListPins": self._unary("ListPins", pb.ListPinsRequest, self._list_pins),
            "Audit": self._unary("Audit", pb.AuditRequest, self._audit),
        }
        return [
            grpc.method_handlers_generic_handler(name, handlers)
            for name, handlers in zip(SERVICES, (kvd, admin), strict=True)
        ]

    # -- requests of a session

    def _open(self, session: Session, request: pb.OpenNamespaceRequest) -> pb.OpenNamespaceResponse:
        namespace = self._desk.open_namespace(session, convert.identity(request.identity), request.chunk_bytes)
        return pb.OpenNamespaceResponse(namespace_id=namespace.id)

    def _lookup(self, session: Session, request: pb.LookupRequest) -> pb.LookupResponse:
        found = self._desk.lookup(
            session, request.namespace_id, request.lease_id, list(request.keys), request.skip, request.again
        )
        return convert.lookup_response(found)

    def _reserve(self, session: Session, request: pb.ReserveRequest) -> pb.ReserveResponse:
        items = convert.reserve_items(request.items)
        results = self._desk.reserve(session, request.namespace_id, request.lease_id, items)
        return convert.reserve_response(results)

    def _commit(self, session: Session, request: pb.CommitRequest) -> pb.CommitResponse:
        items = convert.commit_items(request.items)
        results = self._desk.commit(session, request.namespace_id, request.lease_id, items)
        return pb.CommitResponse(
            results=[pb.CommitResult(status=cast(pb.CommitStatus, int(result))) for result in results]
        )

    def _abort(self, session: Session, request: pb.AbortRequest) -> pb.AbortResponse:
        keys = list(request.keys)
        return pb.AbortResponse(aborted=self._desk.abort(session, request.namespace_id, request.lease_id, keys))

    def _release(self, session: Session, request: pb.ReleaseRequest) -> pb.ReleaseResponse:
        return pb.ReleaseResponse(released=self._desk.release(session, list(request.lease_ids)))

    def _renew(self, session: Session, request: pb.RenewRequest) -> pb.RenewResponse:
        ids = list(request.lease_ids)
        alive = self._desk.renew(session, ids)
        return pb.RenewResponse(
            results=[pb.RenewResult(lease_id=lease, alive=lives) for lease, lives in zip(ids, alive, strict=True)]
        )

    # -- requests without a session

    async def _stats(self, request: pb.StatsRequest, context: Context) -> pb.StatsResponse:
        peer = parse_grpc_peer(context.peer())
        if peer is not None:  # who may connect to the Unix socket, its mode has decided
            await self._access.identify_tcp(*peer, self._facts.listen_port)
        return self._facts.stats()

    async def _drop(self, request: pb.DropRequest, context: Context) -> pb.DropResponse:
        tenant = await self._operator(context)
        before = self._store.counters.dropped_records
        chunks, kept = self._store.drop(tenant, request.namespace_id or None)
        records = self._store.counters.dropped_records - before
        await self._facts.remembered()
        return pb.DropResponse(chunks=chunks, kept=kept, records=records)

    async def _pin(self, request: pb.PinRequest, context: Context) -> pb.PinResponse:
        tenant = await self._operator(context)
        chunks = self._store.pin(tenant, request.namespace_id, request.key)
        await self._facts.remembered()
        return pb.PinResponse(chunks=chunks)

    async def _unpin(self, request: pb.UnpinRequest, context: Context) -> pb.UnpinResponse:
        tenant = await self._operator(context)
        chunks = self._store.unpin(tenant, request.namespace_id, request.key)
        await self._facts.remembered()
        return pb.UnpinResponse(chunks=chunks)

    async def _list_pins(self, request: pb.ListPinsRequest, context: Context) -> pb.ListPinsResponse:
        tenant = await self._operator(context)
        return pb.ListPinsResponse(pins=[convert.pin_stats(found) for found in self._store.pins(tenant)])

    async def _audit(self, request: pb.AuditRequest, context: Context) -> pb.AuditResponse:
        await self._operator(context)
        findings = self._store.audit()
        self._metrics.audited(len(findings))
        return pb.AuditResponse(findings=findings)

    async def _operator(self, context: Context) -> str:
        """The tenant of an admin call's peer. Raises PermissionDenied, Unauthenticated."""
        peer = parse_grpc_peer(context.peer())
        if peer is None:  # the socket's mode has decided who could connect
            return DEFAULT_TENANT
        if not ipaddress.ip_address(peer[0]).is_loopback:
            raise errors.PermissionDenied("admin calls are answered on this machine only")
        return (await self._access.identify_tcp(*peer, self._facts.listen_port)).tenant

    # -- the session stream

    async def _session(self, requests: object, context: Context) -> None:
        started = time.perf_counter()
        try:
            hello = await self._receive_hello(context)
            protocol = _negotiate(hello)
            session = await self._open_session(hello, context)
        except errors.KvdError as error:
            self._metrics.answered("Session", error.code.name, time.perf_counter() - started)
            await _abort(context, error)
            return
        listener = asyncio.create_task(self._listen(context, session))
        try:
            await asyncio.wait_for(context.write(self._welcome(session, protocol)), WRITE_TIMEOUT_S)
            self._metrics.answered("Session", "OK", time.perf_counter() - started)
            while (note := await session.notes.get()) is not None:
                await asyncio.wait_for(context.write(note), WRITE_TIMEOUT_S)
            if self._sessions.draining:
                await _abort(context, errors.Draining("the daemon has stopped"))
            elif session.ended:
                await _abort(context, errors.SessionUnknown("no heartbeat was heard for too long"))
        except TimeoutError:
            log.warning("session %d does not take its notes", session.id)
        finally:
            listener.cancel()
            self._sessions.end(session)

    async def _receive_hello(self, context: Context) -> pb.Hello:
        try:
            raw = await asyncio.wait_for(context.read(), HELLO_TIMEOUT_S)
        except TimeoutError:
            raise errors.InvalidRequest("Hello did not come in time") from None
        note = pb.ClientNote() if raw is _EOF else _parse(pb.ClientNote, raw)
        if note.WhichOneof("note") != "hello":
            raise errors.InvalidRequest("a session begins with Hello")
        return note.hello

    async def _open_session(self, hello: pb.Hello, context: Context) -> Session:
        client = convert.client_label(hello)
        if hello.ticket:
            lifeline = self._sessions.claim(hello.ticket)
            try:
                who = self._access.identify_local(lifeline.credentials)
                near = hello.numa_node if hello.HasField("numa_node") else None
                return self._sessions.open(
                    client=client, tenant=who.tenant, peer=who.peer, lifeline=lifeline, numa_node=near
                )
            except errors.KvdError:
                lifeline.close()
                raise
        who = await self._identify(context)
        return self._sessions.open(client=client, tenant=who.tenant, peer=who.peer)

    async def _identify(self, context: Context) -> Identified:
        peer = parse_grpc_peer(context.peer())
        if peer is None:
            raise errors.Unauthenticated("a session over the Unix socket needs the ticket of a lifeline")
        return await self._access.identify_tcp(*peer, self._facts.listen_port)

    async def _listen(self, context: Context, session: Session) -> None:
        """Hears heartbeats until the client ends its side; then the stream ends."""
        try:
            while (raw := await context.read()) is not _EOF:
                note = _parse(pb.ClientNote, raw)
                if note.WhichOneof("note") == "heartbeat":
                    self._sessions.heard(session)
                    self._desk.missed(note.heartbeat.missed_lookups, note.heartbeat.missed_chunks)
        except errors.InvalidRequest as error:
            log.warning("session %d: %s", session.id, error)
        finally:
            session.send(None)

    def _welcome(self, session: Session, protocol: int) -> pb.ServerNote:
        facts = self._facts
        return pb.ServerNote(
            welcome=pb.Welcome(
                protocol=protocol,
                session_token=session.token,
                daemon_id=facts.daemon_id,
                daemon_version=VERSION,
                heartbeat_interval_ms=int(HEARTBEAT_S * 1000),
                read_lease_ms=int(facts.read_lease_s * 1000),
                data_port=facts.data_port,
                max_chunks_per_request=facts.max_chunks_per_request,
                tenant=session.tenant,
                max_chunk_bytes=self._store.max_chunk_bytes,
            )
        )

    # -- around every unary call

    def _in_session(self, call: Callable[[Session, Any], Message]) -> Call:
        async def checked(request: Any, context: Context) -> Message:
            session = self._sessions.by_token(_token(context.invocation_metadata()))
            return call(self._desk.admit(session), request)

        return checked

    def _unary(self, method: str, request: type[Message], call: Call) -> grpc.RpcMethodHandler[Any, Any]:
        async def answer(raw: bytes, context: Context) -> Message | None:
            try:
                with self._desk.answering(method):
                    return await call(_parse(request, raw), context)
            except errors.KvdError as error:
                await _abort(context, error)
                return None

        return grpc.unary_unary_rpc_method_handler(cast(Any, answer), response_serializer=_serialize)


def _parse(message: type[M], raw: bytes) -> M:
    """Requests arrive as bytes, so that what is no message is refused like any other bad request."""
    try:
        return message.FromString(raw)
    except DecodeError as error:
        raise errors.InvalidRequest(f"not a {message.DESCRIPTOR.name}: {error}") from error


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _token(metadata: Sequence[tuple[str, Any]]) -> bytes:
    return next((value for key, value in metadata if key == _TOKEN_KEY), b"")


def _negotiate(hello: pb.Hello) -> int:
    protocol = min(hello.protocol_max, PROTOCOL_MAX)
    if protocol < max(hello.protocol_min, PROTOCOL_MIN):
        raise errors.ProtocolMismatch(
            f"the client speaks protocols {hello.protocol_min} to {hello.protocol_max}, "
            f"this daemon ({VERSION}) {PROTOCOL_MIN} to {PROTOCOL_MAX}"
        )
    return protocol


async def _abort(context: Context, error: errors.KvdError) -> None:
    status = rpc_status.to_status(errors.to_status(error))
    with contextlib.suppress(asyncio.InvalidStateError):
        await context.abort(status.code, status.details, status.trailing_metadata)
