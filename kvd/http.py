"""HTTP for people, probes and Prometheus: a few fixed pages. h11 on asyncio; size, time and connections are bounded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from typing import NamedTuple

import h11

log = logging.getLogger(__name__)

#: A connection that has not sent a whole request by then is closed; so is one that is idle that long.
REQUEST_TIMEOUT_S = 10.0
WRITE_TIMEOUT_S = 10.0
MAX_CONNECTIONS = 64
MAX_REQUEST_BYTES = 16384
TEXT = "text/plain; charset=utf-8"


class Page(NamedTuple):
    """An answer."""

    status: int
    body: bytes
    content_type: str = TEXT


#: Makes a page; gets the request's Accept header.
Handler = Callable[[str], Page]


class HttpServer:
    """Serves ``pages``: path to handler."""

    def __init__(self, pages: Mapping[str, Handler]) -> None:
        self._pages = pages
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, listener: socket.socket) -> None:
        """Serves on a bound socket, which is this server's from now on."""
        self._server = await asyncio.start_server(self._connected, sock=listener, limit=MAX_REQUEST_BYTES)

    async def close(self) -> None:
        """Stops listening and ends every connection."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass
        except Exception:
            log.exception("http")
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST_BYTES)
        while True:
            try:
                request = await asyncio.wait_for(_receive(connection, reader), REQUEST_TIMEOUT_S)
                if request is None:
                    return
                page, head_only = self._answer(request), request.method == b"HEAD"
            except h11.RemoteProtocolError as error:
                page, head_only = Page(error.error_status_hint, f"{error}\n".encode()), False
            _send(connection, writer, page, head_only)
            await asyncio.wait_for(writer.drain(), WRITE_TIMEOUT_S)
            if page.status == 500 or connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return
            connection.start_next_cycle()

    def _answer(self, request: h11.Request) -> Page:
        path = request.target.split(b"?", 1)[0].decode("ascii", "replace")
        handler = self._pages.get(path)
        if handler is None:
            return Page(404, f"nothing here; there are {', '.join(self._pages)}\n".encode())
        if request.method not in (b"GET", b"HEAD"):
            return Page(405, b"GET or HEAD\n")
        accept = b",".join(value for name, value in request.headers if name == b"accept")
        try:
            return handler(accept.decode("ascii", "replace"))
        except Exception:
            log.exception("the page %s failed", path)
            return Page(500, b"this page has failed; the daemon's log says more\n")


async def _receive(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    """The next request, its body thrown away; None when the client has gone."""
    request: h11.Request | None = None
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(MAX_REQUEST_BYTES))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.EndOfMessage):
            return request
        elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            return None


def _send(connection: h11.Connection, writer: asyncio.StreamWriter, page: Page, head_only: bool) -> None:
    headers = [("content-type", page.content_type), ("content-length", str(len(page.body)))]
    if page.status == 405:
        headers.append(("allow", "GET, HEAD"))
    with contextlib.suppress(h11.LocalProtocolError):  # the client broke the protocol too early to be answered
        writer.write(connection.send(h11.Response(status_code=page.status, headers=headers)) or b"")
        if not head_only:
            writer.write(connection.send(h11.Data(data=page.body)) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
