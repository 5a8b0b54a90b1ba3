"""Calls by frames when the daemon hangs, dies, drains, or ends the channel: deadlines, and nothing left behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest

from kvd.wire import calls as wire
from kvd.wire import errors
from kvd.wire.chunks import ROOT
from kvd_client import Client, DeadlineExceeded, StoreOutcome, Unavailable
from kvd_client.channel import CallChannel, FrameCalls
from tests.contract.clients import (
    buffers,
    chained,
    client_of,
    namespace_of,
    payloads,
    prefix,
    wait_for_no_writes,
)
from tests.daemon import Daemon
from tests.raw import RawSession
from tests.wait import wait_until

KEYS = [bytes([number]) * 32 for number in range(1, 3)]
TIMEOUT_S = 0.3


def channel_of(client: Client) -> CallChannel:
    calls = client._keeper.require()._calls
    assert isinstance(calls, FrameCalls)
    return calls._channel


def failure(call: Callable[[], object]) -> Exception:
    with pytest.raises(errors.KvdError) as caught:
        call()
    return caught.value


def test_a_late_answer_is_thrown_away_and_what_it_leased_is_released(daemon: Daemon) -> None:
    with client_of(daemon, "shm") as client:
        namespace, keys, data = namespace_of(client), prefix(3), payloads(3)
        assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 3
        epoch = client.epoch
        daemon.pause()
        with pytest.raises(DeadlineExceeded):
            client.lookup(namespace, keys, timeout_s=TIMEOUT_S)
        daemon.resume()
        wait_until(lambda: client.connected, 20, "the breaker to close by itself")
        out = buffers(3)
        assert client.load(namespace, keys, out) == 3
        assert out == data
        assert client.epoch == epoch
        wait_until(lambda: not any(s.read_leases for s in daemon.stats().sessions), what="every lease to be released")


def test_what_a_late_answer_has_reserved_is_given_back(daemon: Daemon) -> None:
    with client_of(daemon, "shm") as client:
        namespace, keys = namespace_of(client), prefix(3)
        client.load(namespace, keys, buffers(3))
        before = daemon.stats().counters["reserved_chunks"]
        daemon.pause()
        with pytest.raises(DeadlineExceeded):
            client.reserve(namespace, chained(keys), timeout_s=TIMEOUT_S)
        daemon.resume()
        wait_until(lambda: daemon.stats().counters["reserved_chunks"] == before + 3, what="the request to be served")
        wait_for_no_writes(daemon)
        wait_until(lambda: client.connected, 20, "the breaker to close by itself")
        assert client.store(namespace, chained(keys), payloads(3)) == [StoreOutcome.STORED] * 3


def test_a_daemon_that_is_killed_ends_the_calls_that_wait_for_it(daemon: Daemon) -> None:
    with client_of(daemon, "shm") as client:
        daemon.pause()
        caught: list[Exception] = []
        waits = threading.Thread(target=lambda: caught.append(failure(lambda: client.renew([], timeout_s=50))))
        waits.start()
        channel = channel_of(client)
        wait_until(lambda: channel._lock.locked(), what="the call to be under way")
        daemon.kill()
        waits.join(20)
        assert not waits.is_alive()
        assert type(caught[0]) is Unavailable


def test_a_channel_that_ends_alone_ends_the_session_and_the_next_one_has_another(daemon: Daemon) -> None:
    with client_of(daemon, "shm") as client:
        epoch = client.epoch
        channel_of(client)._socket.send(bytes(100))
        with pytest.raises(Unavailable):
            while True:  # the daemon answers what it had read before
                client.renew([])
        wait_until(lambda: client.connected and client.epoch > epoch, 20, "another session")
        assert client.renew([]) == []


def test_a_daemon_that_drains_grants_nothing_new_and_finishes_what_was_begun() -> None:
    with (
        Daemon(pool="4MiB", drain_timeout=300) as daemon,
        RawSession(daemon.unix_endpoint, daemon.socket) as session,
    ):
        line = session.lifeline
        assert line is not None
        namespace = session.open_namespace()
        assert isinstance(line.ask(wire.Reserve(namespace, 1, [(KEYS[0], ROOT)])), memoryview)
        os.kill(daemon.pid, signal.SIGTERM)
        assert session.next_note().HasField("draining")
        assert type(line.ask(wire.Reserve(namespace, 2, [(KEYS[1], KEYS[0])]))) is errors.Draining
        committed = line.ask(wire.Commit(namespace, 1, KEYS[:1]))
        assert isinstance(committed, memoryview)
        assert list(wire.unpack_bytes(committed)) == [1]
        wait_until(lambda: daemon.exit_code is not None, what="the daemon to stop")
        assert daemon.exit_code == 0
        with pytest.raises(ConnectionError):
            line.ask(wire.Renew())
