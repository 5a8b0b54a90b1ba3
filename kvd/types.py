"""Small types that the daemon's rooms share. No logic."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from kvd.wire.chunks import ROOT, CommitStatus, Location, ReserveResult, ReserveStatus, Stripe
from kvd.wire.identity import Identity

__all__ = [
    "ROOT",
    "ChunkState",
    "CommitStatus",
    "LeaseId",
    "Location",
    "LookupResult",
    "Namespace",
    "ReserveResult",
    "ReserveStatus",
    "SessionId",
    "Stripe",
]

#: A session's number inside the daemon. Not the secret token.
SessionId = int
#: Chosen by the client, unique within its session.
LeaseId = int


class ChunkState(Enum):
    """Life of a chunk in the books. Only READY chunks can be seen by readers."""

    WRITING = "writing"  # a write lease holds it
    WAITING = "waiting"  # its bytes are complete, its parent is not READY yet
    READY = "ready"


class LookupResult(NamedTuple):
    """The leased part of the longest READY prefix, and what follows it that is not READY yet."""

    locations: list[Location]
    promoting: int
    writing: int


@dataclass(frozen=True, slots=True)
class Namespace:
    """An opened namespace: identity, owner and geometry."""

    id: bytes
    tenant: str
    identity: Identity
    chunk_bytes: int
