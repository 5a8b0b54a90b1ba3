"""The TCP data path: pieces spread over a few data connections. Frames: ``kvd/wire/frames.py``."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from kvd.wire.chunks import Location
from kvd.wire.errors import (
    DeadlineExceeded,
    KvdError,
    LimitReached,
    ProtocolMismatch,
    SessionUnknown,
    Unavailable,
)
from kvd.wire.frames import (
    CHECKSUM,
    HELLO,
    HELLO_REPLY,
    ITEM_STATUS,
    MAGIC,
    MAX_ITEMS,
    MAX_REQUEST_BYTES,
    MAX_RUNS,
    REPLY,
    VERSION,
    HelloStatus,
    Item,
    ItemStatus,
    Op,
    pack_request,
)
from kvd.wire.spans import Span, whole
from kvd.wire.stream import Stream
from kvd_client.path import Attachment, Kind, Piece

log = logging.getLogger(__name__)

#: Payload of one request: enough to hide the round trip, little enough to spread a load evenly over the connections.
BATCH_BYTES = 8 << 20
#: Less than this is not worth a second connection.
MIN_BATCH_BYTES = 1 << 20

_REFUSALS: dict[int, type[KvdError]] = {
    HelloStatus.BAD_VERSION: ProtocolMismatch,
    HelloStatus.UNKNOWN_SESSION: SessionUnknown,
    HelloStatus.TOO_MANY: LimitReached,
}


class _Payload:
    """A piece and its buffer as bytes."""

    __slots__ = ("index", "item", "memory")

    def __init__(self, index: int, piece: Piece, *, writable: bool) -> None:
        location, span, buffer = piece
        self.index = index
        self.item = Item(location.segment, location.offset, location.generation, span)
        self.memory = memoryview(buffer).cast("B")
        if len(self.memory) != span.size:
            raise ValueError(f"a buffer of {len(self.memory)} bytes for a span of {span.size}")
        if writable and self.memory.readonly:
            raise BufferError("the buffer is not writable")

    @property
    def runs(self) -> int:
        span = self.item.span
        return 1 if span.stride == span.run else span.count


class TcpPath:
    """A data path over the network; see ``DataPath``. Every wait on a socket ends with the caller's deadline."""

    kind: Kind = "tcp"

    def __init__(self, attachment: Attachment, first: Stream) -> None:
        self._attachment = attachment
        self._lock = threading.Lock()
        self._idle = [first]
        self._busy: set[Stream] = set()
        self._slots = threading.BoundedSemaphore(attachment.connections)
        self._helpers = ThreadPoolExecutor(max(1, attachment.connections - 1), "kvd-data")
        self._lost = False
        self._checksum_failures = 0

    @classmethod
    def open(cls, attachment: Attachment, timeout_s: float) -> TcpPath:
        """Connects once, to know that the session is there. Raises as ``open_path`` does."""
        return cls(attachment, _connect(attachment, time.monotonic() + timeout_s))

    @property
    def alive(self) -> bool:
        """See ``DataPath``."""
        if not self._lost:
            with self._lock:
                self._lost = any(stream.ended() for stream in self._idle)
        return not self._lost

    @property
    def checksum_failures(self) -> int:
        """See ``DataPath``."""
        return self._checksum_failures

    def memory(self) -> list[memoryview]:
        """See ``DataPath``."""
        return []

    def view(self, location: Location, length: int) -> memoryview | None:
        """See ``DataPath``."""
        return None

    def intact(self, locations: Sequence[Location]) -> list[bool]:
        """See ``DataPath``."""
        return [True] * len(locations)

    def read(self, lease_id: int, pieces: Sequence[Piece], deadline: float) -> list[bool]:
        """See ``DataPath``."""
        return self._run(Op.READ, lease_id, pieces, deadline)

    def write(self, lease_id: int, pieces: Sequence[Piece], deadline: float) -> list[bool]:
        """See ``DataPath``."""
        return self._run(Op.WRITE, lease_id, pieces, deadline)

    def close(self) -> None:
        """See ``DataPath``."""
        self._lost = True
        with self._lock:
            for stream in self._idle:
                stream.close()
            self._idle = []
            for stream in self._busy:
                stream.interrupt()
        self._helpers.shutdown(wait=False)

    def _run(self, op: Op, lease_id: int, pieces: Sequence[Piece], deadline: float) -> list[bool]:
        payloads = [_Payload(i, piece, writable=op == Op.READ) for i, piece in enumerate(pieces)]
        outcome = [False] * len(payloads)
        work = deque(_cut(payloads, self._attachment.connections))

        def carry() -> None:
            self._carry(op, lease_id, work, outcome, deadline)

        helpers: list[Future[None]] = []
        try:
            for _ in range(min(len(work), self._attachment.connections) - 1):
                helpers.append(self._helpers.submit(carry))
            carry()
        except RuntimeError:
            pass  # closed meanwhile: no helper starts any more
        finally:
            # What has not been started never will be; what has been started ends with the deadline.
            wait([helper for helper in helpers if not helper.cancel()])
        return outcome

    def _carry(self, op: Op, lease_id: int, work: deque[list[_Payload]], outcome: list[bool], deadline: float) -> None:
        """Carries batches of ``work`` on one connection until there are none left or the connection fails."""
        stream = self._borrow(deadline)
        if stream is None:
            return
        usable = False
        try:
            while not self._lost:
                try:
                    batch = work.popleft()
                except IndexError:
                    break
                transfer = _send_batch if op == Op.WRITE else _receive_batch
                for payload, status in transfer(stream, lease_id, batch, deadline):
                    outcome[payload.index] = status == ItemStatus.OK
                    if status == ItemStatus.CHECKSUM:
                        self._count_mismatch(op, payload)
            usable = True
        except TimeoutError as error:
            log.debug("data connection closed: %s", error)
        except (OSError, ProtocolMismatch) as error:
            self._lost = True
            log.warning("the data connection to %s has failed: %s", self._attachment.address, error)
        finally:
            self._give_back(stream, usable=usable)

    def _borrow(self, deadline: float) -> Stream | None:
        """A connection for one thread, or None: none is free or can be made before the deadline."""
        if not self._slots.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return None
        stream = None
        try:
            with self._lock:
                if not self._lost and self._idle:
                    stream = self._idle.pop()
                    self._busy.add(stream)
            if stream is None and not self._lost:
                fresh = _connect(self._attachment, deadline)
                with self._lock:
                    if self._lost:
                        fresh.close()
                    else:
                        stream = fresh
                        self._busy.add(stream)
        except (Unavailable, SessionUnknown, ProtocolMismatch) as error:
            self._lost = self._lost or not isinstance(error, DeadlineExceeded)
            log.warning("no data connection: %s", error)
        except LimitReached as error:
            log.warning("no further data connection: %s", error)
        finally:
            if stream is None:
                self._slots.release()
        return stream

    def _give_back(self, stream: Stream, *, usable: bool) -> None:
        with self._lock:
            self._busy.discard(stream)
            if usable and not self._lost:
                self._idle.append(stream)
            else:
                stream.close()
        self._slots.release()

    def _count_mismatch(self, op: Op, payload: _Payload) -> None:
        with self._lock:
            self._checksum_failures += 1
        log.warning("checksum mismatch: %d bytes of a %s are not used", len(payload.memory), op.name.lower())


def _connect(attachment: Attachment, deadline: float) -> Stream:
    where = f"the data plane at {attachment.address} port {attachment.port}"
    connection = None
    try:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("the deadline has passed")
        connection = socket.create_connection((attachment.address, attachment.port), remaining_s)
        stream = Stream(connection)
        stream.send([memoryview(HELLO.pack(MAGIC, VERSION, 0, attachment.token))], deadline)
        magic, version, status = HELLO_REPLY.unpack(stream.receive(HELLO_REPLY.size, deadline))
        if magic != MAGIC:
            raise ProtocolMismatch(f"{where} is not that of a kvd daemon")
        if status != HelloStatus.OK:
            raise _REFUSALS.get(status, Unavailable)(f"{where} refuses: status {status}, its version is {version}")
        return stream
    except BaseException as error:
        if connection is not None:
            connection.close()
        if isinstance(error, TimeoutError):
            raise DeadlineExceeded(f"{where}: {error}") from None
        if isinstance(error, OSError):
            raise Unavailable(f"{where}: {error.strerror or error}") from None
        raise


def _cut(payloads: Sequence[_Payload], connections: int) -> Iterator[list[_Payload]]:
    """Batches for one request each, in order. What no request can carry is left out, and so fails."""
    total_bytes = sum(len(payload.memory) for payload in payloads)
    goal_bytes = min(BATCH_BYTES, max(MIN_BATCH_BYTES, total_bytes // connections))
    batch: list[_Payload] = []
    batch_bytes = batch_runs = 0
    for payload in payloads:
        size, runs = len(payload.memory), payload.runs
        if size > MAX_REQUEST_BYTES or runs > MAX_RUNS or not payload.item.span.fits(1 << 63):
            log.warning("%s is more than a data connection carries at a time", payload.item.span)
            continue
        if batch and (batch_bytes + size > goal_bytes or batch_runs + runs > MAX_RUNS or len(batch) == MAX_ITEMS):
            yield batch
            batch, batch_bytes, batch_runs = [], 0, 0
        batch.append(payload)
        batch_bytes += size
        batch_runs += runs
    if batch:
        yield batch


def _receive_batch(
    stream: Stream, lease_id: int, batch: list[_Payload], deadline: float
) -> Iterator[tuple[_Payload, int]]:
    """Reads a batch; each payload with its ItemStatus as soon as it is known."""
    stream.send([memoryview(pack_request(Op.READ, lease_id, [payload.item for payload in batch]))], deadline)
    _check_reply(stream, batch, deadline)
    for payload in batch:
        (status,) = ITEM_STATUS.unpack(stream.receive(ITEM_STATUS.size, deadline))
        if status == ItemStatus.OK:
            found = stream.receive_payload(payload.memory, _flat(payload), deadline)
            (sent,) = CHECKSUM.unpack(stream.receive(CHECKSUM.size, deadline))
            if found != sent:
                status = ItemStatus.CHECKSUM
        yield payload, status


def _send_batch(
    stream: Stream, lease_id: int, batch: list[_Payload], deadline: float
) -> Iterator[tuple[_Payload, int]]:
    """Writes a batch; each payload with its ItemStatus."""
    head = pack_request(Op.WRITE, lease_id, [payload.item for payload in batch])
    for payload in batch:
        checksum = stream.send_payload(head, payload.memory, _flat(payload), deadline)
        head = bytearray(CHECKSUM.pack(checksum))
    stream.send([memoryview(head)], deadline)
    _check_reply(stream, batch, deadline)
    statuses = stream.receive(ITEM_STATUS.size * len(batch), deadline)
    for payload, (status,) in zip(batch, ITEM_STATUS.iter_unpack(statuses), strict=True):
        yield payload, status


def _check_reply(stream: Stream, batch: list[_Payload], deadline: float) -> None:
    _, _, count = REPLY.unpack(stream.receive(REPLY.size, deadline))
    if count != len(batch):
        raise ProtocolMismatch(f"the daemon answers {count} items of {len(batch)}")


def _flat(payload: _Payload) -> Span:
    """The payload in its buffer: the runs back to back."""
    return whole(len(payload.memory))
