"""The gRPC server around the control services: its listeners, its bounds, health and reflection."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Sequence
from typing import Any, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvd.wire.endpoints import format_host_port

MAX_MESSAGE_BYTES = 4 << 20
#: Calls being answered at a time, open session streams included.
MAX_CALLS = 2048
MAX_STREAMS_PER_CONNECTION = 256

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
    ("grpc.max_metadata_size", 16 << 10),
    # A peer that has vanished without a word is noticed.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Clients may ask once a second whether the daemon lives.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    # Two daemons must not share a port without knowing of each other.
    ("grpc.so_reuseport", 0),
]


class ControlServer:
    """A ``grpc.aio`` server; make and use it on the event loop."""

    def __init__(self) -> None:
        self._server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
        self._health: Any = cast(Any, health).aio.HealthServicer()
        self._services: Sequence[str] = ()

    def listen_unix(self, path: str) -> None:
        """Binds the socket; the caller has removed a stale one and set the umask. Raises RuntimeError."""
        self._server.add_insecure_port(f"unix:{path}")

    def listen_tcp(self, host: str, port: int) -> int:
        """Binds and returns the port. Raises OSError, saying why."""
        # gRPC does not tell why it cannot bind; a socket of our own does.
        with bind(host, port):
            pass
        try:
            return self._server.add_insecure_port(format_host_port(host, port))
        except RuntimeError as error:
            raise OSError(str(error)) from error

    async def start(self, services: Sequence[str], handlers: Sequence[grpc.GenericRpcHandler[Any, Any]]) -> None:
        """Answers from now on: ``services`` by ``handlers``, and health and reflection."""
        self._services = services
        self._server.add_generic_rpc_handlers(handlers)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        for service in services:
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()

    async def stop_serving(self) -> None:
        """Tells health checks that the daemon is going; calls are still answered."""
        await asyncio.wait_for(self._health.enter_graceful_shutdown(), 1.0)

    async def stop(self, grace_s: float) -> None:
        """Takes no calls any more and ends those that are still open after ``grace_s``."""
        await self._server.stop(grace_s)


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket bound to the first address of ``host``, not listening yet. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    bound = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def remove_stale_socket(path: str) -> None:
    """Removes a socket that a dead daemon has left. The caller holds the lock that says that none lives.

    Raises FileExistsError when ``path`` is something else than a socket.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(f"{path} exists and is not a socket")
    os.unlink(path)
