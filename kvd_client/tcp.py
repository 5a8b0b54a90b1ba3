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
    FLAG_NO_CHECKSUM,
    HELLO,
    HELLO_REPLY,
    ITEM_STATUS,
    MAGIC,
    MAX_REQUEST_BYTES,
    MAX_RUNS,
    REPLY,
    VERSION,
    HelloStatus,
    Item,
    ItemStatus,
    Op,
    Purpose,
    pack_request,
)
from kvd.wire.spans import whole
from kvd.wire.stream import Payload, Stream
from kvd_client.path import Attachment, Kind, Piece

log = logging.getLogger(__name__)

#: Payload of one request: little enough to spread a load evenly over the connections.
BATCH_BYTES = 16 << 20
#: Less than this is not worth a second connection: each part of a request costs both sides a hand-over between threads.
MIN_BATCH_BYTES = 8 << 20
#: Items of one request: its table fits into the daemon's socket buffer, so that it is sent without waiting for anybody
#: while the answer to the request before is still to be read.
BATCH_ITEMS = 256
#: Requests on the way on one connection: the next one is there when the daemon has done the last.
REQUESTS_UNDER_WAY = 2

_REFUSALS: dict[int, type[KvdError]] = {
    HelloStatus.BAD_VERSION: ProtocolMismatch,
    HelloStatus.UNKNOWN_SESSION: SessionUnknown,
    HelloStatus.TOO_MANY: LimitReached,
}


class _Move:
    """A piece to be moved: the item that asks for it, and its buffer as bytes."""

    __slots__ = ("index", "item", "payload")

    def __init__(self, index: int, piece: Piece, *, writable: bool) -> None:
        location, span, buffer = piece
        memory = memoryview(buffer).cast("B")
        if len(memory) != span.size:
            raise ValueError(f"a buffer of {len(memory)} bytes for a span of {span.size}")
        if writable and memory.readonly:
            raise BufferError("the buffer is not writable")
        self.index = index
        self.item = Item(location.segment, location.offset, location.generation, span)
        self.payload = Payload(memory, whole(len(memory)))  # in the buffer the runs are back to back

    @property
    def runs(self) -> int:
        span = self.item.span
        return 1 if span.stride == span.run else span.count


class TcpPath:
    """A data path over the network; see ``DataPath``. Every wait on a socket ends with the caller's deadline."""

    kind: Kind = "tcp"
    #: Whether payloads carry checksums. Off only to measure what they cost.
    checked = True

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
        moves = [_Move(i, piece, writable=op == Op.READ) for i, piece in enumerate(pieces)]
        outcome = [False] * len(moves)
        work = deque(_cut(moves, self._attachment.connections))

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

    def _carry(self, op: Op, lease_id: int, work: deque[list[_Move]], outcome: list[bool], deadline: float) -> None:
        """Carries batches of ``work`` on one connection until there are none left or the connection fails."""
        stream = self._borrow(deadline)
        if stream is None:
            return
        asked: deque[list[_Move]] = deque()
        usable = False
        try:
            while not self._lost:
                while work and len(asked) < REQUESTS_UNDER_WAY:
                    try:
                        batch = work.popleft()
                    except IndexError:
                        break  # another connection was faster
                    self._ask(stream, op, lease_id, batch, deadline)
                    asked.append(batch)
                if not asked:
                    break
                batch = asked.popleft()
                for move, status in zip(batch, self._answers(stream, op, batch, deadline), strict=True):
                    outcome[move.index] = status == ItemStatus.OK
                    if status == ItemStatus.CHECKSUM:
                        self._count_mismatch(op, move)
            usable = not asked
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

    def _count_mismatch(self, op: Op, move: _Move) -> None:
        with self._lock:
            self._checksum_failures += 1
        log.warning("checksum mismatch: %d bytes of a %s are not used", move.item.span.size, op.name.lower())

    def _ask(self, stream: Stream, op: Op, lease_id: int, batch: list[_Move], deadline: float) -> None:
        """Sends the request for a batch, and what it writes."""
        flags = 0 if self.checked else FLAG_NO_CHECKSUM
        head = pack_request(op, lease_id, [move.item for move in batch], flags)
        payloads = [move.payload for move in batch] if op == Op.WRITE else []
        stream.send_payloads(head, payloads, deadline, checked=self.checked)

    def _answers(self, stream: Stream, op: Op, batch: list[_Move], deadline: float) -> Iterator[int]:
        """Receives the answer to a batch, and what it reads; the ItemStatus of each move as soon as it is known."""
        _, _, count = REPLY.unpack(stream.receive(REPLY.size, deadline))
        if count != len(batch):
            raise ProtocolMismatch(f"the daemon answers {count} items of {len(batch)}")
        table = stream.receive(ITEM_STATUS.size * count, deadline)
        statuses = [status for (status,) in ITEM_STATUS.iter_unpack(table)]
        if op == Op.WRITE:
            yield from statuses
            return
        coming = [move.payload for move, status in zip(batch, statuses, strict=True) if status == ItemStatus.OK]
        arriving = stream.receive_payloads(coming, deadline, checked=self.checked)
        for status in statuses:
            yield ItemStatus.CHECKSUM if status == ItemStatus.OK and not next(arriving).intact else status


def open_call_connection(attachment: Attachment, deadline: float) -> socket.socket:
    """A connection for the calls of the session. Raises as ``open_path`` does."""
    return _connect(attachment, deadline, Purpose.CALLS).release()


def _connect(attachment: Attachment, deadline: float, purpose: Purpose = Purpose.DATA) -> Stream:
    where = f"the data plane at {attachment.address} port {attachment.port}"
    connection = None
    try:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("the deadline has passed")
        connection = socket.create_connection((attachment.address, attachment.port), remaining_s)
        stream = Stream(connection)
        stream.send([memoryview(HELLO.pack(MAGIC, VERSION, purpose, attachment.token))], deadline)
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


def _cut(moves: Sequence[_Move], connections: int) -> Iterator[list[_Move]]:
    """Batches for one request each, in order. What no request can carry is left out, and so fails."""
    total_bytes = sum(move.item.span.size for move in moves)
    goal_bytes = min(BATCH_BYTES, max(MIN_BATCH_BYTES, total_bytes // connections))
    batch: list[_Move] = []
    batch_bytes = batch_runs = 0
    for move in moves:
        span, runs = move.item.span, move.runs
        if span.size > MAX_REQUEST_BYTES or runs > MAX_RUNS or not span.fits(1 << 63):
            log.warning("%s is more than a data connection carries at a time", span)
            continue
        full = batch_bytes + span.size > goal_bytes or batch_runs + runs > MAX_RUNS or len(batch) == BATCH_ITEMS
        if batch and full:
            yield batch
            batch, batch_bytes, batch_runs = [], 0, 0
        batch.append(move)
        batch_bytes += span.size
        batch_runs += runs
    if batch:
        yield batch
