"""Clients that vanish, dawdle or never read: nothing is left of them, and nobody waits for them."""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
from bundled import text
from long import forms
from prometheus_client.parser import text_string_to_metric_families
from servers import (
    CHAT,
    COMPLETIONS,
    INSTANT,
    OURS,
    Server,
    begin,
    raw_post,
    raw_status,
    read_all,
    running,
    user,
)

FLAGS = ("--max-tokens", "2", "--max-prompt-tokens", "2000", "--prefill-step-size", "256")
linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="threads and files are counted in /proc"
)
HELLO = {"prompt": "def", "max_tokens": 3}
ENDLESS = {"prompt": "a", "max_tokens": 100_000, "logit_bias": {"700": 100}, "cache_prompt": False}
numbers = count(1)


def gauges(server: Server) -> dict[str, float]:
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    samples = (sample for family in families for sample in family.samples)
    found = {s.name.removeprefix("mlx_hybridcache_"): s.value for s in samples if not s.labels}
    return {name: found[name] for name in ("reading", "following", "writing", "queued")}


def footprint(server: Server) -> dict[str, float]:
    """What a request may hold while it runs, and must have given back."""
    assert server.process is not None
    proc = Path("/proc") / str(server.process.pid)
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return {
        "threads": int(status["Threads"]),
        "files": sum(1 for _ in (proc / "fd").iterdir()),
        "running_bytes": server.client.get("/v1/cache").json()["running_bytes"],
        **gauges(server),
    }


def resident_bytes(server: Server) -> int:
    assert server.process is not None
    pages = (Path("/proc") / str(server.process.pid) / "statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def wait_until(holds: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(0.01)


def told(connection: socket.socket, *words: bytes) -> None:
    """Read until one of these has come."""
    received = b""
    while not any(word in received for word in words):
        part = connection.recv(4096)
        assert part, received
        received += part


Act = Callable[[Server, bool], socket.socket]


def posted(server: Server, stream: bool, share: float = 1, **body: Any) -> socket.socket:
    """A connection on which so much of a request has been sent."""
    sent = raw_post(COMPLETIONS, json.dumps({**body, "stream": stream}).encode())
    head = sent.index(b"\r\n\r\n") + 4
    at = {0.1: 9, 0.5: head // 2, 0.8: (head + len(sent)) // 2, 1: len(sent)}[share]
    return begin(server, sent[:at])


def while_reading(server: Server, stream: bool) -> socket.socket:
    prompt = f"{next(numbers)}. {text(1300)}"  # which nothing stored begins with
    connection = posted(server, stream, prompt=prompt, max_tokens=1)
    if stream:
        told(connection, b": keepalive")
    else:
        wait_until(lambda: gauges(server)["reading"] > 0, "the prompt was never read")
    return connection


def while_writing(server: Server, stream: bool) -> socket.socket:
    connection = posted(server, stream, **ENDLESS)
    if stream:
        told(connection, b"data:")
    else:
        wait_until(lambda: gauges(server)["writing"] > 0, "nothing was written")
    return connection


def without_reading(server: Server, stream: bool) -> socket.socket:
    """Large events, which nobody takes."""
    connection = posted(server, stream, **ENDLESS, logprobs=20)
    wait_until(lambda: gauges(server)["writing"] > 0, "nothing was written")
    time.sleep(0.05)
    return connection


STAGES: dict[str, Act] = {
    "connected": lambda server, stream: begin(server, b""),
    "half a request line": lambda server, stream: posted(server, stream, 0.1, **HELLO),
    "half the headers": lambda server, stream: posted(server, stream, 0.5, **HELLO),
    "half the body": lambda server, stream: posted(server, stream, 0.8, **HELLO),
    "before the reply": lambda server, stream: posted(server, stream, **HELLO),
    "while the prompt is read": while_reading,
    "while the reply is written": while_writing,
    "without ever reading": without_reading,
}


def vanish(connection: socket.socket, *, reset: bool) -> None:
    """Close the connection, politely or with a reset."""
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.fixture(scope="module")
def process():
    with running(OURS, *FLAGS) as server:
        yield server


@pytest.fixture(scope="module")
def visited(process):
    """A server that has seen a client vanish at every stage once, so that its pools are filled."""
    for act in STAGES.values():
        for stream in (False, True):
            vanish(act(process, stream), reset=stream)
    return process


@linux_only
@pytest.mark.parametrize("times", forms(2, 10))
@pytest.mark.parametrize("stream", [False, True], ids=["unstreamed", "streamed"])
@pytest.mark.parametrize("stage", STAGES)
def test_clients_that_vanish_leave_nothing_behind(visited, stage, stream, times):
    """Two or ten at each stage, every second one with a reset: threads, files and bytes are as before."""
    server = visited
    expected = server.answer(COMPLETIONS, **HELLO)["choices"]
    wait_until(lambda: not any(gauges(server).values()), "the last request still runs")
    before = footprint(server)
    for number in range(times):
        vanish(STAGES[stage](server, stream), reset=number % 2 == 1)
        assert server.answer(COMPLETIONS, **HELLO)["choices"] == expected
    after: dict[str, float] = {}

    def is_as_before() -> bool:
        after.update(footprint(server))
        return all(after[name] <= before[name] for name in before)

    wait_until(is_as_before, f"{before} became {after}")
    assert server.healthy


@linux_only
@pytest.mark.parametrize("rounds", forms(1, 2))
def test_memory_stays_where_it_was_when_clients_vanish(visited, rounds):
    """Twice so many rounds of every stage: the second takes no more; without the cache's content nothing is held."""
    server = visited

    def go_round() -> int:
        for _ in range(rounds):
            for act in STAGES.values():
                for stream in (False, True):
                    vanish(act(server, stream), reset=stream)
        wait_until(lambda: not any(gauges(server).values()), "an abandoned request still runs")
        cleared = server.client.delete("/v1/cache").json()
        assert cleared["held_bytes"] == cleared["running_bytes"] == 0
        return resident_bytes(server)

    first = go_round()
    assert go_round() < first + 2**26


# Clients that dawdle


def test_clients_that_send_a_byte_a_second_keep_nobody_waiting(process):
    """Twenty of them, with headers and bodies that never end; ten others are answered meanwhile."""
    body = json.dumps(HELLO).encode()
    whole = raw_post(COMPLETIONS, body)
    dawdling = [begin(process, whole[: -len(body)] if i % 2 else b"") for i in range(20)]
    stop = threading.Event()
    sent = [len(whole) - len(body) if i % 2 else 0 for i in range(20)]

    def drip() -> None:
        while not stop.wait(1):
            for i, connection in enumerate(dawdling):
                connection.sendall(whole[sent[i] : sent[i] + 1])
                sent[i] += 1

    dripping = threading.Thread(target=drip)
    dripping.start()
    expected = process.answer(COMPLETIONS, **HELLO)["choices"]
    for _ in range(10):
        assert process.answer(COMPLETIONS, **HELLO)["choices"] == expected
        stop.wait(0.15)
    stop.set()
    dripping.join()
    assert all(0 < at < len(whole) for at in sent), "nobody dawdled"
    # What they send to the end is answered like anybody's.
    for i, connection in enumerate(dawdling):
        connection.sendall(whole[sent[i] :])
        assert raw_status(received := read_all(connection)) == 200
        assert json.loads(received.split(b"\r\n\r\n", 1)[1])["choices"] == expected


@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "chunked"])
def test_a_body_that_comes_in_pieces_is_read_whole(process, chunked):
    """Twelve pieces, the cuts through words, numbers and a character of four bytes."""
    request = {"messages": user("Hi \N{GRINNING FACE}, I am Zoe."), "max_tokens": 6, **INSTANT}
    body = json.dumps(request, ensure_ascii=False).encode()
    expected = process.answer(CHAT, **request)["choices"]
    cuts = sorted({len(body) * i // 12 for i in range(13)} | {body.index(b"\xf0") + 2})
    pieces = [body[a:b] for a, b in pairwise(cuts)]
    lengths = {"Content_Length": "", "Transfer_Encoding": "chunked"} if chunked else {}
    head = raw_post(CHAT, body, **lengths).removesuffix(body)
    connection = begin(process, head)
    for piece in pieces:
        time.sleep(0.03)
        connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
    if chunked:
        connection.sendall(b"0\r\n\r\n")
    received = read_all(connection)
    assert raw_status(received) == 200
    assert json.loads(received.split(b"\r\n\r\n", 1)[1])["choices"] == expected
