"""Where a daemon is: the endpoints people type, and the rule that finds the local socket without an option.

``unix:PATH`` (or a bare path), ``tcp://HOST:PORT``, ``tcp://[::1]:7440``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

#: Environment variable that names the local socket, for the daemon and for its clients.
SOCKET_VARIABLE = "KVD_SOCKET"
SYSTEM_SOCKET = "/run/kvd/kvd.sock"
#: Longest socket path: the kernel allows 107 bytes, and the lifeline's name is four longer than the socket's.
MAX_SOCKET_PATH_BYTES = 103


@dataclass(frozen=True, slots=True)
class UnixEndpoint:
    """A daemon on this node, reached by its socket."""

    path: str

    @property
    def grpc_target(self) -> str:
        """The name of this endpoint for a gRPC channel."""
        return f"unix:{self.path}"

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpEndpoint:
    """A daemon reached by TCP. ``host`` carries no brackets."""

    host: str
    port: int

    @property
    def grpc_target(self) -> str:
        """The name of this endpoint for a gRPC channel."""
        return format_host_port(self.host, self.port)

    def __str__(self) -> str:
        return f"tcp://{format_host_port(self.host, self.port)}"


Endpoint = UnixEndpoint | TcpEndpoint


def parse_host_port(text: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[IPV6]:PORT`` as host without brackets and port (0..65535).

    Raises ValueError, saying what would be right.
    """
    wanted = f"{text!r}: expected HOST:PORT or [IPV6]:PORT, for example 127.0.0.1:7440 or [::1]:7440"
    host, colon, port_text = text.strip().rpartition(":")
    if not colon:
        raise ValueError(wanted)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if ":" not in host:
            raise ValueError(wanted)
    elif ":" in host or "[" in host or "]" in host:
        raise ValueError(wanted)
    if not host or any(c.isspace() or c == "/" for c in host):
        raise ValueError(wanted)
    if not (port_text.isascii() and port_text.isdigit()) or int(port_text) > 65535:
        raise ValueError(f"{text!r}: the port must be a number from 0 to 65535")
    return host, int(port_text)


def format_host_port(host: str, port: int) -> str:
    """The text that ``parse_host_port`` reads: IPv6 addresses get their brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_socket_path(path: str) -> str:
    """``path`` when the kernel can bind it and its lifeline twin; ValueError otherwise."""
    if not path or "\0" in path:
        raise ValueError(f"{path!r} is not a socket path")
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"{path!r}: a socket path may have at most {MAX_SOCKET_PATH_BYTES} bytes")
    return path


def parse_endpoint(text: str) -> Endpoint:
    """``unix:PATH``, a path, or ``tcp://HOST:PORT``. Raises ValueError, saying what would be right."""
    text = text.strip()
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        return UnixEndpoint(check_socket_path(path.removeprefix("//") if path.startswith("///") else path))
    if text.startswith("tcp://"):
        host, port = parse_host_port(text.removeprefix("tcp://").rstrip("/"))
        if port == 0:
            raise ValueError(f"{text!r}: a client needs the port of the daemon, 1 to 65535")
        return TcpEndpoint(host, port)
    if text.startswith(("/", "./")):
        return UnixEndpoint(check_socket_path(text))
    raise ValueError(f"{text!r}: expected unix:PATH or tcp://HOST:PORT, for example unix:{SYSTEM_SOCKET}")


def default_socket_path(environ: Mapping[str, str] | None = None) -> str:
    """Where a daemon puts its socket when it is not told: the first of the usual places it can write to.

    The directory need not exist yet.
    """
    environ = os.environ if environ is None else environ
    if named := environ.get(SOCKET_VARIABLE):
        return named
    candidates = _usual_places(environ)
    return next((path for path in candidates[:-1] if _can_write(os.path.dirname(path))), candidates[-1])


def find_socket(environ: Mapping[str, str] | None = None) -> str:
    """Where a client looks for the daemon of this node when it is not told.

    ``$KVD_SOCKET`` if set; else the first of the usual places where something is and where nobody but this
    user or root can have put it; else the place where a daemon of this user would put its socket.
    """
    environ = os.environ if environ is None else environ
    if named := environ.get(SOCKET_VARIABLE):
        return named
    present = (path for path in _usual_places(environ) if os.path.exists(path) and _trusted(os.path.dirname(path)))
    return next(present, None) or default_socket_path(environ)


def _usual_places(environ: Mapping[str, str]) -> list[str]:
    places = [SYSTEM_SOCKET]
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        places.append(os.path.join(runtime, "kvd", "kvd.sock"))
    places.append(f"/tmp/kvd-{os.getuid()}/kvd.sock")
    return places


def _can_write(directory: str) -> bool:
    """Whether a socket can be made in ``directory``, or the directory itself in its parent."""
    if os.path.isdir(directory):
        return os.access(directory, os.W_OK | os.X_OK)
    return not os.path.lexists(directory) and os.access(os.path.dirname(directory), os.W_OK | os.X_OK)


def _trusted(directory: str) -> bool:
    """In /tmp anyone can make any name: a socket counts only in a directory of this user or of root.

    The directory of the system's daemon belongs to the daemon's own user, under a parent that only root can write.
    """
    if not directory.startswith("/tmp/"):
        return True
    return os.lstat(directory).st_uid in (os.getuid(), 0)
