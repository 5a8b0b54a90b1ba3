"""The small HTTP server: what it answers, and what it does not put up with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from kvd import http
from kvd.control import bind
from kvd.http import HttpServer, Page

Talk = Callable[[Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]], Awaitable[None]]
DEADLINE_S = 10


def broken(accept: str) -> Page:
    raise RuntimeError("this page is broken")


def talk(conversation: Talk) -> None:
    """Runs a conversation with a server; it gets a way to connect."""

    async def run() -> None:
        pages = {"/hello": lambda accept: Page(200, f"hello {accept}".encode()), "/broken": broken}
        server = HttpServer(pages)
        listener = bind("127.0.0.1", 0)
        port = listener.getsockname()[1]
        await server.start(listener)
        writers = []

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
            return reader, writer

        try:
            await asyncio.wait_for(conversation(connect), DEADLINE_S)
        finally:
            for writer in writers:
                writer.close()
            await server.close()

    asyncio.run(run())


def ask(request: bytes) -> bytes:
    """All that comes back for these bytes until the server closes."""
    answers = []

    async def conversation(connect: Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]) -> None:
        reader, writer = await connect()
        writer.write(request)
        answers.append(await reader.read())

    talk(conversation)
    return answers[0]


def test_a_page_is_served_with_the_accept_header_of_its_request() -> None:
    answer = ask(b"GET /hello?x=1 HTTP/1.1\r\nhost: a\r\naccept: text/x\r\nconnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"content-length: 12\r\n" in answer.lower()
    assert answer.endswith(b"\r\n\r\nhello text/x")


def test_head_has_no_body() -> None:
    answer = ask(b"HEAD /hello HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\n")


def test_an_unknown_page_says_which_there_are() -> None:
    answer = ask(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"/hello" in answer


def test_other_methods_are_not_allowed() -> None:
    answer = ask(b"POST /hello HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\nconnection: close\r\n\r\nabc")
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"allow: get, head" in answer.lower()


def test_a_connection_serves_several_requests() -> None:
    one = b"GET /hello HTTP/1.1\r\nhost: a\r\n\r\n"
    answer = ask(one + one + b"GET /hello HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 ") == 3


@pytest.mark.parametrize(
    "request_bytes", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"no http at all\r\n\r\n"]
)
def test_what_is_no_http_is_refused(request_bytes: bytes) -> None:
    assert ask(request_bytes).startswith(b"HTTP/1.1 400 ")


def test_headers_without_end_are_refused() -> None:
    answer = ask(b"GET /hello HTTP/1.1\r\nx: " + b"a" * (4 * http.MAX_REQUEST_BYTES))
    assert answer.startswith(b"HTTP/1.1 431 ") or answer == b""


def test_a_client_that_does_not_finish_its_request_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_TIMEOUT_S", 0.05)
    assert ask(b"GET /hello HT") == b""


def test_connections_beyond_the_bound_are_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 2)

    async def conversation(connect: Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]) -> None:
        one = b"GET /hello HTTP/1.1\r\nhost: a\r\n\r\n"
        first = [await connect() for _ in range(2)]
        for reader, writer in first:
            writer.write(one)
            assert (await reader.readuntil(b"hello ")).startswith(b"HTTP/1.1 200 ")
        reader, _ = await connect()
        assert await reader.read() == b""
        reader, writer = first[0]
        writer.write(one)
        assert (await reader.readuntil(b"hello ")).startswith(b"HTTP/1.1 200 ")

    talk(conversation)


def test_a_broken_page_breaks_its_connection_only() -> None:
    async def conversation(connect: Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]) -> None:
        reader, writer = await connect()
        writer.write(b"GET /broken HTTP/1.1\r\nhost: a\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 500 ")
        reader, writer = await connect()
        writer.write(b"GET /hello HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")

    talk(conversation)
