"""A daemon that was about to stop when a client came: the client comes again, however gRPC takes it."""

from __future__ import annotations

import socket
import struct

from kvd_client import Client
from tests.wait import wait_until

TIMEOUT_S = 20.0
_SETTINGS, _GOAWAY, _INTERNAL_ERROR = 4, 7, 2


def frame(kind: int, payload: bytes) -> bytes:
    """An HTTP/2 frame of the whole connection (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, 0]) + bytes(4) + payload


def listening(port: int = 0) -> socket.socket:
    """A listener on this machine."""
    listener = socket.create_server(("127.0.0.1", port))
    listener.settimeout(TIMEOUT_S)
    return listener


def test_a_client_that_meets_a_daemon_on_its_way_out_comes_again() -> None:
    with listening() as listener:
        port = listener.getsockname()[1]
        with Client(f"tcp://127.0.0.1:{port}") as client:
            first, _ = listener.accept()
            with first:
                first.settimeout(TIMEOUT_S)
                first.sendall(frame(_SETTINGS, b""))
                assert first.recv(1 << 16)  # it speaks
                listener.close()  # and nobody listens when it tries the call again
                first.sendall(frame(_GOAWAY, struct.pack(">II", 0, _INTERNAL_ERROR)))
            wait_until(lambda: client.last_error, TIMEOUT_S, "the client to notice")
            with listening(port) as next_daemon:
                again, _ = next_daemon.accept()
                again.close()
