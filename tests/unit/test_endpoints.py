"""Endpoints as people type them, and where the local socket is when nobody says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvd.wire import endpoints
from kvd.wire.endpoints import (
    TcpEndpoint,
    UnixEndpoint,
    default_socket_path,
    find_socket,
    format_host_port,
    parse_endpoint,
    parse_host_port,
)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:7440", "127.0.0.1", 7440),
        ("localhost:0", "localhost", 0),
        ("[::1]:7440", "::1", 7440),
        ("[fe80::1%eth0]:65535", "fe80::1%eth0", 65535),
        (" node-7.cluster:1 ", "node-7.cluster", 1),
    ],
)
def test_host_and_port_survive_the_way_there_and_back(text: str, host: str, port: int) -> None:
    assert parse_host_port(text) == (host, port)
    assert parse_host_port(format_host_port(host, port)) == (host, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7440",
        ":7440",
        "host:",
        "host:70000",
        "host:-1",
        "host:x",
        "::1:7440",
        "[::1]",
        "[host]:1",
        "a b:1",
        "host:١",
    ],
)
def test_what_is_no_host_and_port_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parse_host_port(text)
    assert repr(text) in str(refusal.value)


def test_endpoints_are_read_and_written_the_same() -> None:
    assert parse_endpoint("unix:/run/kvd/kvd.sock") == UnixEndpoint("/run/kvd/kvd.sock")
    assert parse_endpoint("unix:///run/kvd/kvd.sock") == UnixEndpoint("/run/kvd/kvd.sock")
    assert parse_endpoint("unix:relative.sock") == UnixEndpoint("relative.sock")
    assert parse_endpoint("/tmp/kvd.sock") == UnixEndpoint("/tmp/kvd.sock")
    assert parse_endpoint("tcp://[::1]:7440") == TcpEndpoint("::1", 7440)
    assert parse_endpoint("tcp://host:7440/") == TcpEndpoint("host", 7440)
    for text in ("unix:/a", "tcp://[::1]:1", "tcp://host:1"):
        assert str(parse_endpoint(text)) == text
    assert TcpEndpoint("::1", 7440).grpc_target == "[::1]:7440"


@pytest.mark.parametrize(
    "text", ["", "unix:", "http://host:1", "host:7440", "tcp://host", "tcp://host:0", "unix:" + "x" * 104]
)
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_endpoint(text)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No /run/kvd: it is ``tmp_path/run/kvd``, whose parent is not there."""
    monkeypatch.setattr(endpoints, "SYSTEM_SOCKET", str(tmp_path / "run" / "kvd" / "kvd.sock"))
    return tmp_path


def test_the_variable_goes_before_everything(places: Path) -> None:
    assert default_socket_path({"KVD_SOCKET": "/x/y.sock"}) == "/x/y.sock"
    assert find_socket({"KVD_SOCKET": "/x/y.sock"}) == "/x/y.sock"


def test_a_daemon_takes_the_first_place_it_can_write(places: Path) -> None:
    runtime = places / "user"
    runtime.mkdir()
    last = f"/tmp/kvd-{os.getuid()}/kvd.sock"
    assert default_socket_path({}) == last
    assert default_socket_path({"XDG_RUNTIME_DIR": str(places / "missing")}) == last
    assert default_socket_path({"XDG_RUNTIME_DIR": str(runtime)}) == str(runtime / "kvd" / "kvd.sock")
    (places / "run").mkdir()
    assert default_socket_path({"XDG_RUNTIME_DIR": str(runtime)}) == endpoints.SYSTEM_SOCKET


def test_a_client_finds_the_socket_that_is_there(places: Path) -> None:
    runtime = places / "user"
    (runtime / "kvd").mkdir(parents=True)
    (places / "run").mkdir()
    environ = {"XDG_RUNTIME_DIR": str(runtime)}
    assert find_socket(environ) == default_socket_path(environ) == endpoints.SYSTEM_SOCKET
    (runtime / "kvd" / "kvd.sock").touch()
    assert find_socket(environ) == str(runtime / "kvd" / "kvd.sock")
    (places / "run" / "kvd").mkdir()
    (places / "run" / "kvd" / "kvd.sock").touch()
    assert find_socket(environ) == endpoints.SYSTEM_SOCKET


def test_a_socket_in_a_directory_that_somebody_else_made_in_tmp_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert endpoints._trusted("/run/kvd")
    monkeypatch.setattr(os, "lstat", lambda path: os.stat_result((0o40755, 0, 0, 0, os.getuid() + 4711, 0, 0, 0, 0, 0)))
    assert not endpoints._trusted("/tmp/kvd-1")
