"""Who goes next."""

from __future__ import annotations

import threading
import time

import pytest

from kvd.spill.queues import DriveQueue, SealQueue
from kvd.types import ROOT, Move, Order, Place, Read, Seal, Verify, Write
from tests.unit.spill.harness import key, namespace

SPACE = namespace()
PLACE = Place(0, 0, 4096, 8192, 1, 1)


def read(ticket: int) -> Read:
    return Read(ticket, SPACE, key(ticket), ROOT, PLACE, 0)


def write(ticket: int) -> Write:
    return Write(ticket, SPACE, key(ticket), ROOT, 0, 0, None, PLACE)


def move(ticket: int) -> Move:
    return Move(ticket, SPACE, key(ticket), ROOT, PLACE, PLACE)


class Taker:
    """A writer that takes one order."""

    def __init__(self, queue: DriveQueue) -> None:
        self.taken: list[Order | None] = []
        self.thread = threading.Thread(target=lambda: self.taken.append(queue.take_write()), daemon=True)
        self.thread.start()


def test_a_write_waits_while_reads_are_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvd.spill.queues.WRITE_PATIENCE_S", 30.0)
    queue = DriveQueue(1)
    queue.put(read(1))
    queue.put(read(2))
    queue.put(write(3))
    writer = Taker(queue)
    assert queue.take_read() == read(1)
    writer.thread.join(0.05)
    assert writer.taken == []
    assert queue.take_read() == read(2)
    writer.thread.join(10)
    assert writer.taken == [write(3)]


def test_a_write_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvd.spill.queues.WRITE_PATIENCE_S", 0.05)
    queue = DriveQueue(1)
    queue.put(read(1))
    queue.put(write(2))
    begin = time.monotonic()
    assert queue.take_write() == write(2)
    assert time.monotonic() - begin >= 0.05


def test_moves_come_after_writes_and_leave_writers_free() -> None:
    queue = DriveQueue(1)
    for order in (move(1), move(2), write(3)):
        queue.put(order)
    assert queue.take_write() == write(3)
    assert queue.take_write() == move(1)
    writer = Taker(queue)
    writer.thread.join(0.05)
    assert writer.taken == []  # a second move would leave no writer for writes
    queue.put(write(4))
    writer.thread.join(10)
    assert writer.taken == [write(4)]
    queue.moved()
    assert queue.take_write() == move(2)


def test_orders_of_a_kind_keep_their_order() -> None:
    queue = DriveQueue(8)
    for ticket in range(5):
        queue.put(read(ticket))
        queue.put(write(10 + ticket))
    assert [queue.take_read() for _ in range(5)] == [read(ticket) for ticket in range(5)]
    assert [queue.take_write() for _ in range(5)] == [write(10 + ticket) for ticket in range(5)]


def test_what_waits_can_be_taken_out_and_nothing_comes_in_after_the_end() -> None:
    queue = DriveQueue(1)
    for order in (read(1), write(2), move(3)):
        queue.put(order)
    assert len(queue) == 3
    assert queue.drain() == [read(1), write(2), move(3)]
    assert len(queue) == 0
    writer = Taker(queue)
    queue.put(read(4))
    assert queue.close() == [read(4)]
    writer.thread.join(10)
    assert writer.taken == [None] and queue.take_read() is None and queue.take_write() is None
    assert not queue.put(read(5)) and len(queue) == 0


def test_what_was_found_in_the_pool_is_checked_before_new_chunks_are_sealed() -> None:
    queue = SealQueue()
    seal, verify = Seal(1, 0, SPACE, False), Verify(2, 0, 10, 0)
    queue.put(seal)
    queue.put(verify)
    assert len(queue) == 2
    assert queue.take() == verify
    assert queue.take() == seal
    queue.put(seal)
    assert queue.close() == [seal] and queue.take() is None and not queue.put(verify)
