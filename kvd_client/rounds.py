"""A store in rounds: while one is copied, a thread reserves the next and commits the one before."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from typing import TYPE_CHECKING

from kvd.wire.chunks import CommitStatus, ReserveStatus
from kvd.wire.spans import whole
from kvd_client.leases import WriteLease
from kvd_client.path import Kind, Piece

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Bytes of a round. Early chunks are visible early, and a long store does not need all its room at once; but over TCP a
#: round costs as much as copying a few megabytes.
ROUND_BYTES: dict[Kind, int] = {"shm": 32 << 20, "tcp": 256 << 20}


class StoreOutcome(Enum):
    """What became of one chunk of a ``store``."""

    STORED = "stored"  # a lookup finds it
    WAITING = "waiting"  # complete; visible as soon as its parent, which somebody else is writing
    PRESENT = "present"  # was stored already
    BUSY = "busy"  # somebody else is writing it
    NO_ROOM = "no room"
    NO_PARENT = "no parent"
    FAILED = "failed"  # did not arrive, or the daemon is not there


_REFUSED = {
    ReserveStatus.PRESENT: StoreOutcome.PRESENT,
    ReserveStatus.BUSY: StoreOutcome.BUSY,
    ReserveStatus.NO_ROOM: StoreOutcome.NO_ROOM,
    ReserveStatus.NO_PARENT: StoreOutcome.NO_PARENT,
}
_COMMITTED = {CommitStatus.STORED: StoreOutcome.STORED, CommitStatus.WAITING_PARENT: StoreOutcome.WAITING}


def store(
    reserve: Callable[[slice], WriteLease],
    keys: Sequence[bytes],
    buffers: Sequence[Buffer],
    chunk_bytes: int,
    round_chunks: int,
    deadline: float,
    outcomes: list[StoreOutcome],
) -> None:
    """Stores ``keys``, one at least, from ``buffers``. ``reserve`` asks for the slots of some of them.

    ``outcomes`` has FAILED for each and gets what became of it, by the rounds: when this raises, as calls do, what it
    says of the rounds that are over is right. Of the others nothing stays reserved.
    """
    rounds = [slice(first, first + round_chunks) for first in range(0, len(keys), round_chunks)]
    # On the way out the calls under way end first, and then what nobody has committed is given up.
    with contextlib.ExitStack() as leases, ThreadPoolExecutor(1, "kvd-store") as beside:

        def begin(part: slice) -> WriteLease:
            return leases.enter_context(reserve(part))

        def end(lease: WriteLease, part: slice, written: dict[int, bool]) -> None:
            outcomes[part] = _end(lease, keys[part], written, deadline)

        lease, ending = begin(rounds[0]), list[Future[None]]()
        for part, following in zip(rounds, [*rounds[1:], None], strict=True):
            ahead = None if following is None else beside.submit(begin, following)
            written = _copy(lease, buffers[part], chunk_bytes, deadline)
            if ahead is not None:
                ending.append(beside.submit(end, lease, part, written))
                lease = ahead.result()
                if len(ending) > 1:
                    ending.pop(0).result()  # is there: the thread does one thing after the other
                continue
            for one in ending:  # the last is not to be committed before its parents
                one.result()
            end(lease, part, written)


def _copy(lease: WriteLease, buffers: Sequence[Buffer], chunk_bytes: int, deadline: float) -> dict[int, bool]:
    """Fills the slots that were granted: by index, whether the bytes are there."""
    granted = [(i, result.location) for i, result in enumerate(lease.results) if result.location is not None]
    if not granted:
        return {}
    span = whole(chunk_bytes)
    pieces = [Piece(location, span, buffers[i]) for i, location in granted]
    written = lease.session.path(deadline).write(lease.lease_id, pieces, deadline)
    return {i: good for (i, _), good in zip(granted, written, strict=True)}


def _end(lease: WriteLease, keys: Sequence[bytes], written: dict[int, bool], deadline: float) -> list[StoreOutcome]:
    """Commits what was written, and gives up the rest: what became of each of a round's ``keys``."""
    outcomes = [_REFUSED.get(result.status, StoreOutcome.FAILED) for result in lease.results]
    # What did not arrive goes first, so that nothing is committed under a parent that is about to vanish.
    lost = [keys[i] for i, good in written.items() if not good]
    if lost:
        lease.abort(lost, timeout_s=deadline - time.monotonic())
    there = [i for i, good in written.items() if good]
    if there:
        statuses = lease.commit([keys[i] for i in there], timeout_s=deadline - time.monotonic())
        for i, status in zip(there, statuses, strict=True):
            outcomes[i] = _COMMITTED.get(status, StoreOutcome.FAILED)
    return outcomes
