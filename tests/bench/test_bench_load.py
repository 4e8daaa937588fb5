"""`bench load` asks two real servers many things at once. Counts are asserted, never timings."""

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from mlx_hybridcache_bench import cli
from mlx_hybridcache_bench.kit.text import tokenizer_of
from mlx_hybridcache_bench.load import QUICK_SIZES, ROWS, figures
from mlx_hybridcache_bench.serving import crowd
from mlx_hybridcache_bench.serving.client import Reply, RequestFailed
from mlx_hybridcache_bench.serving.crowd import (
    AT_ONCE,
    SITUATIONS,
    Failure,
    Run,
    measure_runs,
    percentile,
)
from mlx_hybridcache_bench.serving.mixture import CLIENTS, Habit
from mlx_hybridcache_bench.serving.scenarios import Material
from mlx_hybridcache_bench.serving.servers import OURS, THEIRS, Launch, ServerProcess
from mlx_hybridcache_bench.serving.target import Target
from places import ROOT

from mlx_hybridcache.demo import BUNDLED_MODEL

Result = dict[str, Any]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Result]:
    """The exit status of a quick run against both servers, and what it wrote."""
    file = tmp_path_factory.mktemp("load") / "load.json"
    status = cli.main(["load", "--quick", "--json", str(file)])
    return status, json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def quick(quick_run: tuple[int, Result]) -> Result:
    return quick_run[1]


def measured(result: Result, situation: str, server: str) -> dict[str, float]:
    """The values of one situation."""
    (run,) = (run for run in result["runs"] if run["situation"] == situation)
    return run["values"][server]


def test_a_run_writes_the_documented_keys(quick: Result) -> None:
    """bench/README.md lists every one of them, and every value."""
    documented = ROOT.joinpath("bench", "README.md").read_text("utf-8")
    section = documented.split("## `mlx-hybridcache bench load`")[1].split("\n## ")[0]
    words = set(re.findall(r"\w+", section))
    values = {name for run in quick["runs"] for each in run["values"].values() for name in each}
    assert set(quick) == {
        *("command", "machine", "sizes", "clients", "repeats", "figures", "runs", "failures"),
    }
    assert words >= {*quick, *quick["sizes"], *quick["runs"][0], *values}


def test_every_situation_is_measured_on_both_servers(quick: Result) -> None:
    """Three situations, no request failed, and every row of the tables has a value."""
    assert [run["situation"] for run in quick["runs"]] == list(SITUATIONS)
    assert quick["failures"] == []
    for run in quick["runs"]:
        assert set(run["values"]) == {OURS, THEIRS}
        for values in run["values"].values():
            assert set(values) >= {value for _, value, _, _ in ROWS[run["situation"]]}


def test_four_identical_requests_are_read_once_by_ours(quick_run: tuple[int, Result]) -> None:
    """600 tokens and a last token for each of the others; the exit status says so too."""
    status, quick = quick_run
    ours, theirs = (measured(quick, "identical", server) for server in (OURS, THEIRS))
    assert ours["prompt_tokens"] == theirs["prompt_tokens"] > QUICK_SIZES.identical
    assert ours["read_tokens"] <= ours["prompt_tokens"] + AT_ONCE - 1
    assert ours["cached_tokens"] + ours["read_tokens"] == AT_ONCE * ours["prompt_tokens"]
    counted = [figure for figure in quick["figures"] if figure["counted"]]
    assert len(counted) == 2
    assert all(figure["kept"] for figure in counted)
    assert status == 0


def test_the_short_question_has_a_hundred_tokens(quick: Result) -> None:
    """With the bundled model's template, on both servers."""
    for server in (OURS, THEIRS):
        assert measured(quick, "short-behind-long", server)["prompt_tokens"] == 100


def test_mixed_clients_share_what_they_share(quick: Result) -> None:
    """Eight clients with two requests each. What is not cached is read, by the server's own count."""
    ours = measured(quick, "mixed", OURS)
    assert ours["requests"] == 2 * len(CLIENTS) == 2 * quick["clients"]
    assert ours["cached_tokens"] + ours["read_tokens"] == ours["prompt_tokens"]
    # Four clients open with one system prompt, and all but the writers go on from their first turn.
    assert ours["cached_tokens"] > 3 * QUICK_SIZES.mixed
    assert ours["cached_tokens"] > measured(quick, "mixed", THEIRS)["cached_tokens"]


# What follows needs no model.


@pytest.fixture(scope="module")
def material() -> Material:
    """Text by the token of the bundled model."""
    return Material(tokenizer_of(str(BUNDLED_MODEL)), 2_000)


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


def identical(read: float, ratio: float) -> Run:
    values = {"prompt_tokens": 100.0, "read_tokens": read, "ratio": ratio}
    return Run("identical", 0, {OURS: values})


def test_reading_a_prompt_twice_misses_the_target() -> None:
    """The worst run counts: 200 tokens read for four prompts of 100. Of the times, the median."""
    found = figures([identical(103, 1.1), identical(200, 1.2), identical(103, 2)], [])
    assert [(figure.value, figure.kept) for figure in found] == [(0, True), (2, False), (1.2, True)]


def test_a_failure_of_ours_misses_the_target() -> None:
    """One of two runs; what the other server does is not promised."""
    failures = [Failure(server, "identical", "500", False) for server in (OURS, THEIRS)]
    found = figures([identical(103, 1.1), Run("identical", 1, {})], failures)
    assert (found[0].value, found[0].kept) == (1, False)


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


def test_a_server_that_dies_is_started_again_and_the_run_goes_on(material: Material) -> None:
    """Whoever asks ends the process: each situation fails, and the next has a new one."""
    names = ["identical", "short-behind-long"]
    with ServerProcess(Launch("frail", ("-c", FRAIL))) as process:
        process.wait_ready()
        target = Target(process)
        runs, failures = measure_runs([target], material, names=names, sizes=QUICK_SIZES, repeats=1)
        target.close()
    assert [run.values for run in runs] == [{}, {}]
    assert [(each.situation, each.restarted) for each in failures] == [(n, True) for n in names]


def test_servers_take_turns(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order a b, b a, a b; both get the same beginnings, which nobody had before."""
    order: list[tuple[str, str]] = []

    class Named:
        gone = ""

        def __init__(self, name: str) -> None:
            self.name = name

        def revive(self, *, hung: bool) -> bool:
            return False

    def situation(target: Any, material: Any, nonces: list[str], sizes: Any) -> dict[str, float]:
        order.append((target.name, nonces[0]))
        if len(order) == 1:
            raise RequestFailed("busy")
        return {}

    monkeypatch.setattr(crowd, "SITUATIONS", {"one": situation})
    targets: Any = [Named("a"), Named("b")]
    _, failures = measure_runs(targets, material, names=["one"], sizes=QUICK_SIZES, repeats=3)
    assert "".join(name for name, _ in order) == "abbaab"
    assert [a[1] == b[1] for a, b in pairwise(order)] == [*(True, False, True, False, True)]
    assert failures == [Failure("a", "one", "busy", False)]
