"""The client of kvd: for anyone with bytes to share between processes, and for engines with KV caches.

Light to import: no engine, no tensor library, no GPU.
"""

from kvd.wire.chunks import ROOT, CommitStatus, Location, ReserveResult, ReserveStatus, Stripe
from kvd.wire.errors import (
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    KvdError,
    LimitReached,
    PermissionDenied,
    ProtocolMismatch,
    SessionUnknown,
    Unauthenticated,
    Unavailable,
)
from kvd.wire.identity import Identity
from kvd.wire.spans import Span, whole
from kvd_client.client import Client, StoreOutcome
from kvd_client.leases import ReadLease, WriteLease
from kvd_client.messages import NamespaceHandle, SessionInfo
from kvd_client.path import Attachment, DataPath, Piece, open_path

__all__ = [
    "ROOT",
    "Attachment",
    "Client",
    "CommitStatus",
    "DataPath",
    "DeadlineExceeded",
    "Draining",
    "Identity",
    "InvalidRequest",
    "KvdError",
    "LimitReached",
    "Location",
    "NamespaceHandle",
    "PermissionDenied",
    "Piece",
    "ProtocolMismatch",
    "ReadLease",
    "ReserveResult",
    "ReserveStatus",
    "SessionInfo",
    "SessionUnknown",
    "Span",
    "StoreOutcome",
    "Stripe",
    "Unauthenticated",
    "Unavailable",
    "WriteLease",
    "open_path",
    "whole",
]
