"""What the client promises while the daemon is well, over shared memory and over TCP."""

from __future__ import annotations

import os
import threading

import pytest

from kvd_client import (
    ROOT,
    Client,
    CommitStatus,
    InvalidRequest,
    Piece,
    ReserveStatus,
    Span,
    StoreOutcome,
    Stripe,
    Unavailable,
    whole,
)
from tests.contract.clients import (
    CHUNK_BYTES,
    WAYS,
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
from tests.wait import wait_until


def test_shared_memory_is_picked_on_a_unix_socket_and_tcp_otherwise(daemon: Daemon) -> None:
    for way, kind in zip(WAYS, ["shm", "tcp", "tcp"], strict=True):
        with client_of(daemon, way) as client:
            assert client.path().kind == client.attachment().kind == kind
            assert client.info is not None
            assert client.info.kind == kind
    with pytest.raises(ValueError, match="Unix socket"):
        Client(daemon.tcp_endpoint, transport="shm")


def test_every_byte_makes_the_round_trip(client: Client) -> None:
    namespace, keys, data = namespace_of(client), prefix(20), payloads(20)
    assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 20
    out = buffers(20)
    assert client.load(namespace, keys, out) == 20
    assert out == data
    assert client.path().checksum_failures == 0


@pytest.mark.parametrize("chunk_bytes", [1, 4095, 4097, 3_000_001])
def test_chunks_of_any_size_make_the_round_trip(client: Client, chunk_bytes: int) -> None:
    namespace, keys, data = namespace_of(client, chunk_bytes), prefix(3), payloads(3, chunk_bytes)
    assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 3
    out = buffers(3, chunk_bytes)
    assert client.load(namespace, keys, out) == 3
    assert out == data


def test_one_clients_chunks_are_the_others_over_whatever_way(daemon: Daemon) -> None:
    with client_of(daemon, "shm") as local, client_of(daemon, "tcp") as distant:
        for writer, reader in ((local, distant), (distant, local)):
            namespace, keys, data = namespace_of(writer), prefix(4), payloads(4)
            assert writer.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 4
            out = buffers(4)
            assert reader.load(namespace, keys, out) == 4
            assert out == data
    assert daemon.audit() == []


def test_the_longest_prefix_is_loaded_and_no_more(client: Client) -> None:
    namespace, keys, data = namespace_of(client), prefix(5), payloads(5)
    client.store(namespace, chained(keys), data)
    assert client.load(namespace, [*keys[:3], *prefix(1), *keys[4:]], buffers(5)) == 3
    assert client.load(namespace, [*keys, *prefix(3)], buffers(8)) == 5
    assert client.load(namespace, prefix(3), buffers(3)) == 0
    assert client.load(namespace, [], []) == 0


def test_a_lookup_leases_what_the_caller_does_not_have_yet(daemon: Daemon, client: Client) -> None:
    namespace, keys, data = namespace_of(client), prefix(5), payloads(5)
    client.store(namespace, chained(keys), data)
    with client.lookup(namespace, keys, skip=3) as lease:
        assert len(lease) == 2
        assert lease.epoch == client.epoch
        out = buffers(2)
        pieces = [Piece(at, whole(CHUNK_BYTES), each) for at, each in zip(lease.locations, out, strict=True)]
        assert client.path().read(lease.lease_id, pieces, soon()) == [True, True]
        assert out == data[3:]
        assert lease.renew()
        assert client.renew([lease]) == [True]
    assert not lease.renew()
    assert len(client.lookup(namespace, keys, skip=5)) == 0
    wait_until(lambda: sum(s.read_leases for s in daemon.stats().sessions) == 0, what="the leases to be released")


def test_namespaces_do_not_see_each_other(client: Client) -> None:
    keys, data = prefix(2), payloads(2)
    client.store(namespace_of(client), chained(keys), data)
    assert client.load(namespace_of(client), keys, buffers(2)) == 0


def test_outcomes_are_told_per_chunk(client: Client) -> None:
    namespace, keys, data = namespace_of(client), prefix(4), payloads(4)
    assert client.store(namespace, chained(keys[:1]), data[:1]) == [StoreOutcome.STORED]
    with client.reserve(namespace, [(keys[1], keys[0])]) as lease:
        assert [result.status for result in lease.results] == [ReserveStatus.GRANTED]
        assert client.store(namespace, [*chained(keys[:3]), (keys[3], prefix(1)[0])], data) == [
            StoreOutcome.PRESENT,
            StoreOutcome.BUSY,
            StoreOutcome.WAITING,
            StoreOutcome.NO_PARENT,
        ]
        assert client.lookup(namespace, keys).writing > 0
        location = lease.results[0].location
        assert location is not None
        assert client.path().write(lease.lease_id, [Piece(location, whole(CHUNK_BYTES), data[1])], soon()) == [True]
        assert lease.commit([keys[1]]) == [CommitStatus.STORED]
    out = buffers(3)
    assert client.load(namespace, keys[:3], out) == 3
    assert out == data[:3]


def test_a_write_lease_ends_with_its_block(daemon: Daemon, client: Client) -> None:
    namespace, keys = namespace_of(client), prefix(3)
    with pytest.raises(RuntimeError, match="the copy failed"), client.reserve(namespace, chained(keys)) as lease:
        assert lease.held == set(keys)
        raise RuntimeError("the copy failed")
    assert not lease.held
    wait_for_no_writes(daemon)
    assert client.load(namespace, keys, buffers(3)) == 0
    assert client.store(namespace, chained(keys), payloads(3)) == [StoreOutcome.STORED] * 3


def test_chunks_can_be_aborted_one_by_one(client: Client) -> None:
    namespace, keys, data = namespace_of(client), prefix(2), payloads(2)
    with client.reserve(namespace, chained(keys)) as lease:
        lease.abort(keys[1:])
        lease.abort(keys[1:])
        assert lease.held == {keys[0]}
        location = lease.results[0].location
        assert location is not None
        client.path().write(lease.lease_id, [Piece(location, whole(CHUNK_BYTES), data[0])], soon())
        assert lease.commit(keys) == [CommitStatus.STORED, CommitStatus.FAILED]
    assert client.load(namespace, keys, buffers(2)) == 1


def test_stripes_of_several_ranks_make_one_chunk(client: Client) -> None:
    layers, heads, page = 4, 4, 1024
    chunk_bytes = layers * heads * page
    identity = namespace_of(client).identity
    namespace = client.namespace(
        type(identity)(model=identity.model + " striped", weights_revision="1", num_layers=layers, num_kv_heads=heads),
        chunk_bytes,
    )
    key, data = prefix(1)[0], os.urandom(chunk_bytes)
    halves = [Span(rank * heads // 2 * page, heads // 2 * page, heads * page, layers) for rank in range(2)]

    def part(span: Span) -> bytes:
        return b"".join(data[begin : begin + length] for begin, length in span.runs())

    with client.reserve(namespace, [(key, ROOT)]) as lease:
        location = lease.results[0].location
        assert location is not None
        for rank, span in enumerate(halves):
            assert client.path().write(lease.lease_id, [Piece(location, span, part(span))], soon()) == [True]
            stripe = Stripe(0, layers, rank * heads // 2, (rank + 1) * heads // 2)
            status = lease.commit([key], [stripe])
            assert status == [CommitStatus.STORED if rank else CommitStatus.PARTIAL]
    out = bytearray(chunk_bytes)
    assert client.load(namespace, [key], [out]) == 1
    assert out == data
    with client.lookup(namespace, [key]) as found:
        for span in halves:
            mine = bytearray(span.size)
            assert client.path().read(found.lease_id, [Piece(found.locations[0], span, mine)], soon()) == [True]
            assert mine == part(span)


def test_a_store_larger_than_its_rounds_is_stored_whole(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvd_client.client.ROUND_BYTES", dict.fromkeys(("shm", "tcp"), 3 * CHUNK_BYTES))
    namespace, keys, data = namespace_of(client), prefix(10), payloads(10)
    assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 10
    out = buffers(10)
    assert client.load(namespace, keys, out) == 10
    assert out == data


def test_long_requests_stay_within_the_daemons_bound(client: Client) -> None:
    info = client.connect()
    namespace = namespace_of(client, 16)
    count = info.max_chunks + 100
    keys, data = prefix(count), payloads(count, 16)
    outcomes = client.store(namespace, chained(keys), data)
    stored = next((i for i, outcome in enumerate(outcomes) if outcome is not StoreOutcome.STORED), count)
    assert stored == count
    assert client.load(namespace, keys, buffers(count, 16)) == info.max_chunks
    with pytest.raises(InvalidRequest):
        client.reserve(namespace, chained(keys))
    assert client.connected


def test_what_cannot_be_is_refused_and_the_session_lives_on(client: Client) -> None:
    info = client.connect()
    with pytest.raises(InvalidRequest):
        client.lookup(namespace_of(client, info.max_chunk_bytes + 1), prefix(1))
    with pytest.raises(InvalidRequest):
        client.lookup(namespace_of(client), [b"short"])
    with pytest.raises(ValueError):
        client.load(namespace_of(client), prefix(2), buffers(1))
    with pytest.raises(ValueError):
        client.namespace(namespace_of(client).identity, 0)
    assert client.connected
    assert client.epoch == info.epoch


def test_a_full_pool_evicts_the_oldest_and_serves_the_newest(client: Client) -> None:
    namespace = namespace_of(client, 1 << 20)
    for _ in range(20):
        keys, data = prefix(8), payloads(8, 1 << 20)
        assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 8
        out = buffers(8, 1 << 20)
        assert client.load(namespace, keys, out) == 8
        assert out == data


def test_many_threads_share_a_client(client: Client) -> None:
    namespace = namespace_of(client, 64 << 10)
    wrong: list[object] = []

    def work() -> None:
        for _ in range(10):
            keys, data, out = prefix(3), payloads(3, 64 << 10), buffers(3, 64 << 10)
            outcomes = client.store(namespace, chained(keys), data)
            loaded = client.load(namespace, keys, out)
            if outcomes != [StoreOutcome.STORED] * 3 or loaded != 3 or out != data:
                wrong.append((outcomes, loaded))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_ipv6_serves_calls_and_bytes() -> None:
    with Daemon(pool="16MiB", listen="[::1]:0") as daemon:
        assert "[::1]" in daemon.tcp_endpoint
        with client_of(daemon, "tcp") as client:
            namespace, keys, data = namespace_of(client), prefix(3), payloads(3)
            assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 3
            out = buffers(3)
            assert client.load(namespace, keys, out) == 3
            assert out == data
        assert daemon.audit() == []


def test_a_closed_client_says_so(daemon: Daemon) -> None:
    client = client_of(daemon, "shm")
    namespace = namespace_of(client)
    path = client.path()
    client.close()
    client.close()
    assert not client.connected
    assert not path.alive
    with pytest.raises(Unavailable):
        client.lookup(namespace, prefix(1))
    with pytest.raises(Unavailable):
        client.connect(1)
    assert client.load(namespace, prefix(1), buffers(1)) == 0
    wait_until(lambda: not daemon.stats().sessions, what="every session to be gone")


def test_status_pages_know_the_client(daemon: Daemon, client: Client) -> None:
    stats = client.stats()
    assert stats.state == "serving"
    assert any(session.client.startswith("test") for session in stats.sessions)
