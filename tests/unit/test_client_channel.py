"""The client's end of a call channel, against a daemon whose every byte the test says."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvd.wire import calls as wire
from kvd.wire.errors import DeadlineExceeded, Draining, InvalidRequest, ProtocolMismatch, Unavailable
from kvd_client import channel as channel_module
from kvd_client.channel import CallChannel, FrameCalls
from kvd_client.debts import Riders
from tests.wait import wait_until

NAMESPACE = bytes(range(32))
KEYS = [bytes([number]) * 32 for number in range(1, 4)]
MAX_CHUNKS = 64


class House:
    """A channel, and the daemon's end of it."""

    def __init__(self) -> None:
        theirs, self.daemon = socket.socketpair()
        self.daemon.settimeout(10)
        self.owed: list[Riders] = []
        self.channel = CallChannel(theirs, lambda: self.owed.pop() if self.owed else Riders())
        self.channel.max_chunks = MAX_CHUNKS
        self.calls = FrameCalls(self.channel)

    def hear(self) -> tuple[wire.Head, wire.Request]:
        """The next request."""
        frame = b""
        while len(frame) < 4 or len(frame) < wire.frame_length(frame):
            frame += self.daemon.recv((wire.frame_length(frame) if len(frame) >= 4 else 4) - len(frame))
        return wire.unpack_request(frame)

    def serve(self, answer: Callable[[wire.Head, wire.Request], bytes]) -> threading.Thread:
        """Answers one request on a thread."""
        thread = threading.Thread(target=lambda: self.daemon.sendall(answer(*self.hear())))
        thread.start()
        return thread

    def renew(self, deadline_s: float = 10) -> list[bool]:
        return self.calls.renew([1, 2], time.monotonic() + deadline_s)


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.channel.close()
    house.daemon.close()


def renewed(head: wire.Head, request: object = None) -> bytes:
    return wire.pack_answer(wire.Op.RENEW, head.request_id, wire.pack_bytes([1, 0]))


def test_a_late_answer_is_thrown_away_and_the_next_call_gets_its_own(house: House) -> None:
    with pytest.raises(DeadlineExceeded):
        house.renew(0.01)
    late, _ = house.hear()
    thread = house.serve(lambda head, _: wire.pack_failure(wire.Op.RENEW, late.request_id, Draining()) + renewed(head))
    assert house.renew() == [True, False]
    thread.join(10)
    assert house.channel.alive


def test_an_answer_in_pieces_survives_deadlines_between_them(house: House) -> None:
    with pytest.raises(DeadlineExceeded):
        house.renew(0.01)
    late = renewed(house.hear()[0])
    for piece in (late[:3], late[3:9]):
        house.daemon.sendall(piece)
        with pytest.raises(DeadlineExceeded):
            house.renew(0.01)
        house.hear()
    thread = house.serve(lambda head, _: late[9:] + renewed(head))
    assert house.renew() == [True, False]
    thread.join(10)


def test_a_request_that_did_not_go_whole_keeps_its_deadline_and_goes_on_later(house: House) -> None:
    # As small as the kernel lets it be: the frame does not fit.
    house.channel._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    keys = [bytes([i]) * 32 for i in range(MAX_CHUNKS)] * 4
    house.channel.max_chunks = len(keys)
    with pytest.raises(DeadlineExceeded):
        house.calls.lookup(NAMESPACE, 1, keys, 0, False, time.monotonic() + 0.01)
    assert house.channel._unsent, "the test has not filled the socket"
    with pytest.raises(DeadlineExceeded):
        house.renew(0.01)
    heard: list[wire.Request] = []

    def daemon() -> None:
        heard.append(house.hear()[1])
        head, request = house.hear()
        heard.append(request)
        house.daemon.sendall(renewed(head))

    thread = threading.Thread(target=daemon)
    thread.start()
    assert house.renew() == [True, False]
    thread.join(10)
    assert heard == [wire.Lookup(NAMESPACE, 1, keys), wire.Renew([1, 2])]


def test_who_comes_second_waits_no_longer_than_asked(house: House) -> None:
    errors: list[Exception] = []

    def first() -> None:
        try:
            house.renew(60)
        except Unavailable as error:
            errors.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    house.hear()
    with pytest.raises(DeadlineExceeded, match="earlier call"):
        house.renew(0.01)
    house.channel.close()
    thread.join(10)
    assert not thread.is_alive(), "who waits is told that the session has ended"
    assert type(errors[0]) is Unavailable
    with pytest.raises(Unavailable):
        house.renew(60)


def test_the_end_of_the_daemon_ends_the_channel(house: House) -> None:
    thread = threading.Thread(target=lambda: (house.hear(), house.daemon.close()))
    thread.start()
    with pytest.raises(Unavailable) as caught:
        house.renew(60)
    thread.join(10)
    assert not isinstance(caught.value, DeadlineExceeded)
    assert not house.channel.alive
    with pytest.raises(Unavailable):
        house.renew(60)


BREACHES: list[Callable[[wire.Head], bytes]] = [
    lambda head: struct.pack("<I", 1 << 31) + bytes(60),
    lambda head: struct.pack("<I", 3) + bytes(60),
    lambda head: wire.pack_answer(wire.Op.RENEW, head.request_id + 1, wire.pack_bytes([1, 1])),
    lambda head: wire.pack_answer(wire.Op.RELEASE, head.request_id, wire.pack_count(1)),
    lambda head: wire.pack_answer(wire.Op.RENEW, head.request_id, b"\x02\x00\x00\x00\x01"),
]


@pytest.mark.parametrize("breach", BREACHES, ids=["long", "short", "future", "other op", "body"])
def test_a_daemon_that_breaks_the_protocol_is_not_asked_again(
    house: House, breach: Callable[[wire.Head], bytes]
) -> None:
    thread = house.serve(lambda head, _: breach(head))
    with pytest.raises(Unavailable, match="breaks the protocol"):
        house.renew(60)
    thread.join(10)
    assert not house.channel.alive


def test_an_error_that_the_daemon_answers_ends_nothing(house: House) -> None:
    thread = house.serve(lambda head, _: wire.pack_failure(wire.Op.RENEW, head.request_id, Draining("later")))
    with pytest.raises(Draining, match="later"):
        house.renew()
    thread.join(10)
    thread = house.serve(lambda head, _: wire.pack_answer(wire.Op.RENEW, head.request_id, wire.pack_bytes([1])))
    with pytest.raises(ProtocolMismatch):  # one lease of two
        house.renew()
    thread.join(10)
    assert house.channel.alive


def test_what_no_frame_can_say_is_refused_before_it_is_sent(house: House) -> None:
    soon = time.monotonic() + 60
    refused: list[Callable[[], Any]] = [
        lambda: house.calls.lookup(NAMESPACE, 1, [b"short"], 0, False, soon),
        lambda: house.calls.lookup(NAMESPACE, 1, KEYS, -1, False, soon),
        lambda: house.calls.reserve(NAMESPACE, 1, [(KEYS[0], b"short")], soon),
        lambda: house.calls.abort(NAMESPACE, 1, KEYS * 10_000, soon),
        lambda: house.calls.renew(range(100_000), soon),
    ]
    for call in refused:
        with pytest.raises(InvalidRequest):
            call()
    thread = house.serve(renewed)
    assert house.renew() == [True, False]
    thread.join(10)


def test_what_is_owed_is_told_once_with_the_next_request(house: House) -> None:
    house.owed = [Riders((3, 200), [7, 9])]
    heads: list[wire.Head] = []

    def answer(head: wire.Head, request: wire.Request) -> bytes:
        heads.append(head)
        return renewed(head)

    for _ in range(2):
        thread = house.serve(answer)
        house.renew()
        thread.join(10)
    assert [head[2:] for head in heads] == [(3, 200, (7, 9)), (0, 0, ())]


def test_a_call_that_an_exception_interrupts_ends_the_channel(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: CallChannel, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(channel_module.CallChannel, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        house.renew()
    assert not house.channel.alive, "nobody knows what has been sent and read"


def test_a_forked_process_neither_speaks_nor_ends_for_its_parent(house: House) -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if house.channel.alive:
                os._exit(2)
            try:
                house.renew(60)
            except Unavailable:
                status = 0
            house.channel.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    thread = house.serve(renewed)
    assert house.renew() == [True, False]
    thread.join(10)


def test_closing_gives_the_descriptor_back(house: House) -> None:
    assert house.channel._socket.fileno() >= 0
    house.channel.close()
    house.channel.close()
    wait_until(lambda: house.channel._socket.fileno() == -1)
    assert house.daemon.recv(1) == b""
