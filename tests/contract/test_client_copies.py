"""No copy is taken for a chunk when its slot, its bytes or its deadline have gone meanwhile."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import grpc
import pytest

from kvd.wire.pb import kvd_pb2, kvd_pb2_grpc
from kvd_client import (
    Client,
    Location,
    Piece,
    StoreOutcome,
    open_path,
    whole,
)
from kvd_client.session import Session
from tests.contract.clients import (
    CHUNK_BYTES,
    buffers,
    chained,
    client_of,
    namespace_of,
    payloads,
    prefix,
    soon,
    wait_for_no_writes,
)
from tests.daemon import Daemon
from tests.proxy import Proxy
from tests.wait import wait_until


def test_an_old_location_is_neither_read_nor_written(client: Client) -> None:
    namespace, keys, data = namespace_of(client), prefix(1), payloads(1)
    client.store(namespace, chained(keys), data)
    with client.lookup(namespace, keys) as lease:
        (location,) = lease.locations
        older = location._replace(generation=location.generation - 1)
        for bad in (older, Location(99, 0, 1), location._replace(offset=location.offset + 8)):
            assert client.path().read(lease.lease_id, [Piece(bad, whole(CHUNK_BYTES), buffers(1)[0])], soon()) == [
                False
            ]
            assert client.path().write(lease.lease_id, [Piece(bad, whole(CHUNK_BYTES), data[0])], soon()) == [False]
        out = buffers(1)
        assert client.path().read(lease.lease_id, [Piece(location, whole(CHUNK_BYTES), out[0])], soon()) == [True]
        assert out == data


def test_a_copy_after_its_deadline_is_not_begun(client: Client) -> None:
    namespace, keys, data = namespace_of(client), prefix(1), payloads(1)
    client.store(namespace, chained(keys), data)
    with client.lookup(namespace, keys) as lease:
        pieces = [Piece(lease.locations[0], whole(CHUNK_BYTES), buffers(1)[0])]
        assert client.path().read(lease.lease_id, pieces, time.monotonic() - 1) == [False]
    assert client.load(namespace, keys, buffers(1), timeout_s=0) == 0


def test_a_view_is_the_slot_itself(daemon: Daemon) -> None:
    with client_of(daemon, "shm") as client:
        namespace, keys, data = namespace_of(client), prefix(1), payloads(1)
        with client.reserve(namespace, chained(keys)) as lease:
            location = lease.results[0].location
            assert location is not None
            view = client.path().view(location, CHUNK_BYTES)
            assert view is not None
            view[:] = data[0]
            lease.commit(keys)
        out = buffers(1)
        assert client.load(namespace, keys, out) == 1
        assert out == data
        assert client.path().intact([location]) == [True]
        assert client.path().view(Location(0, 1 << 40, 1), 1) is None
        assert client.path().view(Location(5, 0, 1), 1) is None


def test_a_chunk_that_is_gone_is_not_intact(daemon: Daemon) -> None:
    with client_of(daemon, "shm") as client:
        namespace, keys = namespace_of(client), prefix(1)
        with client.reserve(namespace, chained(keys)) as lease:
            location = lease.results[0].location
            assert location is not None
            assert client.path().intact([location]) == [True]
        wait_until(lambda: client.path().intact([location]) == [False], what="the slot to be given back")
    assert daemon.audit() == []


def test_a_chunk_that_goes_away_during_the_copy_is_a_miss(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    with client_of(daemon, "shm") as client:
        namespace, keys, data = namespace_of(client), prefix(3), payloads(3)
        assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 3
        lease = client.lookup(namespace, keys)
        copy = ctypes.memmove

        def copy_while_the_lease_ends(*arguments: Any) -> None:
            copy(*arguments)
            lease.release()
            wait_until(dropped, what="the chunks to be gone")

        def dropped() -> bool:
            with grpc.insecure_channel(daemon.unix_endpoint) as channel:
                stub: Any = kvd_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
                stub.Drop(kvd_pb2.DropRequest(), timeout=10)
            return not any(client.path().intact(lease.locations))

        pieces = [Piece(at, whole(CHUNK_BYTES), each) for at, each in zip(lease.locations, buffers(3), strict=True)]
        monkeypatch.setattr("kvd_client.shm.ctypes.memmove", copy_while_the_lease_ends)
        outcome = client.path().read(lease.lease_id, pieces, soon())
        monkeypatch.undo()
        assert outcome == [False] * 3
        assert client.load(namespace, keys, buffers(3)) == 0
    assert daemon.audit() == []


def test_a_byte_flipped_on_the_wire_is_a_miss_and_counted(daemon: Daemon) -> None:
    host, port = daemon.data_endpoint.rsplit(":", 1)
    with client_of(daemon, "tcp") as client, Proxy((host, int(port))) as proxy:
        namespace, keys, data = namespace_of(client), prefix(1), payloads(1)
        assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED]
        path = open_path(client.attachment()._replace(port=proxy.port))
        out = buffers(1)
        with client.lookup(namespace, keys) as lease:
            pieces = [Piece(lease.locations[0], whole(CHUNK_BYTES), out[0])]
            proxy.flip("down")
            assert path.read(lease.lease_id, pieces, soon()) == [False]
            assert path.checksum_failures == 1
            assert path.read(lease.lease_id, pieces, soon()) == [True]
            assert out == data
        path.close()
    assert daemon.audit() == []


def test_a_byte_flipped_on_the_way_to_the_daemon_is_not_stored(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    host, port = daemon.data_endpoint.rsplit(":", 1)
    with client_of(daemon, "tcp") as client, Proxy((host, int(port))) as proxy:
        honest = Session.attachment
        monkeypatch.setattr(Session, "attachment", lambda session: honest(session)._replace(port=proxy.port))
        namespace, keys, data = namespace_of(client), prefix(3), payloads(3)
        proxy.flip("up")
        outcomes = client.store(namespace, chained(keys), data)
        assert proxy.flips_left == 0
        assert StoreOutcome.FAILED in outcomes
        stored = outcomes.index(StoreOutcome.FAILED)
        assert client.path().checksum_failures == 1
        assert client.load(namespace, keys, buffers(3)) == stored, "what did not arrive was said to be stored"
        assert client.store(namespace, chained(keys), data)[stored:] == [StoreOutcome.STORED] * (3 - stored)
        out = buffers(3)
        assert client.load(namespace, keys, out) == 3
        assert out == data
    wait_for_no_writes(daemon)
    assert daemon.audit() == []
