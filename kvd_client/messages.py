"""Between the protocol's messages and the small types of the client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvd.wire.chunks import CommitStatus, Location, ReserveResult, ReserveStatus
from kvd.wire.errors import ProtocolMismatch
from kvd.wire.identity import Identity
from kvd.wire.pb import kvd_pb2 as pb
from kvd_client.path import Kind

_RESERVE_STATUSES = {int(status): status for status in ReserveStatus}
_COMMIT_STATUSES = {int(status): status for status in CommitStatus}


class NamespaceHandle:
    """A namespace as the caller knows it: its identity, and the bytes of one chunk. ValueError for chunk_bytes < 1."""

    def __init__(self, identity: Identity, chunk_bytes: int) -> None:
        if chunk_bytes < 1:
            raise ValueError(f"a chunk has at least one byte, not {chunk_bytes}")
        self.identity = identity
        self.chunk_bytes = chunk_bytes
        #: Tells handles apart.
        self.key = (identity.canonical(""), chunk_bytes)

    def request(self) -> pb.OpenNamespaceRequest:
        """The message that opens it."""
        fields = {name: getattr(self.identity, name) for name in Identity.__dataclass_fields__}
        fields["extra"] = dict(self.identity.extra)
        return pb.OpenNamespaceRequest(identity=pb.Identity(**fields), chunk_bytes=self.chunk_bytes)


class Found(NamedTuple):
    """The answer to a Lookup."""

    locations: list[Location]
    promoting: int
    writing: int


class SessionInfo(NamedTuple):
    """What the daemon has said of itself and of the session."""

    epoch: int
    kind: Kind
    daemon_id: int
    daemon_version: str
    tenant: str
    read_lease_s: float
    max_chunks: int  # of one request
    max_chunk_bytes: int


def location(message: pb.Location) -> Location:
    """A slot's place."""
    return Location(message.segment, message.offset, message.generation)


def found(message: pb.LookupResponse) -> Found:
    """The answer to a Lookup."""
    return Found([location(chunk) for chunk in message.chunks], message.promoting, message.writing)


def reserved(message: pb.ReserveResult) -> ReserveResult:
    """One outcome of a Reserve. What a later daemon says and this client does not know is no grant: NO_ROOM."""
    status = _RESERVE_STATUSES.get(int(message.status), ReserveStatus.NO_ROOM)
    if status is not ReserveStatus.GRANTED:
        return ReserveResult(status)
    return ReserveResult(status, location(message.location))


def committed(message: pb.CommitResult) -> CommitStatus:
    """One outcome of a Commit. What this client does not know is FAILED."""
    return _COMMIT_STATUSES.get(int(message.status), CommitStatus.FAILED)


def same_count(results: Sequence[object], items: Sequence[object]) -> None:
    """Raises ProtocolMismatch unless the daemon has answered every item."""
    if len(results) != len(items):
        raise ProtocolMismatch(f"the daemon answers {len(results)} items of {len(items)}")


def short(text: str, limit_bytes: int) -> str:
    """``text`` cut to ``limit_bytes`` of UTF-8."""
    return text.encode()[:limit_bytes].decode(errors="ignore")
