"""The calls of a session as messages over gRPC, for tests that compare them with the client's frames."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from kvd.wire.chunks import CommitStatus, Location, ReserveResult, Stripe
from kvd.wire.errors import from_rpc_error
from kvd.wire.pb import kvd_pb2 as pb
from kvd.wire.pb import kvd_pb2_grpc
from kvd_client.calls import TOKEN_METADATA
from kvd_client.messages import Found, committed, reserved


class GrpcCalls:
    """What ``kvd_client.channel.FrameCalls`` does, over ``channel``, for the session with ``token``."""

    def __init__(self, channel: grpc.Channel, token: bytes) -> None:
        self._token = token
        self._stub: Any = kvd_pb2_grpc.KvdStub(channel)  # type: ignore[no-untyped-call]

    def lookup(
        self, namespace_id: bytes, lease_id: int, keys: Sequence[bytes], skip: int, again: bool, deadline: float
    ) -> Found:
        request = pb.LookupRequest(namespace_id=namespace_id, lease_id=lease_id, keys=keys, skip=skip, again=again)
        answer = self._call(self._stub.Lookup, request, deadline)
        return Found(_locations(answer), answer.promoting, answer.writing)

    def reserve(
        self, namespace_id: bytes, lease_id: int, items: Sequence[tuple[bytes, bytes]], deadline: float
    ) -> list[ReserveResult]:
        wanted = [pb.ReserveItem(key=key, parent=parent) for key, parent in items]
        request = pb.ReserveRequest(namespace_id=namespace_id, lease_id=lease_id, items=wanted)
        answer = self._call(self._stub.Reserve, request, deadline)
        assert len(answer.statuses) == len(items)
        return reserved(answer.statuses, _locations(answer))

    def commit(
        self, namespace_id: bytes, lease_id: int, keys: Sequence[bytes], stripes: Sequence[Stripe], deadline: float
    ) -> list[CommitStatus]:
        wire_stripes = [pb.Stripe(**stripe._asdict()) for stripe in stripes]
        items = [pb.CommitItem(key=key, stripes=wire_stripes) for key in keys]
        request = pb.CommitRequest(namespace_id=namespace_id, lease_id=lease_id, items=items)
        answer = self._call(self._stub.Commit, request, deadline)
        return committed(result.status for result in answer.results)

    def abort(self, namespace_id: bytes, lease_id: int, keys: Sequence[bytes], deadline: float) -> None:
        request = pb.AbortRequest(namespace_id=namespace_id, lease_id=lease_id, keys=keys)
        self._call(self._stub.Abort, request, deadline)

    def release(self, lease_ids: Sequence[int], deadline: float) -> None:
        self._call(self._stub.Release, pb.ReleaseRequest(lease_ids=lease_ids), deadline)

    def renew(self, lease_ids: Sequence[int], deadline: float) -> list[bool]:
        answer = self._call(self._stub.Renew, pb.RenewRequest(lease_ids=lease_ids), deadline)
        alive = {result.lease_id for result in answer.results if result.alive}
        return [lease_id in alive for lease_id in lease_ids]

    def _call(self, method: Callable[..., Any], request: object, deadline: float) -> Any:
        try:
            return method(request, timeout=deadline - time.monotonic(), metadata=((TOKEN_METADATA, self._token),))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None


def _locations(message: pb.LookupResponse | pb.ReserveResponse) -> list[Location]:
    """The slots that an answer names in columns."""
    segments = message.segments or itertools.repeat(0, len(message.offsets))
    return list(map(Location._make, zip(segments, message.offsets, message.generations, strict=True)))
