"""What a client says of its memory node, as the daemon understands it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from kvd_client import Client
from kvd_client.numa import node_of_process
from tests.daemon import Daemon

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(pool="4MiB") as daemon:
        yield daemon


def understood(daemon: Daemon, endpoint: str, numa_node: int | None) -> int | None:
    """The node of the session of a client that was told of one."""
    name = f"client {next(_numbers)}"
    with Client(endpoint, name=name, numa_node=numa_node) as client:
        client.connect(20)
        (session,) = (one for one in client.stats().sessions if one.client.startswith(name))
        return session.numa_node if session.HasField("numa_node") else None


def test_a_client_is_where_it_was_told_that_it_is(daemon: Daemon) -> None:
    assert understood(daemon, daemon.unix_endpoint, 0) == 0


def test_a_client_is_where_its_process_runs_otherwise(daemon: Daemon) -> None:
    assert understood(daemon, daemon.unix_endpoint, None) == node_of_process()


def test_a_node_that_this_machine_has_not_harms_nobody(daemon: Daemon) -> None:
    assert understood(daemon, daemon.unix_endpoint, (1 << 32) - 1) == (1 << 32) - 1


def test_a_client_over_tcp_is_near_no_node(daemon: Daemon) -> None:
    assert understood(daemon, daemon.tcp_endpoint, 1) is None
