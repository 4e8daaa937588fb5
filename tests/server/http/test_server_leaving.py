"""Clients that go away, read slowly or ask a hundred things at once: each is served, or let go."""

from __future__ import annotations

import asyncio
import json
import socket
import threading

import httpx2
import pytest
from bundled import text
from mlx_hybridcache_server.http.event_stream import EventStream
from servers import (
    CHAT,
    COMPLETIONS,
    INSTANT,
    Server,
    begin,
    raw_post,
    user,
)
from serving.refusals import unharmed
from starlette.requests import ClientDisconnect


@pytest.fixture
def server(server):
    with unharmed(server):
        yield server


def running_bytes(server: Server) -> int:
    return int(server.client.get("/v1/cache").json()["running_bytes"])


def wait_until_idle(server: Server) -> None:
    """Until no request holds memory; by then abandoned ones must have ended."""
    idle = threading.Event()
    for _ in range(300):
        if running_bytes(server) == 0:
            return
        idle.wait(0.05)
    raise AssertionError("an abandoned request still runs")


def test_a_body_that_never_comes_whole_blocks_nobody(server):
    """Ten connections that sent half of their body, and ten that sent half a header."""
    body = json.dumps({"messages": user("Hi"), "max_tokens": 1}).encode()
    half = raw_post(CHAT, body)[: -len(body) // 2]
    waiting = [begin(server, sent) for sent in [half, half[:40]] * 10]
    assert server.answer(CHAT, messages=user("Hi"), max_tokens=1)
    for connection in waiting:
        connection.close()


def test_a_client_that_vanishes_in_the_middle_of_a_stream_ends_its_request(server):
    """Of 100,000 tokens asked for, the rest is not generated."""
    body = {"prompt": "a", "max_tokens": 100_000, "stream": True, "logit_bias": {"700": 100}}
    for _ in range(3):
        with server.client.stream("POST", COMPLETIONS, json=body) as response:
            lines = response.iter_lines()  # dropping it would close the connection
            next(line for line in lines if line.startswith("data:"))
            assert running_bytes(server) > 0
    wait_until_idle(server)


def test_a_client_that_vanishes_while_its_prompt_is_read_leaves_its_checkpoints(server):
    """Asked again, part of the prompt is there; not streamed, it goes away too."""
    prompt = text(5000)
    body = {"prompt": prompt, "max_tokens": 1}
    with server.client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as response:
        next(line for line in response.iter_lines() if line.startswith(": keepalive"))
    wait_until_idle(server)
    connection = begin(server, raw_post(COMPLETIONS, json.dumps(body | {"max_tokens": 9}).encode()))
    connection.close()
    wait_until_idle(server)
    reply = server.answer(COMPLETIONS, **body)
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] >= 1024


def test_a_client_that_reads_slowly_delays_nobody(server):
    """A stream that nobody reads does not keep others from being served."""
    body = {"prompt": "a", "max_tokens": 3000, "stream": True, "logit_bias": {"700": 100}}
    connection = begin(server, raw_post(COMPLETIONS, json.dumps(body).encode()))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    assert server.answer(CHAT, messages=user("Hi"), max_tokens=1)
    connection.close()
    wait_until_idle(server)


def test_many_hostile_requests_at_once_and_good_ones_between(server):
    """Thirty at a time, a third of them good: those are answered, all the others refused."""
    statuses: dict[int, list[int]] = {200: [], 400: []}

    def ask(number: int) -> None:
        wrong = number % 3 != 0
        body = {"messages": user(f"Hi, I am number {number}."), "max_tokens": 2, **INSTANT}
        if wrong:
            body["stop"] = number
        with httpx2.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            statuses[400 if wrong else 200].append(client.post(CHAT, json=body).status_code)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == {200: [200] * 10, 400: [400] * 20}


def test_a_stream_to_nobody_lets_go_of_what_it_held():
    """The first byte meets a connection that is gone: the stream ends with an error, and all is given back."""
    closed = []

    async def events():
        try:
            yield b"a"
        finally:
            closed.append("events")

    async def send(message):
        raise OSError("gone")

    scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
    with pytest.raises(ClientDisconnect):
        asyncio.run(EventStream(events(), lambda: closed.append("places"))(scope, None, send))
    assert closed[-1] == "places"
