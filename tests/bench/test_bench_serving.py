"""What asks servers: the client, the scenarios and the clients at once. No model is needed here."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlx_hybridcache_bench.kit.text import tokenizer_of
from mlx_hybridcache_bench.serving.client import CHAT, COMPLETIONS, Client, Reply, RequestFailed
from mlx_hybridcache_bench.serving.crowd import (
    NONCES,
    Sizes,
    measure_situation,
    percentile,
)
from mlx_hybridcache_bench.serving.events import events
from mlx_hybridcache_bench.serving.mixture import CLIENTS, Habit
from mlx_hybridcache_bench.serving.scenarios import SCENARIOS, Material, Script, Step
from mlx_hybridcache_bench.serving.servers import Launch, ServerError, ServerProcess
from mlx_hybridcache_bench.serving.side import Nonces, Side, fresh_nonce
from mlx_hybridcache_bench.serving.target import Target

from mlx_hybridcache.demo import BUNDLED_MODEL


class Canned(BaseHTTPRequestHandler):
    """Answers a POST with the stream that its path names."""

    streams: dict[str, list[str]]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200 if self.path in self.streams else 404)
        self.send_header("Content-type", "text/event-stream")
        self.end_headers()
        for event in self.streams.get(self.path, ["no such path"]):
            self.wfile.write(f"{event}\n\n".encode())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class's name
        pass


def data(chunk: Any) -> str:
    return f"data: {json.dumps(chunk)}"


def delta(**fields: Any) -> str:
    return data({"choices": [{"index": 0, "delta": {"role": "assistant", **fields}}]})


USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 60},
}
END = [data({"choices": [], "usage": USAGE}), "data: [DONE]"]


@pytest.fixture
def ask() -> Iterator[Any]:
    """A function that answers one request with a given stream."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Canned)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    client = Client(f"http://127.0.0.1:{server.server_port}", timeout_seconds=10)

    def answered(events: list[str], path: str = CHAT) -> Reply:
        Canned.streams = {CHAT: events, COMPLETIONS: events}
        return client.ask(path, {"messages": []})

    yield answered
    client.close()
    server.shutdown()
    server.server_close()


def test_a_reply_is_put_together_from_its_stream(ask: Any) -> None:
    """Reasoning, content and a call in two pieces; tokens as the server counted them."""
    call = {"index": 0, "id": "call_1", "function": {"name": "look", "arguments": '{"at"'}}
    rest = {"index": 0, "function": {"arguments": ": 1}"}}
    finish = data({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    reply = ask(
        [
            ": keepalive 50/100",
            delta(),
            delta(reasoning="Hm"),
            delta(reasoning="m.", reasoning_content="m."),
            delta(content="\n\nSo"),
            delta(tool_calls=[call]),
            delta(tool_calls=[rest]),
            finish,
            *END,
        ]
    )
    assert (reply.reasoning, reply.content, reply.finish_reason) == ("Hmm.", "\n\nSo", "tool_calls")
    assert (reply.prompt_tokens, reply.cached_tokens, reply.read_tokens) == (100, 60, 40)
    assert reply.message() == {
        "role": "assistant",
        "content": "So",
        "reasoning_content": "Hmm.",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "look", "arguments": '{"at": 1}'},
            }
        ],
    }


def test_raw_text_is_read_from_choices(ask: Any) -> None:
    """`/v1/completions` has no deltas."""
    texts = [data({"choices": [{"index": 0, "text": piece}]}) for piece in ("a", "", "b")]
    assert ask([*texts, *END], COMPLETIONS).content == "ab"


@pytest.mark.parametrize(
    ("events", "sentence"),
    [
        ([delta(content="a")], "broke off"),
        ([delta(content="a"), data({"error": {"message": "out of memory"}})], "out of memory"),
        (END, "without a reply"),
    ],
)
def test_a_stream_that_fails_is_a_failure(ask: Any, events: list[str], sentence: str) -> None:
    """Broken off before [DONE], an error event, nothing at all: never a measurement."""
    with pytest.raises(RequestFailed, match=sentence):
        ask(events)


def test_a_refusal_is_a_failure_with_what_the_server_said(ask: Any) -> None:
    """Status 404 and its body."""
    with pytest.raises(RequestFailed, match="404: no such path"):
        ask([], "/elsewhere")


MORTAL = """
import http.server, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if b"last straw" in body:
            os._exit(1)
        self.send_response(200)
        self.send_header("Content-type", "text/event-stream")
        self.end_headers()
        usage = b'"usage": {"prompt_tokens": 9, "completion_tokens": 1}'
        self.wfile.write(b'data: {"choices": [{"text": "a"}], ' + usage + b'}\\n\\ndata: [DONE]\\n\\n')

    def log_message(self, *args):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def material() -> Material:
    """Text by the token of the bundled model."""
    return Material(tokenizer_of(str(BUNDLED_MODEL)), 2_000)


def three_requests() -> Script:
    """The second of which ends the process above."""
    for name in ("one", "last straw", "three"):
        yield Step(name, COMPLETIONS, {"prompt": name})


@pytest.fixture
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request instead of the scenarios that warm a server."""

    def script(material: Material, nonce: str, size: int) -> Script:
        yield Step("warm", COMPLETIONS, {"prompt": "warm"})

    for warm_up in ("throughput", "repeat"):
        monkeypatch.setitem(SCENARIOS, warm_up, script)


@pytest.mark.usefixtures("short_warm_up")
def test_a_server_that_dies_is_started_again_and_the_run_goes_on(material: Material) -> None:
    """The death is noted, and the third request is answered by a new process."""
    with ServerProcess(Launch("mortal", ("-c", MORTAL))) as process:
        process.wait_ready()
        target = Target(process)
        side = Side(target, material, 600)
        replies = [reply for _, reply in side.lead("chat", three_requests())]
        target.close()
    assert [isinstance(each, Reply) for each in replies] == [True, False, True]
    (trouble,) = side.troubles
    assert (trouble.scenario, trouble.step, trouble.restarted) == ("chat", "last straw", True)


@pytest.mark.usefixtures("short_warm_up")
def test_a_server_that_will_not_start_again_does_not_lose_the_run(
    material: Material, tmp_path: Path
) -> None:
    """It starts once only: the requests after its death have a reason for a reply."""
    once = "import sys, pathlib; pathlib.Path(sys.argv[1]).unlink()" + MORTAL
    flag = tmp_path / "flag"
    flag.touch()
    with ServerProcess(Launch("mortal", ("-c", once, str(flag)))) as process:
        process.wait_ready()
        target = Target(process)
        side = Side(target, material, 600)
        replies = [reply for _, reply in side.lead("chat", three_requests())]
        target.close()
    assert "ended while starting" in str(replies[2])
    assert len(side.troubles) == 1


def test_a_server_that_cannot_start_says_why() -> None:
    """The last words of its log."""
    broken = ServerProcess(Launch("broken", ("-c", "raise SystemExit('no such model')")))
    with broken, pytest.raises(ServerError, match="no such model"):
        broken.wait_ready()


def answer(ttft: float = 1.0, prompt: int = 100, cached: int = 0, content: str = "") -> Reply:
    return Reply(ttft, ttft + 1, prompt, cached, 8, "stop", content)


def test_no_two_runs_begin_alike(material: Material) -> None:
    """A fresh nonce is the first thing in every scenario's first prompt."""
    for name, scenario in SCENARIOS.items():
        first = next(scenario(material, "Case 1.", 600)).body
        text = first.get("prompt") or first["messages"][0]["content"]
        assert text.startswith("Case 1."), name
    assert len({fresh_nonce() for _ in range(100)}) == 100


def test_servers_that_are_compared_are_sent_the_same_beginnings() -> None:
    """By scenario, size and run; nobody has sent them before."""
    nonces = Nonces()
    first = nonces.of("repeat", 600, 0)
    assert nonces.of("repeat", 600, 0, 3)[:1] == first
    others = [
        nonces.of(*key)[0] for key in (("repeat", 600, 1), ("repeat", 900, 0), ("chat", 600, 0))
    ]
    assert len({*first, *others}) == 4


def test_half_a_tool_call_may_be_shown_or_not() -> None:
    """Cut by `max_tokens`, not otherwise."""
    shown, held = answer(content="<tool_call>"), answer(content="")
    assert not shown.same_as(held)
    cut = [replace(reply, finish_reason="length") for reply in (shown, held)]
    assert cut[0].same_as(cut[1])


def test_a_call_that_is_cut_may_be_shown_or_not() -> None:
    """One server streams half of the second call, the other tells of whole calls only. No other call may differ."""

    def reply(*arguments: str, reason: str = "length") -> Reply:
        calls = tuple({"function": {"name": "add", "arguments": each}} for each in arguments)
        return replace(answer(), finish_reason=reason, tool_calls=calls)

    whole, half, other = '{"a": 1}', '{"a": ', '{"a": 2}'
    assert reply(whole, half).same_as(reply(whole))
    assert reply(whole).same_as(reply(whole, half))
    assert not reply(whole, half).same_as(reply())
    assert not reply(whole).same_as(reply(other))
    assert not reply(whole, reason="tool_calls").same_as(reply(reason="tool_calls"))


def test_a_tool_loop_goes_on_from_whole_calls_only(material: Material) -> None:
    """A call that was cut is replaced by a made one, so that both servers are asked the same."""
    for reason, expected in (("length", "get_weather"), ("tool_calls", "add")):
        script = SCENARIOS["tool-loop"](material, "Case 1.", 400)
        next(script)
        call = {"id": "call_a", "function": {"name": "add", "arguments": "{}"}}
        asked = script.send(replace(answer(), finish_reason=reason, tool_calls=(call,)))
        (used,) = asked.body["messages"][-2]["tool_calls"]
        assert used["function"]["name"] == expected


def test_clients_share_beginnings_and_own_the_rest(material: Material) -> None:
    """Three agents and the visitor open alike, two writers open alike, nobody asks another's question."""
    first = [
        next(script(Habit(material, "Shared.", f"Own {number}.", 200, number))).body
        for number, script in enumerate(CLIENTS)
    ]
    opened = [
        body.get("prompt", "").split("\nOwn")[0] or body["messages"][0]["content"] for body in first
    ]
    systems, documents, texts = [*opened[:3], opened[5]], opened[3:5], opened[6:]
    assert all(len(set(alike)) == 1 for alike in (systems, texts))
    assert len({systems[0], *documents, texts[0]}) == 4
    assert len({json.dumps(body) for body in first}) == len(CLIENTS)


def test_conversations_go_on_from_their_own_replies(material: Material) -> None:
    """The second request of an agent holds what it was told."""
    script = CLIENTS[0](Habit(material, "Shared.", "Own.", 200, 0))
    next(script)
    step = script.send(Reply(0.1, 0.2, 100, 0, 8, "stop", "So it is."))
    roles = [message["role"] for message in step.body["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert step.body["messages"][2]["content"] == "So it is."


def test_percentiles_are_values_that_were_measured() -> None:
    """Of ten values the fifth, the ninth, the last; of one that one."""
    ten = [float(n) for n in range(1, 11)]
    assert [percentile(ten, percent) for percent in (50, 90, 99)] == [5, 9, 10]
    assert percentile([7.0], 50) == 7


FRAIL = """
import http.server, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self):
        os._exit(1)

    def log_message(self, *args):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def test_a_situation_in_which_the_server_dies_is_told_and_the_next_has_a_new_one(
    material: Material,
) -> None:
    """Whoever asks ends the process: each situation fails, and the next has a new one."""
    names = ["identical", "short-behind-long"]
    sizes = Sizes(identical=600, long=2_200, mixed=200, requests=2)
    with ServerProcess(Launch("frail", ("-c", FRAIL))) as process:
        process.wait_ready()
        target = Target(process)
        side = Side(target, material, 600)
        nonces = [fresh_nonce() for _ in range(NONCES)]
        found = [measure_situation(side, name, nonces, sizes) for name in names]
        target.close()
    assert found == [{}, {}]
    assert [(each.scenario, each.restarted) for each in side.troubles] == [(n, True) for n in names]


def test_events_are_read_however_they_are_cut() -> None:
    """CR LF, comments, two data lines, a cut within a letter, U+2028 within a token, no last blank."""
    stream = ": ping\r\n\r\ndata: a\r\n\r\nevent: x\ndata:b\ndata: \u2028ü\n\ndata: end".encode()
    seen: list[str] = []
    expected = [None, "a", "b\n\u2028ü", "end"]
    for size in (1, 2, 3, 7, len(stream)):
        chunks = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert list(events(chunks, lambda: seen.append("comment"))) == expected
    assert seen == ["comment"] * 5
