"""The data path: how bytes get between this process and the slots of the pool. One interface, two ways.

The shared-memory way (``shm.py``) copies in memory that daemon and client both map; the TCP way (``tcp.py``) moves the
bytes over the data plane. Whoever copies needs no RPC: a scheduler leases slots, its workers read and write them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from kvd.wire.chunks import Location
from kvd.wire.spans import Span

if TYPE_CHECKING:
    from typing_extensions import Buffer

Kind = Literal["shm", "tcp"]


class Piece(NamedTuple):
    """One copy: the bytes that ``span`` names in the slot at ``location``, and the memory they go to or come from.

    ``buffer`` is C-contiguous, has exactly ``span.size`` bytes and is writable when it is read into; it holds the runs
    of the span back to back.
    """

    location: Location
    span: Span
    buffer: Buffer


class Attachment(NamedTuple):
    """What another process of the same engine needs to open a data path of this session. Can be pickled.

    Its ``token`` is the session's secret: hand it to processes of this engine only.
    """

    kind: Kind
    address: str  # shm: path of the lifeline socket; tcp: host of the data plane
    port: int  # tcp: port of the data plane; shm: 0
    token: bytes
    daemon_id: int
    epoch: int  # of the client's session; leases and paths belong together only when their epochs are equal
    connections: int  # tcp: most data connections of one path

    def __repr__(self) -> str:
        return f"Attachment({self.kind} {self.address} port={self.port} epoch={self.epoch})"


class DataPath(Protocol):
    """Bytes between this process and the slots. Thread-safe. Nothing here raises for lack of a daemon."""

    @property
    def kind(self) -> Kind:
        """Which way the bytes go."""

    @property
    def alive(self) -> bool:
        """False once the daemon or the connection is known to be gone. Never comes back: open another path."""

    @property
    def checksum_failures(self) -> int:
        """Pieces whose bytes did not arrive as they were sent, since the path was opened."""

    def memory(self) -> list[memoryview]:
        """All memory that views can lie in, for registration with a device and nothing else; [] over TCP.

        Like a view it keeps the memory mapped; unlike a view it does not keep the session's write leases. The same
        memory may come again with the next path, after the daemon has been restarted.
        """

    def view(self, location: Location, length: int) -> memoryview | None:
        """``length`` bytes of the slot itself, writable, without a copy; None over TCP or when out of bounds.

        What is read here may be used only after ``intact`` has answered True *after* the read. As long as a view
        exists its memory stays mapped and the session keeps its write leases: drop it when the copy is done.
        """

    def intact(self, locations: Sequence[Location]) -> list[bool]:
        """Whether each slot still holds the generation it was leased with; ask after the copy. Over TCP always True."""

    def read(self, lease_id: int, pieces: Sequence[Piece], deadline: float) -> list[bool]:
        """Fills the buffers; True where the bytes are those of the chunk (checked), False where they must not be used.

        ``deadline`` is a ``time.monotonic()`` value. Returns when nothing is under way any more.
        """

    def write(self, lease_id: int, pieces: Sequence[Piece], deadline: float) -> list[bool]:
        """Copies the buffers into slots of a write lease; True where every byte is in place.

        ``deadline`` is a ``time.monotonic()`` value. Returns when this side has stopped copying.
        """

    def close(self) -> None:
        """Ends the path. Copies under way end or fail by themselves; views keep their memory. May be called twice."""


def open_path(attachment: Attachment, *, timeout_s: float = 2.0) -> DataPath:
    """A data path of the session that ``attachment`` names, for this process.

    Raises SessionUnknown when that session is gone (or another daemon answers), Unavailable when nobody answers
    within ``timeout_s``, Unauthenticated, LimitReached or ProtocolMismatch when the daemon refuses.
    """
    if attachment.kind == "shm":
        from kvd_client.shm import ShmPath

        return ShmPath.attach(attachment, timeout_s)
    from kvd_client.tcp import TcpPath

    return TcpPath.open(attachment, timeout_s)
