"""A daemon that the tests of a module share, and clients of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvd_client import Client
from tests.contract.clients import WAYS, client_of, wait_for_no_writes
from tests.daemon import Daemon
from tests.wait import wait_until


@pytest.fixture(scope="module")
def one_daemon() -> Iterator[Daemon]:
    """One process for a module, or one after the other when tests end it."""
    with Daemon(pool="64MiB", quarantine=0.1) as daemon:
        yield daemon
        assert "Traceback" not in daemon.log


@pytest.fixture
def daemon(one_daemon: Daemon) -> Iterator[Daemon]:
    """A daemon that runs, knows nobody, and is found in order afterwards, whatever was done to it."""
    yield one_daemon
    if one_daemon.exit_code is not None:
        one_daemon.start()
    one_daemon.resume()
    wait_until(lambda: not one_daemon.stats().sessions, 20, "every session to be gone")
    wait_for_no_writes(one_daemon)
    assert one_daemon.audit() == []


@pytest.fixture(params=WAYS)
def client(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client of the daemon, over each of the ways in turn."""
    with client_of(daemon, request.param) as client:
        yield client
