"""Clients that say half of something and wait: none of them keeps another from being answered."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from unittest import mock

import pytest
import uvicorn
from mlx_hybridcache_server import log as quiet
from mlx_hybridcache_server.http import connections
from mlx_hybridcache_server.http.connections import Awaited, Connection, Crowd, room
from mlx_hybridcache_server.log import Once
from servers import CHAT, COMPLETIONS, OURS, begin, raw_post, raw_status, read_all, running, user

GET = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
HALF_HEAD = GET[:30]
HALF_BODY = b"POST /body HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n{"


async def app(scope, receive, send):
    """Answers at once, when the body is there, or with one event every 50 ms."""
    path = scope["path"]
    if path == "/later":
        await asyncio.sleep(1.5)
    if path in ("/body", "/later"):
        message = await receive()
        while message.get("more_body"):
            message = await receive()
        if message["type"] == "http.disconnect":
            return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if path == "/stream":
        for number in range(20):
            await asyncio.sleep(0.05)
            await send({"type": "http.response.body", "body": b"%d " % number, "more_body": True})
    if path == "/large":
        await send({"type": "http.response.body", "body": b"x" * 64 * 2**20, "more_body": True})
    await send({"type": "http.response.body", "body": b"xx"})


class Served:
    """uvicorn with our connections, in a thread, on a port of its own."""

    def __init__(self, most: int):
        self.crowd = Crowd(most)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        config = uvicorn.Config(
            app,
            http=partial(Connection, crowd=self.crowd),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=5,
        )
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self._listening]}
        )
        self._thread.start()

    def connections(self) -> int:
        """Those that the server holds."""
        return len(self.server.server_state.connections)

    def settled(self, count: int) -> bool:
        """Whether it comes to hold so many."""
        until = time.monotonic() + 20
        while self.connections() != count and time.monotonic() < until:
            time.sleep(0.01)
        return self.connections() == count

    def close(self) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@contextmanager
def served(most: int = 1000) -> Iterator[Served]:
    found = Served(most)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def short(monkeypatch):
    """The times are tenths of a second."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(connections, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(connections, "UNSENT_SECONDS", 0.3)


@pytest.fixture
def opened():
    """Opens connections that send something, and closes all of them in the end."""
    with ExitStack() as stack:
        yield lambda server, sent: stack.enter_context(begin(server, sent))


def answered(connection: socket.socket) -> int:
    """The status of a reply in chunks that is read to its end, while the connection stays."""
    received = b""
    while not received.endswith(b"\r\n0\r\n\r\n"):
        received += (part := connection.recv(1000))
        assert part, received
    return raw_status(received)


def error_of(received: bytes) -> dict[str, str]:
    """OpenAI's error object of a raw reply."""
    return json.loads(received.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.parametrize(
    "sent", [HALF_HEAD, HALF_BODY, GET + HALF_HEAD], ids=["head", "body", "2nd"]
)
def test_what_does_not_arrive_in_time_is_answered_with_408(short, opened, sent):
    """Half a header, half a body, half a header behind a whole request; then it is closed."""
    with served() as server:
        received = read_all(opened(server, sent))
        if sent.startswith(GET):
            received = received.partition(b"xx\r\n0\r\n\r\n")[2]
        assert raw_status(received) == 408
        assert error_of(received)["code"] == "request_timeout"


def test_a_connection_that_says_nothing_is_closed_without_a_word(short, opened):
    """A browser that opens one in advance is told nothing that it did not ask for."""
    with served() as server:
        assert read_all(opened(server, b"")) == b""


def test_a_header_that_drips_is_not_waited_for(short, opened):
    """A byte now and then starts no new time."""
    with served() as server:
        connection = opened(server, b"")
        with suppress(OSError):
            for byte in HALF_HEAD * 100:
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
            pytest.fail("it was never closed")


def test_a_body_that_advances_is_waited_for(monkeypatch, opened):
    """50 bytes each 50 ms are what is asked for here; less is too slow."""
    monkeypatch.setattr(connections, "BODY_SECONDS", 1.0)
    monkeypatch.setattr(connections, "BODY_BYTES", 100)
    head = b"POST /body HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 2000\r\n\r\n"
    with served() as server:
        connection = opened(server, head)
        for _ in range(40):
            connection.sendall(b"x" * 50)
            time.sleep(0.05)
        assert raw_status(read_all(connection)) == 200
        slow = opened(server, head)
        slow.sendall(b"x")
        assert raw_status(read_all(slow)) == 408


def test_a_body_that_nobody_reads_is_waited_for(short, opened):
    """4 MiB, which the server takes after 1.5 s, five times what a client has: it could send no more."""
    head = (
        b"POST /later HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 4194304\r\n\r\n"
    )
    with served() as server:
        assert raw_status(read_all(opened(server, head + b"x" * 2**22))) == 200


def test_a_reply_and_its_silence_may_last(short, opened):
    """A stream of a second, three times the time for a header: events like it may last for hours."""
    with served() as server:
        received = read_all(
            opened(server, GET.replace(b"/health", b"/stream").replace(b"1.1", b"1.0"))
        )
        assert raw_status(received) == 200
        assert received.endswith(b"18 19 xx")


def test_what_nobody_takes_is_dropped(short, opened):
    """64 MB of a reply that is never read: the connection, and what it holds, ends."""
    with served() as server:
        connection = opened(server, GET.replace(b"/health", b"/large"))
        connection.recv(1)
        assert server.settled(0)


def test_the_slowest_connections_make_room(opened):
    """Ten places and 50 half headers: 51st, a request is answered; those that are served stay."""
    with served(most=10) as server:
        stream = opened(server, GET.replace(b"/health", b"/stream").replace(b"1.1", b"1.0"))
        stream.recv(1)
        for sent in (HALF_HEAD, HALF_BODY, b"", GET):
            slow = [opened(server, sent) for _ in range(50)]
            assert raw_status(opened(server, GET).recv(1000)) == 200
            assert server.connections() <= 11
            for connection in slow:
                connection.close()
        assert read_all(stream).endswith(b"18 19 xx")


def test_headers_give_way_before_idle_connections_and_those_before_bodies(opened):
    """An agent that thinks keeps its connection while strangers do not even say what they want."""
    with served(most=3) as server:
        idle, body = opened(server, GET), opened(server, HALF_BODY)
        assert answered(idle) == 200
        head = opened(server, HALF_HEAD)
        assert server.settled(3)
        first = opened(server, GET)
        assert answered(first) == 200
        assert raw_status(read_all(head)) == 408
        opened(server, HALF_HEAD)
        assert read_all(idle) == b""
        body.sendall(b"x" * 99_999)
        assert answered(body) == 200


def test_who_gave_way_has_no_place_any_more():
    """One place: the first gives it up to the second, and once that has left, the third asks nobody."""
    crowd, (first, second, third) = Crowd(1), (mock.Mock() for _ in range(3))
    assert crowd.enter(first)
    crowd.note(first, Awaited.HEAD)
    assert crowd.enter(second)
    crowd.leave(second)
    assert crowd.enter(third)
    assert first.give_way.call_count == 1
    crowd.note(second, Awaited.HEAD)  # one that left waits for nothing
    assert not crowd.enter(first)


def test_where_all_are_served_more_are_refused_politely(opened):
    """Two streams in two places: the third hears 503 and when to come again."""
    with served(most=2) as server:
        streams = [
            opened(server, GET.replace(b"/health", b"/stream").replace(b"1.1", b"1.0"))
            for _ in range(2)
        ]
        for stream in streams:
            stream.recv(1)
        received = read_all(opened(server, GET))
        assert raw_status(received) == 503
        assert b"retry-after: 5" in received
        assert error_of(received)["code"] == "too_many_connections"
        assert [read_all(stream)[-8:] for stream in streams] == [b"18 19 xx"] * 2
        assert raw_status(opened(server, GET).recv(1000)) == 200


def test_what_is_no_http_is_answered_in_json_even_behind_a_reply(opened, caplog):
    """A chunk of no length, behind a reply that came early: closed, and no traceback."""
    with served() as server:
        assert error_of(read_all(opened(server, b"GET\r\n\r\n")))["code"] == "invalid_http"
        early = b"POST /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection = opened(server, early)
        assert raw_status(connection.recv(1000)) == 200
        connection.sendall(b"zz\r\n")
        read_all(connection)
    assert not [record for record in caplog.records if record.exc_info]


def test_a_server_that_stops_waits_for_no_body(opened):
    """It would be waited for until the time for replies is over."""
    server = Served(10)
    connection = opened(server, HALF_BODY)
    assert server.settled(1)
    server.close()
    assert raw_status(read_all(connection)) == 503


def test_there_are_places_for_all_that_may_be_busy(monkeypatch):
    """544 may run or wait, by default; with more, more connections; never more than half the files."""
    limits = [(2048, 4096)]
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(connections.resource, "setrlimit", lambda _, new: limits.append(new))
    assert room(32 + 512) == 1024
    assert limits == [(2048, 4096)]
    assert room(3000) == 3256
    assert limits[-1] == (3512, 4096)
    assert room(9000) == 4096 - 256
    limits[:] = [(256, 256)]
    assert room(544) == 128


def test_the_server_answers_beside_more_slow_connections_than_it_takes(opened):
    """1,200 half headers and bodies against 1,024 places; its log says it in a line."""
    with running(OURS) as server:
        half = raw_post(CHAT, b"{}", Content_Length="1000")
        for number in range(1200):
            opened(server, half[:40] if number % 8 else half)
        assert server.healthy
        assert server.answer(CHAT, messages=user("Hi"), max_tokens=1)
        assert server.answer(COMPLETIONS, prompt="a", max_tokens=1)
        warnings = [line for line in server.log.splitlines() if " WARNING " in line]
        assert len(warnings) == 1
        assert "slow ones end" in warnings[0]
        if os.path.isdir(files := f"/proc/{server.process.pid}/fd"):  # noqa: PTH112
            assert len(os.listdir(files)) < 1024 + 256  # noqa: PTH208


# The log


def test_a_warning_is_said_once_a_minute_with_a_count(monkeypatch):
    """Of 1,000 that differ in no first line, one; a minute later, the next tells of the others."""
    now = [0.0]
    monkeypatch.setattr(quiet.time, "monotonic", lambda: now[0])
    once, said = Once(), []

    def warn(message, *args, level=logging.WARNING, exc_info=None):
        record = logging.LogRecord("a", level, "f", 1, message, args, exc_info)
        if once.filter(record):
            said.append(record.getMessage())

    for number in range(1000):
        warn("accept() failed\nsocket %d", number)
    assert said == ["accept() failed\nsocket 0"]
    now[0] += 61
    warn("accept() failed\nsocket 5")
    assert said[-1] == "accept() failed\nsocket 5 (and 999 more before)"
    for _ in range(2):
        warn("another")
        warn("told", level=logging.INFO)
    assert said[-3:] == ["another", "told", "told"]


def test_failures_in_different_places_are_all_said():
    """Two exceptions of one type: their tracebacks are what is wanted."""
    once = Once()

    def passed(fail):
        try:
            fail()
        except ValueError as error:
            info = (type(error), error, error.__traceback__)
        return once.filter(logging.LogRecord("a", logging.ERROR, "f", 1, "failed", (), info))

    assert [passed(fail) for fail in (lambda: int("x"), lambda: float("y"), lambda: int("x"))]
    same = partial(passed, partial(int, "x"))
    assert [same(), same()] == [True, False]
