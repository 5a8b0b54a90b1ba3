"""Who is at the other end of a connection, and whether that user may use the daemon.

The kernel answers for local peers: SO_PEERCRED on Unix sockets, the socket tables in /proc for TCP over loopback.
Peers from other machines cannot prove anything yet; they are let in only with ``allow_remote``.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import ipaddress
import os
import pwd
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote

from kvd.wire.endpoints import format_host_port
from kvd.wire.errors import Unauthenticated

#: Everybody who is let in belongs to this tenant until peers can prove more about themselves.
DEFAULT_TENANT = "default"
LOOKUP_TIMEOUT_S = 2.0

_UCRED = struct.Struct("iII")  # pid, uid, gid
_SO_PEERGROUPS = 59
_MAX_GROUPS = 256  # Python asks the kernel for 1024 bytes at most


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the kernel says about the process at the other end of a Unix socket."""

    pid: int
    uid: int
    gids: frozenset[int]

    def __str__(self) -> str:
        return f"uid {self.uid} pid {self.pid}"


@dataclass(frozen=True, slots=True)
class Identified:
    """A peer that was let in: its tenant, and who it is, for people."""

    tenant: str
    peer: str


class Access:
    """Who may use the daemon: its own user, root, and the members of ``group``."""

    def __init__(self, group: str | None = None, *, allow_remote: bool = False, proc: str = "/proc") -> None:
        """Raises KeyError when there is no such group. The membership is read once: it holds until the next start."""
        self.gid = None if group is None else grp.getgrnam(group).gr_gid
        self._uids = {os.getuid(), 0} | (set() if group is None else _member_uids(group))
        self._allow_remote = allow_remote
        self._proc = proc

    def admits(self, credentials: Credentials) -> bool:
        """Whether the process at the other end of a Unix socket may use the daemon."""
        return credentials.uid in self._uids or self.gid in credentials.gids

    def identify_local(self, credentials: Credentials) -> Identified:
        """The tenant of a process at the other end of a Unix socket. Raises ``Unauthenticated``."""
        if not self.admits(credentials):
            raise Unauthenticated(f"user {credentials.uid} may not use this daemon")
        return Identified(DEFAULT_TENANT, str(credentials))

    async def identify_tcp(self, host: str, port: int, own_port: int) -> Identified:
        """The tenant of the peer ``host``:``port`` of a connection to ``own_port``. Raises ``Unauthenticated``."""
        address, text = _address(host), format_host_port(host, port)
        if not address.is_loopback:
            if not self._allow_remote:
                raise Unauthenticated(f"{text}: peers from other machines are not let in")
            return Identified(DEFAULT_TENANT, text)
        lookup = asyncio.to_thread(loopback_uid, address, port, own_port, self._proc)
        try:
            uid = await asyncio.wait_for(lookup, LOOKUP_TIMEOUT_S)
        except (OSError, TimeoutError) as error:
            raise Unauthenticated(f"{text}: the user of this connection could not be found out: {error!r}") from error
        if uid is None:
            raise Unauthenticated(f"{text}: the kernel does not say which user this connection belongs to")
        if uid not in self._uids:
            raise Unauthenticated(f"user {uid} may not use this daemon")
        return Identified(DEFAULT_TENANT, f"{text} uid {uid}")


def credentials_of(connection: socket.socket) -> Credentials:
    """Who connected to this Unix socket. Raises OSError."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(raw)
    gids = {gid}
    with contextlib.suppress(OSError):  # more groups than we ask for, or a kernel before 4.13: the first one counts
        groups = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MAX_GROUPS)
        gids.update(struct.unpack(f"{len(groups) // 4}I", groups))
    return Credentials(pid, uid, frozenset(gids))


def parse_grpc_peer(peer: str) -> tuple[str, int] | None:
    """Host and port of gRPC's name for a TCP peer (``ipv4:1.2.3.4:5``, ``ipv6:%5B::1%5D:5``); None for a Unix peer.

    Raises ``Unauthenticated`` for anything else.
    """
    kind, _, rest = unquote(peer).partition(":")
    if kind == "unix":
        return None
    host, _, port = rest.rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdigit():
        raise Unauthenticated(f"peer {peer!r} comes from nowhere known")
    return host.strip("[]").partition("%")[0], int(port)


def loopback_uid(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int, own_port: int, proc: str = "/proc"
) -> int | None:
    """The user whose socket on this machine is ``address``:``port``, connected to ``own_port``. Raises OSError."""
    for local, local_port, remote_port, uid in _tcp_sockets(proc):
        if local_port == port and remote_port == own_port and _plain(local) == address:
            return uid
    return None


def _tcp_sockets(proc: str) -> Iterator[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int, int, int]]:
    """(local address, local port, remote port, uid) of every TCP socket of this network namespace."""
    for table in ("net/tcp", "net/tcp6"):
        path = os.path.join(proc, table)
        if not os.path.exists(path):
            continue  # no IPv6 here
        with open(path) as lines:
            next(lines, None)
            for line in lines:
                columns = line.split()
                host, _, port = columns[1].partition(":")
                words = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8)]
                remote_port = int(columns[2].partition(":")[2], 16)
                yield ipaddress.ip_address(b"".join(words)), int(port, 16), remote_port, int(columns[7])


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return _plain(ipaddress.ip_address(host))
    except ValueError:
        raise Unauthenticated(f"peer {host!r} is no address") from None


def _plain(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An IPv4 address that came in IPv6 clothes, without them."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _member_uids(group: str) -> set[int]:
    found = grp.getgrnam(group)
    uids = {user.pw_uid for user in pwd.getpwall() if user.pw_gid == found.gr_gid}
    for name in found.gr_mem:
        with contextlib.suppress(KeyError):  # a member that has no account here
            uids.add(pwd.getpwnam(name).pw_uid)
    return uids
