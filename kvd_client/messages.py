"""Between the protocol's messages and the small types of the client."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from typing import NamedTuple

from kvd.wire.chunks import CommitStatus, Location, ReserveResult, ReserveStatus
from kvd.wire.errors import ProtocolMismatch
from kvd.wire.identity import Identity
from kvd.wire.pb import kvd_pb2 as pb
from kvd_client.path import Kind

_REFUSED = {int(status): ReserveResult(status) for status in ReserveStatus if status is not ReserveStatus.GRANTED}
_GRANTED = ReserveStatus.GRANTED
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


def reserved(statuses: Iterable[int], granted: Sequence[Location]) -> list[ReserveResult]:
    """The outcomes of a Reserve. What a later daemon says and this client does not know is no grant: NO_ROOM.

    Raises ProtocolMismatch when there are more or fewer slots in ``granted`` than were granted.
    """
    slots = iter(granted)
    try:
        results = [
            ReserveResult(_GRANTED, next(slots))
            if status == _GRANTED
            else _REFUSED.get(status, _REFUSED[ReserveStatus.NO_ROOM])
            for status in statuses
        ]
    except StopIteration:
        raise ProtocolMismatch("the daemon has granted more than it names slots for") from None
    if next(slots, None) is not None:
        raise ProtocolMismatch("the daemon names more slots than it has granted")
    return results


def committed(statuses: Iterable[int]) -> list[CommitStatus]:
    """The outcomes of a Commit. What this client does not know is FAILED."""
    return [_COMMIT_STATUSES.get(status, CommitStatus.FAILED) for status in statuses]


def same_count(results: Sized, items: Sized) -> None:
    """Raises ProtocolMismatch unless the daemon has answered every item."""
    if len(results) != len(items):
        raise ProtocolMismatch(f"the daemon answers {len(results)} items of {len(items)}")


def short(text: str, limit_bytes: int) -> str:
    """``text`` cut to ``limit_bytes`` of UTF-8."""
    return text.encode()[:limit_bytes].decode(errors="ignore")
