"""What a session asks the daemon while an engine works: one interface, two ways.

Frames on the call channel of a lifeline (``channel.py``) where there is one, gRPC everywhere else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grpc

from kvd.wire.chunks import CommitStatus, ReserveResult, Stripe
from kvd.wire.errors import Unavailable, from_rpc_error
from kvd.wire.pb import kvd_pb2 as pb
from kvd.wire.pb import kvd_pb2_grpc
from kvd_client.messages import Found, NamespaceHandle, committed, found, locations, reserved, same_count

TOKEN_METADATA = "kvd-session-bin"


class Calls(Protocol):
    """Thread-safe. ``deadline`` is a ``time.monotonic()`` value.

    Every call raises Unavailable (nobody answers), DeadlineExceeded (what the daemon did is not known),
    ProtocolMismatch (the answer makes no sense), and what the daemon answers.
    """

    @property
    def alive(self) -> bool:
        """False: no call will ever be answered this way again, and the session is of no use."""

    def lookup(
        self, namespace_id: bytes, lease_id: int, keys: Sequence[bytes], skip: int, again: bool, deadline: float
    ) -> Found:
        """One Lookup."""

    def reserve(
        self, namespace_id: bytes, lease_id: int, items: Sequence[tuple[bytes, bytes]], deadline: float
    ) -> list[ReserveResult]:
        """One Reserve; ``items`` are (key, parent or ROOT)."""

    def commit(
        self, namespace_id: bytes, lease_id: int, keys: Sequence[bytes], stripes: Sequence[Stripe], deadline: float
    ) -> list[CommitStatus]:
        """One Commit of ``stripes`` of every key; none = whole chunks."""

    def abort(self, namespace_id: bytes, lease_id: int, keys: Sequence[bytes], deadline: float) -> None:
        """One Abort."""

    def release(self, lease_ids: Sequence[int], deadline: float) -> None:
        """One Release."""

    def renew(self, lease_ids: Sequence[int], deadline: float) -> list[bool]:
        """One Renew; whether each lease is alive."""

    def close(self) -> None:
        """Calls under way fail, and later ones too."""


class GrpcCalls:
    """``Calls`` over gRPC, and the calls that go no other way."""

    alive = True  # the channel connects again by itself; the session's stream says when the session is over

    def __init__(self, channel: grpc.Channel) -> None:
        #: Of the session; Welcome says.
        self.token = b""
        self._channel = channel
        self._stub: Any = kvd_pb2_grpc.KvdStub(channel)  # type: ignore[no-untyped-call]

    def session(self, notes: object) -> Any:
        """The stream of the session."""
        return self._stub.Session(notes)

    def namespace_id(self, namespace: NamespaceHandle, deadline: float) -> bytes:
        """One OpenNamespace."""
        answer: pb.OpenNamespaceResponse = self._call(self._stub.OpenNamespace, namespace.request(), deadline)
        return answer.namespace_id

    def stats(self, deadline: float) -> pb.StatsResponse:
        """The state of the daemon."""
        answer: pb.StatsResponse = self._call(self._stub.Stats, pb.StatsRequest(), deadline)
        return answer

    def lookup(
        self, namespace_id: bytes, lease_id: int, keys: Sequence[bytes], skip: int, again: bool, deadline: float
    ) -> Found:
        """See ``Calls``."""
        request = pb.LookupRequest(namespace_id=namespace_id, lease_id=lease_id, keys=keys, skip=skip, again=again)
        return found(self._call(self._stub.Lookup, request, deadline))

    def reserve(
        self, namespace_id: bytes, lease_id: int, items: Sequence[tuple[bytes, bytes]], deadline: float
    ) -> list[ReserveResult]:
        """See ``Calls``."""
        request = pb.ReserveRequest(
            namespace_id=namespace_id,
            lease_id=lease_id,
            items=[pb.ReserveItem(key=key, parent=parent) for key, parent in items],
        )
        answer = self._call(self._stub.Reserve, request, deadline)
        same_count(answer.statuses, items)
        return reserved(answer.statuses, locations(answer))

    def commit(
        self, namespace_id: bytes, lease_id: int, keys: Sequence[bytes], stripes: Sequence[Stripe], deadline: float
    ) -> list[CommitStatus]:
        """See ``Calls``."""
        wire_stripes = [pb.Stripe(**stripe._asdict()) for stripe in stripes]
        items = [pb.CommitItem(key=key, stripes=wire_stripes) for key in keys]
        request = pb.CommitRequest(namespace_id=namespace_id, lease_id=lease_id, items=items)
        answer = self._call(self._stub.Commit, request, deadline)
        same_count(answer.results, keys)
        return committed(result.status for result in answer.results)

    def abort(self, namespace_id: bytes, lease_id: int, keys: Sequence[bytes], deadline: float) -> None:
        """See ``Calls``."""
        request = pb.AbortRequest(namespace_id=namespace_id, lease_id=lease_id, keys=keys)
        self._call(self._stub.Abort, request, deadline)

    def release(self, lease_ids: Sequence[int], deadline: float) -> None:
        """See ``Calls``."""
        self._call(self._stub.Release, pb.ReleaseRequest(lease_ids=lease_ids), deadline)

    def renew(self, lease_ids: Sequence[int], deadline: float) -> list[bool]:
        """See ``Calls``."""
        answer = self._call(self._stub.Renew, pb.RenewRequest(lease_ids=lease_ids), deadline)
        alive = {result.lease_id for result in answer.results if result.alive}
        return [lease_id in alive for lease_id in lease_ids]

    def close(self) -> None:
        """See ``Calls``."""
        self._channel.close()

    def _call(self, method: Callable[..., Any], request: object, deadline: float) -> Any:
        metadata = ((TOKEN_METADATA, self.token),)
        try:
            return method(request, timeout=max(0.0, deadline - time.monotonic()), metadata=metadata)
        except grpc.RpcError as error:
            failure = from_rpc_error(error)
        except ValueError as error:  # gRPC's way of saying that the channel has been closed
            failure = Unavailable(f"the session has ended: {error}")
        raise failure
