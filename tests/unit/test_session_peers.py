"""Who is at the other end of a connection."""

from __future__ import annotations

import asyncio
import grp
import ipaddress
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvd.peers import Access, Credentials, credentials_of, loopback_uid, parse_grpc_peer
from kvd.wire.errors import Unauthenticated

ROOT = Path(__file__).resolve().parents[2]
STRANGER = 54321


@pytest.mark.parametrize(
    ("peer", "found"),
    [
        ("unix:", None),
        ("unix:/run/kvd/kvd.sock", None),
        ("ipv4:127.0.0.1:5000", ("127.0.0.1", 5000)),
        ("ipv6:[::1]:5000", ("::1", 5000)),
        ("ipv6:%5B::1%5D:5000", ("::1", 5000)),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", ("fe80::1", 5000)),
    ],
)
def test_names_of_grpc_peers_are_read(peer: str, found: tuple[str, int] | None) -> None:
    assert parse_grpc_peer(peer) == found


@pytest.mark.parametrize("peer", ["", "vsock:1:2", "ipv4:127.0.0.1", "ipv4:127.0.0.1:x"])
def test_a_peer_from_nowhere_is_not_let_in(peer: str) -> None:
    with pytest.raises(Unauthenticated):
        parse_grpc_peer(peer)


def test_the_kernel_says_who_is_at_the_other_end_of_a_unix_socket() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        found = credentials_of(ours)
    assert (found.pid, found.uid) == (os.getpid(), os.getuid())
    assert os.getgid() in found.gids


@pytest.mark.skipif(os.getuid() != 0, reason="only root can take on groups")
def test_every_group_of_the_peer_counts() -> None:
    code = (
        "import socket; from kvd.peers import credentials_of; ours, theirs = socket.socketpair(); "
        "print(*credentials_of(ours).gids)"
    )
    further = [STRANGER, STRANGER + 1]
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, extra_groups=further, capture_output=True, text=True, check=True
    ).stdout
    assert set(further) <= {int(gid) for gid in printed.split()}


def test_the_daemons_user_and_root_are_let_in_and_others_are_not() -> None:
    access = Access()
    assert access.admits(Credentials(1, os.getuid(), frozenset()))
    assert access.admits(Credentials(1, 0, frozenset()))
    assert not access.admits(Credentials(1, STRANGER, frozenset({STRANGER})))
    with pytest.raises(Unauthenticated):
        access.identify_local(Credentials(1, STRANGER, frozenset()))


def test_members_of_the_group_are_let_in() -> None:
    group = grp.getgrall()[-1]
    access = Access(group.gr_name)
    assert access.admits(Credentials(1, STRANGER, frozenset({STRANGER, group.gr_gid})))
    assert not access.admits(Credentials(1, STRANGER, frozenset({group.gr_gid + 1})))


def test_the_user_of_a_loopback_connection_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        host, port = client.getsockname()
        own_port = server.getsockname()[1]
        assert loopback_uid(ipaddress.ip_address(host), port, own_port) == os.getuid()
        assert loopback_uid(ipaddress.ip_address(host), port, own_port + 1) is None
        found = asyncio.run(Access().identify_tcp(host, port, own_port))
    assert found.tenant == "default"
    assert found.peer == f"127.0.0.1:{port} uid {os.getuid()}"


def test_an_ipv4_peer_in_ipv6_clothes_is_found() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    family = socket.AF_INET6
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(family, socket.SOCK_STREAM) as client:
        client.connect(("::ffff:127.0.0.1", server.getsockname()[1]))
        port = client.getsockname()[1]
        assert loopback_uid(ipaddress.ip_address("127.0.0.1"), port, server.getsockname()[1]) == os.getuid()


def test_a_loopback_connection_of_another_user_is_not_let_in(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    row = f"   0: 0100007F:1388 0100007F:1D10 01 00000000:00000000 00:00000000 00000000 {STRANGER}        0 1 1\n"
    (tmp_path / "net/tcp").write_text(head + row)
    access = Access(proc=str(tmp_path))
    with pytest.raises(Unauthenticated, match=f"user {STRANGER} may not"):
        asyncio.run(access.identify_tcp("127.0.0.1", 5000, 7440))
    with pytest.raises(Unauthenticated, match="does not say"):
        asyncio.run(access.identify_tcp("127.0.0.1", 5001, 7440))


def test_a_peer_from_another_machine_is_let_in_only_when_that_was_asked_for() -> None:
    with pytest.raises(Unauthenticated, match="other machines"):
        asyncio.run(Access().identify_tcp("192.0.2.1", 5000, 7440))
    found = asyncio.run(Access(allow_remote=True).identify_tcp("2001:db8::1", 5000, 7440))
    assert (found.tenant, found.peer) == ("default", "[2001:db8::1]:5000")
