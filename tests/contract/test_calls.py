"""Frames on the local plane: the same answers as over gRPC, and no more trust in who sends them."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvd.store import MAX_MISSED_LOOKUPS
from kvd.wire import calls as wire
from kvd.wire import errors, lifeline
from kvd.wire.chunks import ROOT, Location, ReserveResult, Stripe
from kvd.wire.pb import kvd_pb2 as pb
from kvd_client import Client, ProtocolMismatch, StoreOutcome
from kvd_client import keeper as keeper_module
from kvd_client.channel import CallChannel, FrameCalls
from kvd_client.debts import Riders
from tests.contract.clients import (
    WAYS,
    buffers,
    chained,
    client_of,
    namespace_of,
    payloads,
    prefix,
)
from tests.contract.grpc_calls import GrpcCalls
from tests.daemon import Daemon
from tests.raw import RawLifeline, RawSession
from tests.wait import wait_until

KEYS = [bytes([number]) * 32 for number in range(1, 4)]


@pytest.fixture
def session(daemon: Daemon) -> Iterator[RawSession]:
    with RawSession(daemon.unix_endpoint, daemon.socket) as session:
        yield session


def line_of(session: RawSession) -> RawLifeline:
    assert session.lifeline is not None
    return session.lifeline


def body(answer: memoryview | errors.KvdError) -> memoryview:
    assert isinstance(answer, memoryview), answer
    return answer


# ---------------------------------------------------------------- the same answers


class Way:
    """One way to ask, in a session and a namespace of its own. Slots are named by the chunk that they were granted to,
    so that two ways can be compared."""

    def __init__(self, session: RawSession, calls: FrameCalls | GrpcCalls, name: str) -> None:
        self.calls = calls
        self.namespace = session.open_namespace(name)
        self._owners: dict[Location, bytes] = {}

    def ask(self, step: str, *what: Any) -> object:
        """The answer, or the error, in a form that is the same for all ways."""
        deadline = time.monotonic() + 20
        try:
            if step in ("release", "renew"):
                return getattr(self.calls, step)(*what, deadline)
            answer = getattr(self.calls, step)(self.namespace, *what, deadline)
        except errors.KvdError as error:
            return type(error), str(error)
        if step == "reserve":
            return [self._granted(key, result) for (key, _), result in zip(what[1], answer, strict=True)]
        if step == "lookup":
            return [self._owners[at] for at in answer.locations], answer.promoting, answer.writing
        return answer

    def _granted(self, key: bytes, result: ReserveResult) -> object:
        if result.location is not None:
            self._owners[result.location] = key
        return result.status


def steps(dice: random.Random, count: int) -> Iterator[tuple[Any, ...]]:
    """A life: paths of a tree of chunks are reserved, committed, given up, looked up, in every order, wrongly too."""
    tree = {bytes([number]) * 32: bytes([number // 2]) * 32 if number > 1 else ROOT for number in range(1, 64)}
    stripes = [Stripe(0, 1, 0, 1)]

    def path() -> list[bytes]:
        found = [dice.choice(list(tree))]
        while tree[found[0]] != ROOT:
            found.insert(0, tree[found[0]])
        return found[dice.randrange(2) * dice.randrange(len(found)) :]

    def lease() -> int:
        return dice.randint(1, 12)

    for _ in range(count):
        keys = path()
        match dice.randrange(8):
            case 0 | 1:
                yield "lookup", lease(), keys, dice.randint(0, len(keys) + 1), dice.random() < 0.2
            case 2 | 3:
                yield "reserve", lease(), [(key, tree[key]) for key in keys]
            case 4:
                wrong = [Stripe(0, 1, 0, 9)] if dice.random() < 0.2 else stripes
                yield "commit", lease(), keys, dice.choice([(), wrong])
            case 5:
                yield "abort", lease(), keys if dice.random() < 0.7 else []
            case 6:
                yield "release", [lease() for _ in range(dice.randrange(4))]
            case 7:
                yield "renew", sorted({lease() for _ in range(dice.randrange(4))})


@pytest.mark.parametrize("seed", range(4))
def test_frames_and_grpc_give_the_same_answers(daemon: Daemon, seed: int) -> None:
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(RawSession(daemon.unix_endpoint, daemon.socket)) for _ in range(2)]
        connection = line_of(sessions[0]).channel
        assert connection is not None
        channel = CallChannel(connection.dup(), Riders)
        stack.callback(channel.close)
        channel.max_chunks = sessions[0].welcome.max_chunks_per_request
        grpc_calls = GrpcCalls(sessions[1].channel, sessions[1].welcome.session_token)
        frames = Way(sessions[0], FrameCalls(channel), f"frames {seed}")
        over_grpc = Way(sessions[1], grpc_calls, f"grpc {seed}")
        kinds: set[object] = set()
        for step in steps(random.Random(seed), 400):
            answers = frames.ask(*step), over_grpc.ask(*step)
            if step[0] not in ("abort", "release"):  # these answer nothing to the client
                assert answers[0] == answers[1], step
            kinds.add((step[0], answers[0][0] if isinstance(answers[0], tuple) and step[0] != "lookup" else "answered"))
        assert {(name, "answered") for name in ("lookup", "reserve", "commit", "renew")} <= kinds
        assert ("commit", errors.InvalidRequest) in kinds
        for name in ("abort", "release"):
            assert (name, "answered") in kinds


@pytest.mark.parametrize("way", WAYS)
def test_every_call_of_a_client_is_counted_once(daemon: Daemon, way: str) -> None:
    with client_of(daemon, way) as client:
        namespace, keys, data, out = namespace_of(client, 4096), prefix(200), payloads(200, 4096), buffers(200, 4096)
        before = daemon.metrics()
        assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 200
        assert client.load(namespace, keys, out) == 200
        assert out == data
        after = daemon.metrics()
        for method in ("Reserve", "Commit", "Lookup"):
            name = f'kvd_requests_total{{code="OK",method="{method}"}}'
            assert after[name] == before.get(name, 0) + 1


# ---------------------------------------------------------------- who may ask


def test_a_channel_is_worth_nothing_before_its_lifeline_is_in_a_session_and_after(daemon: Daemon) -> None:
    line = RawLifeline(lifeline.socket_path(daemon.socket))
    try:
        ticket = line.hello().ticket
        assert type(line.ask(wire.Renew())) is errors.SessionUnknown
        hello = pb.Hello(protocol_min=1, protocol_max=1, ticket=ticket)
        with RawSession(daemon.unix_endpoint, hello=hello) as session:
            assert list(wire.unpack_bytes(body(line.ask(wire.Renew())))) == []
            session.end_stream()
            wait_until(lambda: type(line.ask(wire.Renew())) is errors.SessionUnknown, what="the session to end")
    finally:
        line.close()


def test_a_worker_asks_in_the_name_of_its_session(daemon: Daemon, session: RawSession) -> None:
    worker = RawLifeline(lifeline.socket_path(daemon.socket))
    try:
        assert worker.hello(lifeline.Kind.ATTACH, session.welcome.session_token).status == lifeline.Status.OK
        namespace = session.open_namespace("worker")
        session.reserve(namespace, KEYS)
        committed = wire.unpack_bytes(body(worker.ask(wire.Commit(namespace, 1, KEYS))))
        assert list(committed) == [1, 1, 1]
    finally:
        worker.close()
    assert list(session.lookup(namespace, KEYS).offsets), "the worker's death ends nothing else"


def test_a_channel_ends_with_its_lifeline_and_not_the_other_way_round(daemon: Daemon, session: RawSession) -> None:
    worker = RawLifeline(lifeline.socket_path(daemon.socket))
    try:
        worker.hello(lifeline.Kind.ATTACH, session.welcome.session_token)
        channel = line_of(session).channel
        assert channel is not None
        channel.shutdown(socket.SHUT_RDWR)
        assert channel.recv(1) == b""
        assert wire.unpack_count(body(worker.ask(wire.Release([])))) == 0  # the daemon has had its turn
        assert daemon.stats().sessions[0].members == 2, "only the lifeline's end is a proof"
        worker.socket.close()
        with pytest.raises(ConnectionError):
            worker.answer()
        assert daemon.stats().sessions[0].members == 1
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("kind", "version"), [(lifeline.Kind.ATTACH, lifeline.VERSION), (lifeline.Kind.OPEN, 2)], ids=["token", "version"]
)
def test_who_is_refused_gets_no_channel(daemon: Daemon, kind: lifeline.Kind, version: int) -> None:
    line = RawLifeline(lifeline.socket_path(daemon.socket))
    try:
        welcomed = line.hello(kind, bytes(16), version)
        assert welcomed.status != lifeline.Status.OK
        assert (welcomed.descriptors, line.channel) == ([], None)
        assert line.at_end()
    finally:
        line.close()


def test_a_client_of_another_lifeline_is_told_so(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "VERSION", lifeline.VERSION + 1)
    with Client(daemon.unix_endpoint) as client, pytest.raises(ProtocolMismatch):
        client.connect(20)


# ---------------------------------------------------------------- what is sent


GARBAGE = {
    "long": struct.pack("<I", 1 << 30) + bytes(100),
    "longer than any request": struct.pack("<I", wire.max_request_bytes(4096) + 1),
    "short": struct.pack("<I", 3) + bytes(100),
    "no such operation": wire.REQUEST.pack(wire.REQUEST.size, 99, 0, 0, 1, 0, 0),
    "no such flag": wire.REQUEST.pack(wire.REQUEST.size, wire.Op.RENEW, 7, 0, 1, 0, 0),
    "more keys than there are": wire.pack_request(wire.Lookup(bytes(32), 1, KEYS), 1).replace(
        struct.pack("<I", 3), struct.pack("<I", 1 << 31), 1
    ),
}


@pytest.mark.parametrize("what", sorted(GARBAGE))
def test_what_is_no_frame_ends_that_channel_and_nothing_else(daemon: Daemon, session: RawSession, what: str) -> None:
    line = line_of(session)
    assert line.channel is not None
    line.channel.sendall(GARBAGE[what])
    with pytest.raises(ConnectionError):
        line.answer()
    assert daemon.stats().sessions[0].members == 1
    namespace = session.open_namespace("garbage")
    assert session.lookup(namespace, KEYS) == pb.LookupResponse()
    with client_of(daemon, "shm") as client:
        assert client.renew([]) == []


def test_what_the_books_refuse_is_an_answer(session: RawSession) -> None:
    namespace = session.open_namespace("refused")
    line = line_of(session)
    assert type(line.ask(wire.Lookup(bytes(32), 1, KEYS))) is errors.NamespaceUnknown
    assert type(line.ask(wire.Lookup(namespace, 1, KEYS, 4))) is errors.InvalidRequest
    assert type(line.ask(wire.Lookup(namespace, 1, [bytes(32)] * 5000))) is errors.InvalidRequest
    assert list(wire.unpack_bytes(body(line.ask(wire.Renew([1]))))) == [0]


def test_frames_may_come_in_any_pieces_and_are_answered_in_order(session: RawSession) -> None:
    line = line_of(session)
    assert line.channel is not None
    for byte in wire.pack_request(wire.Renew([5]), 1):
        line.channel.sendall(bytes([byte]))
    assert line.answer()[0] == 1
    line.channel.sendall(b"".join(wire.pack_request(wire.Renew([5]), number) for number in range(100)))
    assert [line.answer()[0] for _ in range(100)] == list(range(100))


def test_a_client_that_takes_no_answers_is_not_read_from_and_holds_nobody_up(
    daemon: Daemon, session: RawSession
) -> None:
    line = line_of(session)
    assert line.channel is not None
    frames = b"".join(wire.pack_request(wire.Renew(range(4000)), number) for number in range(400))
    sent = 0
    line.channel.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        while sent < len(frames):
            sent += line.channel.send(frames[sent:])
    assert sent < len(frames), "the daemon reads whatever comes"
    with client_of(daemon, "shm") as other:
        assert other.renew([]) == []
    line.channel.settimeout(10)
    writer = threading.Thread(target=line.channel.sendall, args=(frames[sent:],))
    writer.start()
    assert [line.answer()[0] for _ in range(400)] == list(range(400))
    writer.join(10)


# ---------------------------------------------------------------- misses


def test_misses_that_were_not_asked_are_counted(daemon: Daemon) -> None:
    def counters() -> list[int]:
        found = daemon.stats().counters
        return [found[name] for name in ("lookups", "asked_chunks", "miss_chunks", "hit_chunks")]

    before = counters()
    with client_of(daemon, "shm") as client:
        session = client._keeper.require()
        for chunks in (10, 20):
            session.note_miss(chunks)
        client.renew([])  # brings it along
        assert [now - then for now, then in zip(counters(), before, strict=True)] == [2, 30, 30, 0]
        session.note_miss(5)  # no call follows: the heartbeat brings it
        wait_until(lambda: counters()[0] == before[0] + 3, what="a heartbeat")
    with client_of(daemon, "tcp") as client:
        client._keeper.require().note_miss(7)
        wait_until(lambda: counters()[1] == before[1] + 42, what="a heartbeat")


@pytest.mark.parametrize("way", WAYS)
def test_a_release_goes_with_the_next_request(daemon: Daemon, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(keeper_module, "GATHER_S", 3600.0)  # none goes by itself
    with client_of(daemon, way) as client:
        namespace, keys = namespace_of(client), prefix(2)
        assert client.store(namespace, chained(keys), payloads(2)) == [StoreOutcome.STORED] * 2
        leases = [client.lookup(namespace, keys) for _ in range(3)]
        for lease in leases:
            lease.release()
        assert client.renew(leases) == [False] * 3


def test_misses_that_nobody_can_have_had_are_not_believed(daemon: Daemon, session: RawSession) -> None:
    line, before = line_of(session), daemon.stats().counters
    assert line.channel is not None
    line.channel.sendall(wire.pack_request(wire.Renew(), 1, (3, wire.MAX_MISSED)))
    line.channel.sendall(wire.pack_request(wire.Renew(), 2, (wire.MAX_MISSED, 0)))
    assert [line.answer()[0] for _ in range(2)] == [1, 2]
    after = daemon.stats().counters
    assert after["lookups"] - before["lookups"] == 3 + MAX_MISSED_LOOKUPS
    assert after["miss_chunks"] - before["miss_chunks"] == 3 * 4096
