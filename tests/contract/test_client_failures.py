"""What the client promises when the daemon hangs, dies, comes back, or was never there."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvd_client import (
    Client,
    DeadlineExceeded,
    Piece,
    SessionUnknown,
    StoreOutcome,
    Unavailable,
    open_path,
    whole,
)
from tests.contract.clients import (
    CHUNK_BYTES,
    buffers,
    chained,
    client_of,
    namespace_of,
    payloads,
    prefix,
    wait_for_no_writes,
)
from tests.daemon import Daemon
from tests.proxy import Proxy
from tests.wait import wait_until

TIMEOUT_S = 0.3
#: A call may take so many times its deadline on a busy machine. A call without a deadline would take for ever.
SLACK = 10


def within_deadline(call: Callable[[], Any]) -> Any:
    """What ``call`` returns or raises; fails when it has not kept TIMEOUT_S in mind."""
    begun = time.monotonic()
    try:
        return call()
    finally:
        assert time.monotonic() - begun < TIMEOUT_S * SLACK


def test_a_client_without_a_daemon_is_made_at_once_and_misses(tmp_path: Path) -> None:
    for endpoint in (f"unix:{tmp_path}/nobody.sock", "tcp://127.0.0.1:1"):
        with Client(endpoint) as client:
            namespace = namespace_of(client)
            assert not client.connected
            assert client.epoch == 0
            assert client.load(namespace, prefix(1), buffers(1)) == 0
            assert client.store(namespace, chained(prefix(2)), payloads(2)) == [StoreOutcome.FAILED] * 2
            with pytest.raises(Unavailable):
                client.lookup(namespace, prefix(1))
            with pytest.raises(Unavailable):
                within_deadline(lambda client=client: client.connect(TIMEOUT_S))
            wait_until(lambda client=client: client.last_error, what="the reason")


def test_a_daemon_that_starts_later_is_found(tmp_path: Path) -> None:
    with Daemon(start=False, pool="16MiB") as daemon, Client(daemon.unix_endpoint) as client:
        with pytest.raises(Unavailable):
            client.connect(0.1)
        daemon.start()
        assert client.connect(20).epoch == 1
        namespace, keys, data = namespace_of(client), prefix(2), payloads(2)
        assert client.store(namespace, chained(keys), data, timeout_s=10) == [StoreOutcome.STORED] * 2


def test_deadlines_hold_while_the_daemon_hangs_and_then_nobody_waits(daemon: Daemon, client: Client) -> None:
    namespace, keys, data = namespace_of(client), prefix(3), payloads(3)
    assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 3
    epoch = client.epoch
    daemon.pause()
    with pytest.raises(DeadlineExceeded):
        within_deadline(lambda: client.lookup(namespace, keys, timeout_s=TIMEOUT_S))
    assert not client.connected
    # The breaker is open: a thousand calls cost less than the deadline of one.
    begun = time.monotonic()
    for _ in range(1000):
        with pytest.raises(Unavailable):
            client.lookup(namespace, keys, timeout_s=60)
    assert time.monotonic() - begun < 60
    assert client.load(namespace, keys, buffers(3), timeout_s=60) == 0
    assert client.store(namespace, chained(keys), data, timeout_s=60) == [StoreOutcome.FAILED] * 3
    daemon.resume()
    wait_until(lambda: client.connected, 20, "the breaker to close by itself")
    assert client.epoch == epoch, "a hang is not the end of a session"
    out = buffers(3)
    assert client.load(namespace, keys, out) == 3
    assert out == data


@pytest.mark.parametrize("call", ["load", "store"])
def test_whole_calls_keep_their_deadline_too(daemon: Daemon, client: Client, call: str) -> None:
    namespace, keys, data = namespace_of(client), prefix(3), payloads(3)
    client.load(namespace, keys, buffers(3))
    daemon.pause()
    if call == "load":
        assert within_deadline(lambda: client.load(namespace, keys, buffers(3), timeout_s=TIMEOUT_S)) == 0
    else:
        outcomes = within_deadline(lambda: client.store(namespace, chained(keys), data, timeout_s=TIMEOUT_S))
        assert outcomes == [StoreOutcome.FAILED] * 3
    daemon.resume()
    wait_until(lambda: client.connected, 20, "the breaker to close by itself")
    assert client.store(namespace, chained(keys), data)[-1] in (StoreOutcome.STORED, StoreOutcome.BUSY)


@pytest.mark.parametrize("way", ["tcp", "tcp-data"])
@pytest.mark.parametrize("op", ["read", "write"])
def test_a_transfer_keeps_its_deadline_while_the_daemon_hangs(daemon: Daemon, way: str, op: str) -> None:
    with client_of(daemon, way) as client:
        namespace, keys, data = namespace_of(client), prefix(3), payloads(3)
        assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 3
        path = client.path()
        with client.lookup(namespace, keys) as reading, client.reserve(namespace, chained(prefix(3))) as writing:
            daemon.pause()
            lease_id = reading.lease_id if op == "read" else writing.lease_id
            places = reading.locations if op == "read" else [r.location for r in writing.results if r.location]
            pieces = [Piece(at, whole(CHUNK_BYTES), each) for at, each in zip(places, buffers(3), strict=True)]
            deadline = time.monotonic() + TIMEOUT_S
            assert within_deadline(lambda: getattr(path, op)(lease_id, pieces, deadline)) == [False] * 3
            daemon.resume()
        wait_for_no_writes(daemon)


@pytest.fixture
def answers(daemon: Daemon) -> Iterator[Proxy]:
    """A way to the daemon's calls and data on which answers can be held up while requests arrive."""
    control, data = (each.rsplit(":", 1)[1] for each in (daemon.tcp_endpoint, daemon.data_endpoint))
    with (
        Proxy(("127.0.0.1", int(control)), listen=("127.0.0.2", int(control))),
        Proxy(("127.0.0.1", int(data)), listen=("127.0.0.2", int(data))) as proxy,
    ):
        yield proxy


def behind(daemon: Daemon, answers: Proxy) -> Client:
    """A client that reaches the daemon through the proxy."""
    return Client(daemon.tcp_endpoint.replace("127.0.0.1", answers.host), timeout_s=10)


def test_what_a_lost_answer_has_reserved_is_given_back(daemon: Daemon, answers: Proxy) -> None:
    with behind(daemon, answers) as client:
        client.connect(20)
        namespace, keys = namespace_of(client), prefix(3)
        client.load(namespace, keys, buffers(3))
        answers.stall("down")
        with pytest.raises(DeadlineExceeded):
            client.reserve(namespace, chained(keys), timeout_s=TIMEOUT_S)
        assert daemon.stats().pool.writing_bytes, "the request has not arrived: nothing was lost"
        answers.resume()
        wait_for_no_writes(daemon)
        wait_until(lambda: client.connected, 20, "the breaker to close by itself")
        assert client.store(namespace, chained(keys), payloads(3)) == [StoreOutcome.STORED] * 3


def test_what_a_lost_answer_has_leased_is_released(daemon: Daemon, answers: Proxy) -> None:
    with behind(daemon, answers) as client:
        client.connect(20)
        namespace, keys = namespace_of(client), prefix(3)
        assert client.store(namespace, chained(keys), payloads(3)) == [StoreOutcome.STORED] * 3
        answers.stall("down")
        with pytest.raises(DeadlineExceeded):
            client.lookup(namespace, keys, timeout_s=TIMEOUT_S)
        assert any(session.read_leases for session in daemon.stats().sessions), "the request has not arrived"
        answers.resume()
        wait_until(lambda: not any(s.read_leases for s in daemon.stats().sessions), what="the lease to be released")


def test_a_store_whose_commit_has_no_answer_is_not_called_stored(daemon: Daemon, answers: Proxy) -> None:
    with behind(daemon, answers) as client:
        client.connect(20)
        namespace, keys, data = namespace_of(client), prefix(1), payloads(1)
        with client.reserve(namespace, chained(keys)) as lease:
            location = lease.results[0].location
            assert location is not None
            client.path().write(lease.lease_id, [Piece(location, whole(CHUNK_BYTES), data[0])], time.monotonic() + 10)
            answers.stall("down")
            with pytest.raises(DeadlineExceeded):
                lease.commit(keys, timeout_s=TIMEOUT_S)
            assert lease.held == set(keys), "what became of it is not known"
        answers.resume()
        wait_until(lambda: client.connected, 20, "the breaker to close by itself")
        out = buffers(1)
        assert client.load(namespace, keys, out) == 1, "it had been stored all the same"
        assert out == data


def test_leases_that_ended_while_the_daemon_hung_are_settled_when_it_is_back(daemon: Daemon, client: Client) -> None:
    namespace, keys, data = namespace_of(client), prefix(3), payloads(3)
    client.store(namespace, chained(keys), data)
    reading = client.lookup(namespace, keys)
    writing = client.reserve(namespace, chained(prefix(3)))
    daemon.pause()
    reading.release()
    within_deadline(lambda: writing.abort(timeout_s=TIMEOUT_S))
    daemon.resume()
    wait_for_no_writes(daemon)
    wait_until(lambda: not any(s.read_leases for s in daemon.stats().sessions), what="the read lease to end")


def test_a_daemon_that_was_killed_and_comes_back_is_used_again(daemon: Daemon, client: Client) -> None:
    namespace, keys, data = namespace_of(client), prefix(3), payloads(3)
    assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 3
    path, attachment, epoch = client.path(), client.attachment(), client.epoch
    reading = client.lookup(namespace, keys)
    writing = client.reserve(namespace, chained(prefix(2)))
    daemon.kill()
    wait_until(lambda: not path.alive, what="the path to notice")
    wait_until(lambda: not client.connected, what="the client to notice")
    assert client.load(namespace, keys, buffers(3), timeout_s=60) == 0
    assert client.store(namespace, chained(keys), data, timeout_s=60) == [StoreOutcome.FAILED] * 3
    pieces = [Piece(reading.locations[0], whole(CHUNK_BYTES), buffers(1)[0])]
    assert path.read(reading.lease_id, pieces, time.monotonic() + 10) == [False]
    with pytest.raises(Unavailable):
        client.path()
    with pytest.raises(Unavailable):
        open_path(attachment)

    daemon.start()
    wait_until(lambda: client.connected, 20, "a new session")
    assert client.epoch > epoch
    with pytest.raises((SessionUnknown, Unavailable)):
        open_path(attachment)
    assert client.renew([reading]) == [False]
    writing.abort()
    with pytest.raises(Unavailable):
        writing.commit(prefix(1))
    assert client.load(namespace, keys, buffers(3)) == 0, "the pool of this daemon does not outlive it"
    assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 3
    out = buffers(3)
    assert client.load(namespace, keys, out) == 3
    assert out == data


def test_the_memory_of_a_daemon_that_died_can_still_be_touched(daemon: Daemon) -> None:
    with client_of(daemon, "shm") as client:
        namespace, keys = namespace_of(client), prefix(1)
        lease = client.reserve(namespace, chained(keys))
        location = lease.results[0].location
        assert location is not None
        view = client.path().view(location, CHUNK_BYTES)
        assert view is not None
        daemon.kill()
        daemon.start()
        wait_until(lambda: client.epoch == 2, 20, "a new session")
        view[:] = os.urandom(CHUNK_BYTES)  # nobody's memory by now; it must only not be a crash
        assert client.store(namespace, chained(keys), payloads(1)) == [StoreOutcome.STORED]


def test_a_session_keeps_its_slots_as_long_as_somebody_can_write_into_them(daemon: Daemon) -> None:
    client = client_of(daemon, "shm")
    namespace = namespace_of(client)
    lease = client.reserve(namespace, chained(prefix(1)))
    location = lease.results[0].location
    assert location is not None
    view = client.path().view(location, CHUNK_BYTES)
    client.close()
    wait_until(lambda: daemon.stats().sessions[0].write_leases == 1, what="the session to be over")
    held = [daemon.stats().pool for _ in range(20)]
    assert all(pool.writing_bytes and not pool.quarantined_bytes for pool in held)
    del view
    wait_for_no_writes(daemon)
    assert not daemon.stats().sessions


@pytest.mark.slow
def test_stores_and_loads_go_on_through_kills(daemon: Daemon, client: Client) -> None:
    namespace = namespace_of(client)
    stop = threading.Event()
    wrong: list[str] = []
    right = [0]

    def work() -> None:
        while not stop.is_set():
            keys, data, out = prefix(4), payloads(4), buffers(4)
            client.store(namespace, chained(keys), data, timeout_s=1)
            count = client.load(namespace, keys, out, timeout_s=1)
            if out[:count] != data[:count]:
                wrong.append("bytes")
            right[0] += count
            if not count:
                stop.wait(0.01)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            before = right[0]
            wait_until(lambda before=before: right[0] > before + 20, 20, "loads to succeed")
            daemon.kill()
            daemon.start()
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_a_daemon_that_stops_politely_ends_the_session(daemon: Daemon, client: Client) -> None:
    namespace, keys, data = namespace_of(client), prefix(2), payloads(2)
    assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 2
    assert daemon.stop() == 0
    wait_until(lambda: not client.connected, what="the client to notice")
    assert client.load(namespace, keys, buffers(2), timeout_s=60) == 0
    daemon.start()
    wait_until(lambda: client.connected, 20, "a new session")
    assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 2
