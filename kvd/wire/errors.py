"""Errors as a tree, and their one form on the wire.

Every failure of a call is a gRPC status with one ``google.rpc.ErrorInfo`` in its details: ``domain`` is
``kvd``, ``reason`` is the ``reason`` of one of the classes below. The daemon raises these classes; the client
gets the same classes back, so a caller can catch ``SessionUnknown`` without knowing about gRPC.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "kvd"


class KvdError(Exception):
    """Root of everything kvd raises. ``reason`` is stable and machine-readable; the text is for people."""

    reason = "INTERNAL"
    code = grpc.StatusCode.INTERNAL


class InvalidRequest(KvdError):
    """The request breaks a rule of the protocol: a key of the wrong length, too many chunks, ..."""

    reason = "INVALID_REQUEST"
    code = grpc.StatusCode.INVALID_ARGUMENT


class ProtocolMismatch(KvdError):
    """Client and daemon have no protocol number in common."""

    reason = "PROTOCOL_MISMATCH"
    code = grpc.StatusCode.FAILED_PRECONDITION


class Unauthenticated(KvdError):
    """The peer has not proven who it is (wrong user, missing or wrong ticket)."""

    reason = "UNAUTHENTICATED"
    code = grpc.StatusCode.UNAUTHENTICATED


class SessionUnknown(KvdError):
    """The session has ended, or belongs to an earlier life of the daemon: open a new one."""

    reason = "SESSION_UNKNOWN"
    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(KvdError):
    """The peer is known but may not do this."""

    reason = "PERMISSION_DENIED"
    code = grpc.StatusCode.PERMISSION_DENIED


class NamespaceUnknown(KvdError):
    """The namespace was not opened in this session (or the daemon was restarted): open it again."""

    reason = "NAMESPACE_UNKNOWN"
    code = grpc.StatusCode.NOT_FOUND


class LimitReached(KvdError):
    """A bound of the daemon (sessions, leases, requests in flight) is reached: try later."""

    reason = "LIMIT_REACHED"
    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Draining(KvdError):
    """The daemon is stopping."""

    reason = "DRAINING"
    code = grpc.StatusCode.UNAVAILABLE


class Unavailable(KvdError):
    """The daemon did not answer: not there, gone, hanging, or the breaker is open. Client side only."""

    reason = "UNAVAILABLE"
    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(Unavailable):
    """The daemon did not answer in time. What it did is not known. Client side only."""

    reason = "DEADLINE_EXCEEDED"
    code = grpc.StatusCode.DEADLINE_EXCEEDED


def _tree(root: type[KvdError]) -> list[type[KvdError]]:
    return [root] + [leaf for branch in root.__subclasses__() for leaf in _tree(branch)]


BY_REASON: dict[str, type[KvdError]] = {cls.reason: cls for cls in _tree(KvdError)}


def to_status(error: KvdError) -> status_pb2.Status:
    """The wire form of an error, for ``rpc_status.to_status``."""
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN))
    code: int = error.code.value[0]
    return status_pb2.Status(code=code, message=str(error), details=[detail])


def from_rpc_error(error: grpc.RpcError) -> KvdError:
    """The kvd error that a failed call carries; a plain gRPC failure becomes ``Unavailable`` and the like."""
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    text = (error.details() if isinstance(error, grpc.Call) else None) or str(error)
    status = rpc_status.from_call(error) if isinstance(error, grpc.Call) else None
    details: Iterable[any_pb2.Any] = () if status is None else status.details
    for detail in details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in BY_REASON:
            return BY_REASON[info.reason](text)
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(text)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return Unavailable(text)
    return KvdError(f"{code.name}: {text}")
