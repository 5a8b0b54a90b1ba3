"""What a session asks over gRPC: what is asked once, or by people. All else goes as frames (``channel.py``)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc

from kvd.wire.errors import Unavailable, from_rpc_error
from kvd.wire.pb import kvd_pb2 as pb
from kvd.wire.pb import kvd_pb2_grpc
from kvd_client.messages import NamespaceHandle

TOKEN_METADATA = "kvd-session-bin"


class GrpcCalls:
    """Thread-safe. ``deadline`` is a ``time.monotonic()`` value.

    Every call raises Unavailable (nobody answers), DeadlineExceeded (what the daemon did is not known), and what the
    daemon answers. The channel connects again by itself; the session's stream says when the session is over.
    """

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

    def close(self) -> None:
        """Calls under way fail, and later ones too."""
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
