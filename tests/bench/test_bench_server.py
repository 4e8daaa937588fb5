"""`bench server` leads two real servers through the same requests. Counts are asserted, never timings."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlx_hybridcache_bench import cli
from mlx_hybridcache_bench.kit.text import tokenizer_of
from mlx_hybridcache_bench.serving.client import CHAT, COMPLETIONS, Client, Reply, RequestFailed
from mlx_hybridcache_bench.serving.comparison import different_replies, figures, rows
from mlx_hybridcache_bench.serving.rounds import Asked, Death, Side, fresh_nonce, measure_rounds
from mlx_hybridcache_bench.serving.scenarios import SCENARIOS, SESSIONS, Material, Script, Step
from mlx_hybridcache_bench.serving.servers import OURS, THEIRS, Launch, ServerError, ServerProcess
from mlx_hybridcache_bench.serving.target import Target

from mlx_hybridcache import PromptError
from mlx_hybridcache.demo import BUNDLED_MODEL

Result = dict[str, Any]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Result]:
    """The exit status of a quick run against both servers, and what it wrote."""
    file = tmp_path_factory.mktemp("server") / "server.json"
    status = cli.main(["server", "--quick", "--json", str(file)])
    return status, json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def quick(quick_run: tuple[int, Result]) -> Result:
    return quick_run[1]


def cached(result: Result, scenario: str, step: str, server: str) -> list[int]:
    """Cached tokens of each request of one step."""
    (row,) = (r for r in result["rows"] if (r["scenario"], r["step"]) == (scenario, step))
    return [each["cached_tokens"] for each in row["servers"][server]]


def test_a_run_writes_the_documented_keys(quick: Result) -> None:
    """bench/README.md lists them."""
    assert set(quick) == {
        *("command", "machine", "sizes", "repeats", "figures", "rows"),
        *("compared_replies", "different_replies", "deaths"),
    }
    row = quick["rows"][0]
    assert set(row) == {"scenario", "size", "step", "ratio", "cpu_ratio", "servers"}
    assert set(row["servers"][OURS][0]) == {
        *("ttft_seconds", "ttft_cpu_seconds", "last_seconds"),
        *("prompt_tokens", "cached_tokens", "completion_tokens"),
    }


def test_every_scenario_is_measured_on_both_servers(quick: Result) -> None:
    """Ten scenarios, each request answered by both."""
    assert list(dict.fromkeys(row["scenario"] for row in quick["rows"])) == list(SCENARIOS)
    assert quick["deaths"] == []
    assert all(set(row["servers"]) == {OURS, THEIRS} for row in quick["rows"])
    assert all(None not in replies for row in quick["rows"] for replies in row["servers"].values())


def test_ours_never_re_uses_less_than_mlx_lm_server(quick_run: tuple[int, Result]) -> None:
    """The counted promise, request by request; the exit status says that it is kept."""
    status, quick = quick_run
    worse = [
        (row["scenario"], row["step"])
        for row in quick["rows"]
        for ours, theirs in zip(row["servers"][OURS], row["servers"][THEIRS], strict=True)
        if ours["cached_tokens"] < theirs["cached_tokens"]
    ]
    assert worse == []
    counted = [figure for figure in quick["figures"] if figure["counted"]]
    assert counted
    assert all(figure["kept"] for figure in counted)
    assert status == 0


def test_cold_requests_find_nothing_and_repeats_all_but_a_token(quick: Result) -> None:
    """A nonce at the beginning keeps one run from warming the next."""
    prompt = quick["rows"][0]["servers"][OURS][0]["prompt_tokens"]
    assert cached(quick, "repeat", "again", THEIRS) == [prompt - 1] * 4
    assert cached(quick, "repeat", "again", OURS) == [prompt - 1] * 4
    for server in (OURS, THEIRS):
        assert cached(quick, "repeat", "cold", server)[0] < 32


def test_ours_re_uses_where_mlx_lm_server_reads_again(quick: Result) -> None:
    """A changed ending and raw text made shorter: hundreds of tokens against none."""
    for scenario, step in (("changed-ending", "ending changed"), ("completions", "500 shorter")):
        assert cached(quick, scenario, step, THEIRS)[0] < 32
        assert cached(quick, scenario, step, OURS)[0] >= 512
    assert len(cached(quick, "sessions", "visited again", OURS)) == SESSIONS


def test_both_servers_write_the_same(quick: Result) -> None:
    """Greedy replies of one model, hot or cold, whoever serves them."""
    assert quick["different_replies"] == []
    assert quick["compared_replies"] == sum(len(r["servers"][OURS]) for r in quick["rows"])


# What follows needs no model.


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


def steps(*names: str) -> Callable[..., Script]:
    """A scenario of these requests."""

    def script(material: Material, nonce: str, size: int) -> Script:
        for name in names:
            yield Step(name, COMPLETIONS, {"prompt": name})

    return script


@pytest.fixture
def three_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scenario "chat" is three requests, the second of which ends the process above."""
    monkeypatch.setitem(SCENARIOS, "chat", steps("one", "last straw", "three"))
    for warm_up in ("throughput", "repeat"):
        monkeypatch.setitem(SCENARIOS, warm_up, steps("warm"))


@pytest.mark.usefixtures("three_requests")
def test_a_server_that_dies_is_started_again_and_the_run_goes_on(material: Material) -> None:
    """The death is noted, and the third request is answered by a new process."""
    with ServerProcess(Launch("mortal", ("-c", MORTAL))) as process:
        process.wait_ready()
        target = Target(process)
        side = Side(target, material, 600)
        asked = measure_rounds([side], material, names=["chat"], sizes=[600], repeats=1)
        target.close()
    assert [isinstance(each.replies["mortal"], Reply) for each in asked] == [True, False, True]
    (death,) = side.deaths
    assert (death.server, death.step, death.restarted) == ("mortal", "last straw", True)


@pytest.mark.usefixtures("three_requests")
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
        asked = measure_rounds([side], material, names=["chat"], sizes=[600], repeats=1)
        target.close()
    assert "ended while starting" in str(asked[2].replies["mortal"])
    assert len(side.deaths) == 1


def test_a_server_that_cannot_start_says_why() -> None:
    """The last words of its log."""
    broken = ServerProcess(Launch("broken", ("-c", "raise SystemExit('no such model')")))
    with broken, pytest.raises(ServerError, match="no such model"):
        broken.wait_ready()


class Recorder:
    """A side that only notes what it is asked, and answers with what it has seen so far."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name = name
        self.deaths: list[Death] = []
        self._order = order

    def ask(self, scenario: str, step: Step) -> Reply | str:
        self._order.append(f"{step.name} {self.name}")
        return answer()


def answer(ttft: float = 1.0, prompt: int = 100, cached: int = 0, content: str = "") -> Reply:
    return Reply(ttft, ttft + 1, prompt, cached, 8, "stop", content)


@pytest.mark.usefixtures("three_requests")
def test_servers_take_turns(material: Material) -> None:
    """In the order a b, b a, a b in one run, the other way round in the next."""
    order: list[str] = []
    sides: Any = [Recorder("a", order), Recorder("b", order)]
    measure_rounds(sides, material, names=["chat"], sizes=[600], repeats=2)
    assert [each[-1] for each in order] == [*"abbaab", *"baabba"]


def test_no_two_runs_begin_alike(material: Material) -> None:
    """A fresh nonce is the first thing in every scenario's first prompt."""
    for name, scenario in SCENARIOS.items():
        first = next(scenario(material, "Case 1.", 600)).body
        text = first.get("prompt") or first["messages"][0]["content"]
        assert text.startswith("Case 1."), name
    assert len({fresh_nonce() for _ in range(100)}) == 100


def asked(step: str, ours: Reply | str, theirs: Reply | str, scenario: str = "repeat") -> Asked:
    return Asked(scenario, 600, step, 0, {OURS: ours, THEIRS: theirs})


def test_a_ratio_is_the_median_of_the_pairs() -> None:
    """2, 3 and 10 times: 3. A pair without both replies has no ratio."""
    pairs = [asked("again", answer(slow), answer()) for slow in (2.0, 3.0, 10.0)]
    (row,) = rows([*pairs, asked("again", answer(), "it died")])
    found = row.ratio()
    assert found is not None
    assert (found.median, found.low, found.high) == (3, 2, 10)
    assert (row.failures(OURS), row.failures(THEIRS)) == (0, 1)


def test_fewer_cached_tokens_and_failures_of_ours_are_counted() -> None:
    """One request of three reads more than theirs; one is not answered by ours."""
    run = [
        asked("again", answer(cached=99), answer(cached=99)),
        asked("again", answer(cached=98), answer(cached=99)),
        asked("again", "status 500", answer(cached=99)),
        asked("again", answer(), "it died"),
    ]
    counted = {figure.name: figure for figure in figures(run) if figure.counted}
    assert counted["requests with fewer cached tokens"].value == 1
    assert counted[f"requests that {OURS} failed"].value == 1
    assert not any(figure.kept for figure in counted.values())


def test_promised_times_stand_beside_their_targets() -> None:
    """An eighth of theirs for a changed ending and shorter raw text, 1.2 and 1.05 otherwise."""
    fast, slow = answer(0.1), answer(1.0)
    run = [
        asked("cold", slow, slow),
        asked("again", slow, slow),
        asked("ending changed", fast, slow, "changed-ending"),
        asked("500 shorter", fast, slow, "completions"),
    ]
    timed = {f.name: (f.value, f.target) for f in figures(run) if not f.counted}
    assert timed == {
        "TTFT, cold, 600 tokens, ours / theirs": (1.0, 1.05),
        "TTFT, exact repeat, 600 tokens, ours / theirs": (1.0, 1.2),
        "TTFT, changed ending, 600 tokens, ours / theirs": (0.1, 0.125),
        "TTFT, shorter completion, 600 tokens, ours / theirs": (0.1, 0.125),
    }


def test_replies_that_differ_are_named() -> None:
    """White space at the ends is how a server cuts its stream, not what it says."""
    same = asked("cold", answer(content="\n\nYes"), answer(content="Yes"))
    other = asked("again", answer(content="No"), answer(content="Yes"))
    assert different_replies([same]) == []
    assert different_replies([same, other]) == ["repeat, 600 tokens, again"]


def test_half_a_tool_call_may_be_shown_or_not() -> None:
    """Cut by `max_tokens`, not otherwise."""
    shown, held = answer(content="<tool_call>"), answer(content="")
    assert different_replies([asked("cold", shown, held)]) != []
    cut = [replace(reply, finish_reason="length") for reply in (shown, held)]
    assert different_replies([asked("cold", *cut)]) == []


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


def test_sizes_too_short_for_shorter_raw_text_are_refused() -> None:
    """500 tokens shorter than 500 is nothing."""
    with pytest.raises(PromptError, match="must exceed 500"):
        cli.main(["server", "--sizes", "500"])
