"""`bench ttft` against programs with known delays and every fault that a server may have."""

import argparse
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_hybridcache_bench import cli
from mlx_hybridcache_bench.kit.tables import write_json
from mlx_hybridcache_bench.report.results import Results, ResultsError
from mlx_hybridcache_bench.serving import client
from mlx_hybridcache_bench.serving.client import NO_CACHED, NO_DONE, NO_STREAM, NO_USAGE
from mlx_hybridcache_bench.serving.events import NO_JSON
from mlx_hybridcache_bench.serving.servers import Launch, ServerError, ServerProcess
from mlx_hybridcache_bench.ttft import command
from mlx_hybridcache_bench.ttft.contenders import LLAMA, compared
from mlx_hybridcache_bench.ttft.dialect import ESTIMATED, NO_COMPLETIONS, NO_OPTIONS
from mlx_hybridcache_bench.ttft.measure import Measurement
from mlx_hybridcache_bench.ttft.plan import USUAL, BenchPlan
from places import SUPPORT
from rich.console import Console

from mlx_hybridcache import PromptError

Result = dict[str, Any]
STAND_IN = SUPPORT / "serving" / "stand_in_server.py"
CHANGED = "Name one rule that it states."  # what the second request of changed-ending ends with


@contextmanager
def running(monkeypatch: pytest.MonkeyPatch, **behaviour: Any) -> Iterator[ServerProcess]:
    """The stand-in, started by somebody else."""
    monkeypatch.setenv("STAND_IN", json.dumps(behaviour))
    with ServerProcess(Launch("stand-in", (str(STAND_IN),))) as server:
        server.wait_ready()
        yield server


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Result]]:
    """Runs the command; its exit status, and what stands in results.json. Of the report no more is written."""

    def write(results: Results, folder: Path) -> None:
        write_json(folder / "results.json", results.as_json())

    def run(*arguments: str, sizes: tuple[str, ...] = ("600",)) -> tuple[int, Result]:
        monkeypatch.setattr(command, "write", write)
        out = tmp_path / f"out-{time.monotonic_ns()}"
        fixed = ["--sizes", *sizes, "--repeats", "1", "--out", str(out)]
        status = cli.main(["ttft", *arguments, *fixed])
        return status, json.loads((out / "results.json").read_text(encoding="utf-8"))

    return run


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts the stand-in on the PATH as llama-server; gives the path of a GGUF file for it."""

    def install(**behaviour: Any) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        program = folder / "llama-server"
        program.write_text(f"#!{sys.executable}\n{STAND_IN.read_text(encoding='utf-8')}")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("STAND_IN", json.dumps(behaviour))
        gguf = tmp_path / "Tiny-Q8_0.gguf"
        gguf.write_bytes(b"GGUF")
        return gguf

    return install


NAMES = ["repeat", "changed-ending", "branch-and-back", "completions", "tool-loop"]


def test_ttft_is_no_less_than_the_server_took_and_cached_tokens_are_copied(
    monkeypatch: pytest.MonkeyPatch, measured: Callable[..., tuple[int, Result]]
) -> None:
    """40 ms and 0.1 ms more for each token that is not cached: no token can come before it is sent."""
    with running(monkeypatch, base_ms=40, token_ms=0.1) as server:
        status, found = measured("--url", server.url, "--scenarios", *NAMES)
    assert status == 0
    requests = found["servers"][0]["requests"]
    assert len(requests) == 22
    for each in requests:
        took_ms = 40 + 0.1 * (each["prompt_tokens"] - each["cached_tokens"])
        assert 1000 * each["ttft_seconds"] > took_ms - 1
    cold, *hot = [each for each in requests if each["scenario"] == "repeat"]
    assert cold["cached_tokens"] < 50
    assert cold["prompt_tokens"] > 500
    assert [each["cached_tokens"] for each in hot] == [cold["prompt_tokens"] - 1] * 4
    assert found["servers"][0]["notes"] == []


def test_ttft_ends_with_the_first_text(
    monkeypatch: pytest.MonkeyPatch, measured: Callable[..., tuple[int, Result]]
) -> None:
    """By a clock that goes on when it is looked at: for each event, the role's too, and again for a text."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(client, "time", clock)
    with running(monkeypatch) as server:
        _, found = measured("--url", server.url, "--scenarios", "repeat", "completions")
    ticks = {"repeat": (3, 9), "completions": (2, 8)}
    requests = found["servers"][0]["requests"]
    assert len(requests) == 8
    for each in requests:
        assert (each["ttft_seconds"], each["total_seconds"]) == ticks[each["scenario"]]


def test_llama_server_is_started_by_its_documented_flags(
    llama: Callable[..., Path], measured: Callable[..., tuple[int, Result]]
) -> None:
    """Everything is measured, on processes of its own; what was done is what was planned."""
    gguf = llama(base_ms=2, token_ms=0.02)
    flags = "llama-server=--ctx-checkpoints 128"
    options = ["--alone", "--gguf", str(gguf), "--flags", flags]
    status, found = measured("--compare", LLAMA, *options, sizes=("600", "900"))
    (server,) = found["servers"]
    assert (status, server["status"], server["reason"]) == (0, "measured", "")
    assert server["version"] == "7825 (e9fd8dc)"
    assert (server["model"]["name"], server["model"]["quantization"]) == (gguf.name, "Q8_0")
    assert server["model"]["bytes"] == len(b"GGUF")
    assert server["flags"][:4] == ["--model", gguf.name, "--host", "127.0.0.1"]
    assert server["flags"][-2:] == ["--ctx-checkpoints", "128"]
    assert {each["scenario"] for each in server["requests"]} == set(USUAL) - {
        *("identical", "short-behind-long")
    }
    assert {(e["scenario"], e["size"]) for e in server["requests"] if e["size"] == 900} == {
        *(("repeat", 900), ("changed-ending", 900))
    }
    assert {each["situation"] for each in server["situations"]} == {
        *("identical", "short-behind-long", "restart")
    }
    assert all(each["same"] for each in server["equalities"])
    assert {each["against"] for each in server["equalities"]} == {
        *("the same request earlier", "a newly started server")
    }
    _, after = (e for e in server["requests"] if e["scenario"] == "restart")
    assert after["cached_tokens"] < 50, "a new process knows nothing"
    assert server["memory"]["peak_bytes"] >= server["memory"]["warm_bytes"] > 2**20


def test_progress_reaches_the_end_and_no_further(llama: Callable[..., Path]) -> None:
    """The tokens that are reported one by one are those that the plan counted."""
    plan = BenchPlan(
        sizes=(600, 700),
        repeats=2,
        names=("repeat", "chat", "changed-ending", "restart", "identical", "short-behind-long"),
        clients=3,
        timeout_seconds=20,
        start_seconds=20,
        warm_up_tokens=300,
        cold_checks=True,
    )
    (contender,) = compared(
        [LLAMA],
        model="",
        gguf=llama(),
        flags={},
        fields={},
        context_tokens=plan.context_tokens,
    )
    told: list[int] = []
    Measurement(contender, plan, None, lambda said, tokens: told.append(tokens)).run()
    assert sum(told) == plan.work(process=True)


def test_without_llama_server_on_the_path_it_is_said_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Callable[..., tuple[int, Result]]
) -> None:
    """Exit status 1: what was asked for is not all there."""
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF")
    with running(monkeypatch) as server:
        monkeypatch.setenv("PATH", str(tmp_path))
        options = ["--alone", "--gguf", str(gguf), "--scenarios", "repeat"]
        status, found = measured("--url", f"other={server.url}", "--compare", LLAMA, *options)
    assert status == 1
    other, missing = found["servers"]
    assert (other["name"], other["status"], len(other["requests"])) == ("other", "measured", 5)
    assert (missing["name"], missing["status"]) == (LLAMA, "missing")
    assert "no llama-server on the PATH" in missing["reason"]


@pytest.mark.parametrize(
    ("behaviour", "note"),
    [
        ({"usage": False, "timings": False}, NO_USAGE),
        ({"usage": False, "timings": False}, ESTIMATED),
        ({"cached": False, "timings": False}, NO_CACHED),
        ({"done": False}, NO_DONE),
        ({"streams": False}, NO_STREAM),
        ({"junk": True}, NO_JSON),
        ({"refuses": ["stream_options"]}, NO_OPTIONS),
        ({"completions": False}, NO_COMPLETIONS),
        ({"context": 200}, "context is too small"),
    ],
)
def test_a_server_with_oddities_is_measured_with_a_note(
    behaviour: dict[str, Any],
    note: str,
    monkeypatch: pytest.MonkeyPatch,
    measured: Callable[..., tuple[int, Result]],
) -> None:
    """No usage, no [DONE], no stream at all: each request has a time all the same."""
    with running(monkeypatch, base_ms=5, **behaviour) as server:
        scenarios = ["--scenarios", "repeat", "completions"]
        status, found = measured("--url", server.url, *scenarios)
    told = found["servers"][0]
    assert (status, told["troubles"]) == (0, [])
    assert any(note in each for each in told["notes"])
    assert len(told["requests"]) == (5 if note == NO_COMPLETIONS else 8)
    assert all(each["ttft_seconds"] > 0.004 for each in told["requests"])


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_is_a_first_token(
    field: str, monkeypatch: pytest.MonkeyPatch, measured: Callable[..., tuple[int, Result]]
) -> None:
    """Ollama and LM Studio name it differently; a reply of nothing else is compared too."""
    with running(monkeypatch, field=field) as server:
        status, found = measured("--url", server.url, "--scenarios", "repeat")
    assert status == 0
    assert len(found["servers"][0]["equalities"]) == 4


def test_counts_come_from_llama_cpps_timings_where_there_is_no_usage(
    monkeypatch: pytest.MonkeyPatch, measured: Callable[..., tuple[int, Result]]
) -> None:
    """`cache_n` and `prompt_n` together are the prompt."""
    with running(monkeypatch, usage=False) as server:
        _, found = measured("--url", server.url, "--scenarios", "repeat")
    again = found["servers"][0]["requests"][1]
    assert again["cached_tokens"] == again["prompt_tokens"] - 1 > 500
    assert again["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("500", "status 500"),
        ("error", "slot unavailable"),
        ("half", "RemoteProtocolError"),
        ("hang", "no whole reply within 3 s"),
        ("pings", "no whole reply within 3 s"),
    ],
)
def test_a_request_that_fails_is_told_and_the_run_goes_on(
    fault: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    measured: Callable[..., tuple[int, Result]],
) -> None:
    """Refused, broken off, hung in silence or behind comments: the next request is measured."""
    with running(monkeypatch, faults={CHANGED: fault}) as server:
        options = ["--timeout", "3", "--scenarios", "changed-ending"]
        _, found = measured("--url", server.url, *options)
    cold, changed, again = found["servers"][0]["requests"]
    assert sentence in changed["error"]
    assert changed["ttft_seconds"] is None
    assert None not in (cold["ttft_seconds"], again["ttft_seconds"])
    (trouble,) = found["servers"][0]["troubles"]
    assert (trouble["scenario"], trouble["step"]) == ("changed-ending", "ending changed")
    assert not trouble["restarted"], "it is nobody's here to start"


def test_a_server_that_dies_is_started_again(
    llama: Callable[..., Path], measured: Callable[..., tuple[int, Result]]
) -> None:
    """Its death is reported with the request that it died of."""
    gguf = llama(faults={CHANGED: "die"})
    options = ["--alone", "--gguf", str(gguf), "--scenarios", "changed-ending", "--no-cold-checks"]
    status, found = measured("--compare", LLAMA, *options)
    (server,) = found["servers"]
    assert (status, server["status"]) == (0, "measured")
    assert [each["error"] is None for each in server["requests"]] == [True, False, True]
    (trouble,) = server["troubles"]
    assert trouble["restarted"]


def test_a_server_that_dies_for_good_is_reported_not_waited_for(
    tmp_path: Path, llama: Callable[..., Path], measured: Callable[..., tuple[int, Result]]
) -> None:
    """It will not start again: what was measured stays, and the rest is not asked."""
    gguf = llama(faults={CHANGED: "die"}, starts=str(tmp_path / "starts"), most_starts=1)
    status, found = measured("--compare", LLAMA, "--alone", "--gguf", str(gguf))
    (server,) = found["servers"]
    assert (status, server["status"]) == (1, "partial")
    assert "failed to load model" in server["reason"]
    assert {each["scenario"] for each in server["requests"]} == {
        *("repeat", "chat", "changed-ending")
    }


def test_a_server_that_cannot_start_is_reported(
    tmp_path: Path, llama: Callable[..., Path], measured: Callable[..., tuple[int, Result]]
) -> None:
    """Its last words stand in the results."""
    gguf = llama(starts=str(tmp_path / "starts"), most_starts=0)
    status, found = measured("--compare", LLAMA, "--alone", "--gguf", str(gguf))
    (server,) = found["servers"]
    assert (status, server["status"], server["requests"]) == (1, "failed", [])
    assert "failed to load model" in server["reason"]


def test_a_server_at_a_url_that_goes_away_is_reported_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, measured: Callable[..., tuple[int, Result]]
) -> None:
    """It is nobody's here to start again."""
    with running(monkeypatch, faults={CHANGED: "die"}) as server:
        status, found = measured("--url", server.url, "--scenarios", "changed-ending", "chat")
    told = found["servers"][0]
    assert (status, told["status"], "answers no more" in told["reason"]) == (1, "partial", True)


def test_replies_that_differ_hot_and_cold_are_named(
    monkeypatch: pytest.MonkeyPatch, measured: Callable[..., tuple[int, Result]]
) -> None:
    """Four repeats, none of which says what the first did."""
    with running(monkeypatch, moody=True) as server:
        _, found = measured("--url", server.url, "--scenarios", "repeat")
    assert [each["same"] for each in found["servers"][0]["equalities"]] == [False] * 4


def test_key_model_and_extra_fields_are_sent_and_the_key_is_kept_to_oneself(
    monkeypatch: pytest.MonkeyPatch, measured: Callable[..., tuple[int, Result]]
) -> None:
    """The server refuses whoever has no key, and what carries the extra field."""
    monkeypatch.setenv("A_KEY", "sk-very-secret")
    only = ["--scenarios", "repeat"]
    models = ["one", "two"]
    with running(monkeypatch, key="sk-very-secret", models=models, refuses=["top_k"]) as server:
        known = ["--url", server.url, "--api-key-env", "A_KEY"]
        status, found = measured(*known, *only, "--served-model", "two")
        refused, told = measured(*known, *only, "--served-model", "two", "--extra", '{"top_k": 1}')
        with pytest.raises(ServerError, match="--served-model: one, two"):
            measured(*known, *only)
    assert (status, found["servers"][0]["model"]) == (0, {"name": "two"})
    assert "sk-very-secret" not in json.dumps(found)
    assert refused == 1
    assert "unknown field top_k" in told["servers"][0]["reason"]


def test_a_hung_server_is_started_again_and_one_that_always_hangs_is_given_up(
    llama: Callable[..., Path], measured: Callable[..., tuple[int, Result]]
) -> None:
    """After five new starts there is no sixth."""
    gguf = llama(faults={CHANGED: "hang", "Who wrote it?": "hang"})
    names = ["changed-ending"] * 4
    options = ["--alone", "--gguf", str(gguf), "--timeout", "2", "--scenarios", *names]
    status, found = measured("--compare", LLAMA, *options)
    (server,) = found["servers"]
    assert (status, server["status"]) == (1, "partial")
    assert "again and again" in server["reason"]
    assert [each["restarted"] for each in server["troubles"]] == [True] * 5 + [False]


def test_with_markdown_nothing_else_is_printed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """So that it can be piped into an issue; where it stands is said on stderr."""
    with running(monkeypatch) as server:
        options = ["--scenarios", "repeat", "--sizes", "600", "--repeats", "1", "--markdown"]
        cli.main(["ttft", "--url", f"mine={server.url}", *options, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert printed.out.startswith("### Environment\n")
    assert "### mine: the same prompt again\n\n| Input size | Cold (1st call) |" in printed.out
    assert "┃" not in printed.out
    assert "measuring mine" in printed.err
    assert "report.html" in printed.err


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the server's name and what it is at."""
    parser = argparse.ArgumentParser()
    cli.add_commands(parser.add_subparsers())
    screen = io.StringIO()
    with running(monkeypatch, base_ms=150) as server:
        only = ["--sizes", "600", "--scenarios", "repeat", "--out", str(tmp_path / "out")]
        args = parser.parse_args(["ttft", "--url", f"mine={server.url}", *only])
        args.repeats = 1
        assert command.run(args, Console(file=screen, force_terminal=True, width=120)) == 0
    assert "starting, warming up" in screen.getvalue()
    assert "repeat 600: again" in screen.getvalue()


def test_earlier_runs_alone_make_a_report_and_measure_nothing(
    monkeypatch: pytest.MonkeyPatch, measured: Callable[..., tuple[int, Result]], tmp_path: Path
) -> None:
    """In the order given; two of one name are told apart."""
    with running(monkeypatch) as server:
        for run in ("monday", "tuesday"):
            written = str(tmp_path / f"{run}.json")
            measured("--url", f"mine={server.url}", "--scenarios", "repeat", "--json", written)
    earlier = [f"--add={tmp_path / run}.json" for run in ("monday", "tuesday")]
    status, found = measured(*earlier)
    assert (status, [each["name"] for each in found["servers"]]) == (0, ["mine", "mine'"])


@pytest.mark.parametrize("models", [["stand-in"], []])
def test_a_server_says_who_it_is(
    models: list[str],
    monkeypatch: pytest.MonkeyPatch,
    measured: Callable[..., tuple[int, Result]],
) -> None:
    """By llama-server's `/props`; its only model need not be named."""
    with running(monkeypatch, models=models) as server:
        _, found = measured("--url", f"{server.url}/v1/", "--scenarios", "repeat")
    (server_found,) = found["servers"]
    assert server_found["version"] == "b7825-e9fd8dc"
    assert server_found["model"] == {"name": models[0] if models else "unknown"}
    assert server_found["name"] == server.url.removeprefix("http://")


def test_an_interrupted_run_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch, measured: Callable[..., tuple[int, Result]]
) -> None:
    """Control-C in the third request: two are in the results, and a report is written."""
    asked: list[int] = []

    def interrupt(self: Measurement, *given: Any) -> None:
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt

    with running(monkeypatch) as server:
        original = Measurement.__init__
        monkeypatch.setattr(
            Measurement,
            "__init__",
            lambda self, who, plan, tokenizer, advance, pace, **more: original(
                self, who, plan, tokenizer, lambda said, tokens: interrupt(self), pace, **more
            ),
        )
        status, found = measured("--url", server.url, "--scenarios", "repeat")
    (server_found,) = found["servers"]
    assert (status, server_found["status"], server_found["reason"]) == (
        130,
        "partial",
        "interrupted",
    )
    assert len(server_found["requests"]) == 2


# What follows needs no server.


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        (["--compare", "vllm"], ServerError, "measure it with --url"),
        (["--compare", "llama-server"], ServerError, "--gguf FILE"),
        (["--compare", "llama-server", "--gguf", "/none"], ServerError, "no file /none"),
        (["--flags=--metrics"], ServerError, "whose flags"),
        (["--flags", "llama-server=--metrics"], ServerError, "not measured"),
        (["--extra", "[1]"], ServerError, "takes an object"),
        (["--extra", "{"], ServerError, "not JSON"),
        (["--api-key-env", "NO_SUCH_KEY"], ServerError, "NO_SUCH_KEY"),
        (["--url", "localhost:1234"], ServerError, "http://localhost:1234"),
        (["--sizes", "twelve"], PromptError, "12K"),
        (["--sizes", "500"], PromptError, "must exceed 500"),
        (["--clients", "0"], PromptError, "above 0"),
        (["--add", "pyproject.toml"], ResultsError, "no results.json"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    arguments: list[str], kind: type[Exception], sentence: str, tmp_path: Path
) -> None:
    """With what to write instead; no folder is left behind."""
    out = tmp_path / "out"
    with pytest.raises(kind, match=sentence):
        cli.main(["ttft", *arguments, "--out", str(out)])
    assert not out.exists()
