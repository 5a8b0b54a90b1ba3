"""A client that was built against protocol 1, and knows nothing else, is served by today's daemon.

Its requests are recorded bytes. The answers are read with the field numbers that it knows, not with today's code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvd.wire import errors
from tests.daemon import Daemon
from tests.raw import RawSession

RECORDED = Path(__file__).parent / "recorded"
NAMESPACE = bytes.fromhex("306819d4726498ceaade89f3c71098d8baedae8b7efdd83ec1625ea5ba2e8efe")
GRANTED, STORED, PARTIAL, WAITING_PARENT = 1, 1, 2, 3


def recorded(name: str) -> bytes:
    return (RECORDED / f"{name}.bin").read_bytes()


def fields(message: bytes) -> dict[int, list[Any]]:
    """Field number to values, in order: integers, or bytes of whatever kind; a reader with no schema."""
    found: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        value: Any
        if kind == 0:
            value = varint()
        else:
            size = {1: 8, 5: 4}.get(kind) or varint()
            value, at = message[at : at + size], at + size
        found.setdefault(number, []).append(value)
    return found


def numbers(column: bytes) -> list[int]:
    """A packed column of fixed64."""
    return [int.from_bytes(column[at : at + 8], "little") for at in range(0, len(column), 8)]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon
        assert daemon.audit() == []
        assert "Traceback" not in daemon.log


def target(daemon: Daemon) -> str:
    return daemon.tcp_endpoint.removeprefix("tcp://")


def test_older_client_stores_and_finds_chunks(daemon: Daemon) -> None:
    with RawSession(target(daemon), hello=recorded("hello")) as session:
        welcome = fields(fields(session.raw_welcome)[1][0])
        assert welcome[1] == [1]  # protocol
        token = welcome[2][0]
        assert len(token) == 16
        assert welcome[3][0] > 0  # daemon id
        assert welcome[5][0] > 0  # heartbeat interval
        assert welcome[6][0] > 0  # read lease
        assert 0 < welcome[7][0] < 65536  # data port
        assert welcome[8][0] >= 3  # chunks per request
        assert welcome[9] == [b"default"]
        assert welcome[10][0] >= 65536  # largest chunk

        def call(method: str, name: str) -> dict[int, list[Any]]:
            return fields(session.raw_call(method, recorded(name), token))

        assert call("Kvd/OpenNamespace", "open_namespace") == {1: [NAMESPACE]}

        reserved = call("Kvd/Reserve", "reserve")
        assert reserved[1] == [bytes([GRANTED] * 3)]
        generations = numbers(reserved[3][0])
        assert len(numbers(reserved[2][0])) == len(set(generations)) == 3

        statuses = [fields(result)[1][0] for result in call("Kvd/Commit", "commit_stripes")[1]]
        assert statuses == [PARTIAL, WAITING_PARENT]
        statuses = [fields(result)[1][0] for result in call("Kvd/Commit", "commit_rest")[1]]
        assert statuses == [STORED]
        assert call("Kvd/Abort", "abort") == {1: [1]}  # the third chunk, which was never committed

        leased = call("Kvd/Lookup", "lookup")
        assert len(numbers(leased[1][0])) == 1
        assert numbers(leased[2][0]) == [generations[1]]  # the first is skipped, the third gone

        renewed = [fields(result) for result in call("Kvd/Renew", "renew")[1]]
        assert [(result[1], result.get(2)) for result in renewed] == [([11], [1]), ([12], None)]
        assert call("Kvd/Release", "release") == {1: [1]}

        stats = call("Kvd/Stats", "stats")
        assert stats[4] == [b"serving"]
        counters = {fields(entry)[1][0]: fields(entry).get(2, [0])[0] for entry in stats[9]}
        assert counters[b"stored_chunks"] >= 2
        assert call("Admin/Audit", "audit") == {}
        assert call("Admin/Drop", "drop") == {1: [2]}


def test_fields_and_notes_that_nobody_knows_yet_are_ignored(daemon: Daemon) -> None:
    with RawSession(target(daemon), hello=recorded("newer_hello")) as session:
        assert session.welcome.protocol == 1  # the highest that both speak
        session.send_raw(recorded("newer_note"))
        session.send_raw(recorded("heartbeat"))
        assert fields(session.raw_call("Kvd/OpenNamespace", recorded("newer_open_namespace"))) == {1: [NAMESPACE]}
        assert fields(session.raw_call("Kvd/Lookup", recorded("newer_lookup"))) == {}  # nothing there: a miss
        results = [fields(result) for result in fields(session.raw_call("Kvd/Renew", recorded("newer_renew")))[1]]
        assert [result[1] for result in results] == [[11], [12]]
        assert fields(session.raw_call("Kvd/Release", recorded("newer_release"))) == {}
        assert fields(session.raw_call("Kvd/Stats", recorded("newer_stats")))[4] == [b"serving"]


def test_bytes_that_are_no_message_are_refused_and_harm_nobody(daemon: Daemon) -> None:
    with RawSession(target(daemon), hello=recorded("hello")) as session:
        with pytest.raises(grpc.RpcError) as caught:
            session.raw_call("Kvd/Lookup", b"\xff\xff\xff\xff")
        assert type(errors.from_rpc_error(caught.value)) is errors.InvalidRequest
        assert fields(session.raw_call("Kvd/Stats", recorded("stats")))[4] == [b"serving"]
    with pytest.raises(grpc.RpcError) as caught:
        RawSession(target(daemon), hello=b"\xff\xff\xff\xff")
    assert type(errors.from_rpc_error(caught.value)) is errors.InvalidRequest
