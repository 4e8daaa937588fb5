"""`bench ttft` from one command, with the real servers on the bundled model."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from long import forms, in_full
from mlx_hybridcache_bench import cli
from mlx_hybridcache_bench.report.results import Results
from mlx_hybridcache_bench.serving.mixture import CLIENTS
from mlx_hybridcache_bench.serving.scenarios import SCENARIOS, SESSIONS
from mlx_hybridcache_bench.serving.servers import OURS, THEIRS
from mlx_hybridcache_bench.ttft import command
from mlx_hybridcache_bench.ttft.plan import NAMES, SITUATIONS

SIZE = 1050
SHORT_SIZE = 620
"""In the short form, of which nothing is asked that is 500 tokens shorter."""
CLIENTS_AT_ONCE, REQUESTS = 2, 2


SOME_NAMES = ("repeat", "changed-ending", "restart", "identical")

Asked = tuple[tuple[str, ...], int]

in_full_only = pytest.mark.parametrize("asked", [in_full((NAMES, SIZE))], indirect=True)


@pytest.fixture(scope="module", params=forms((SOME_NAMES, SHORT_SIZE), (NAMES, SIZE)))
def asked(request: pytest.FixtureRequest) -> Asked:
    """Which scenarios, and tokens of their prompts."""
    names, size = request.param
    return names, size


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, asked: Asked) -> Path:
    """The folder of one run of some things or everything beside mlx_lm.server, whose exit status says that
    it is well.
    """
    names, size = asked
    folder = tmp_path_factory.mktemp("ttft")
    only = [
        "--quick",
        "--repeats",
        "1",
        "--sizes",
        str(size),
        "--clients",
        str(CLIENTS_AT_ONCE),
        "--requests",
        str(REQUESTS),
        "--scenarios",
        *names,
    ]
    assert cli.main(["ttft", "--compare", THEIRS, *only, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def whole(out: Path) -> dict[str, Any]:
    """What it wrote."""
    result: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    schema = files("mlx_hybridcache_bench.report") / "results.schema.json"
    jsonschema.validate(result, json.loads(schema.read_text(encoding="utf-8")))
    return result


@pytest.fixture(scope="module")
def found(whole: dict[str, Any]) -> dict[str, Any]:
    """Its results by server."""
    return {each["name"]: each for each in whole["servers"]}


def cached(server: dict[str, Any], scenario: str, step: str) -> list[int]:
    """Cached tokens of each request of one step."""
    return [
        each["cached_tokens"]
        for each in server["requests"]
        if (each["scenario"], each["step"]) == (scenario, step)
    ]


def situation(server: dict[str, Any], name: str) -> dict[str, float]:
    """The values of its only run."""
    (run,) = (each for each in server["situations"] if each["situation"] == name)
    return dict(run["values"])


def test_one_command_measures_both_and_writes_every_file(
    out: Path, found: dict[str, Any], asked: Asked
) -> None:
    """Ours joins without being named; the page, Markdown and pictures stand beside the figures."""
    assert list(found) == [THEIRS, OURS]
    assert all(each["status"] == "measured" for each in found.values())
    assert all(each["troubles"] == [] for each in found.values())
    assert {path.name for path in out.iterdir()} == {
        *("results.json", "report.html", "report.md", "memory.png"),
        *("ttft-by-length.png", "ttft-by-scenario.png", "several-clients.png"),
    }
    assert f"| {asked[1]:,} |" in (out / "report.md").read_text(encoding="utf-8")


def test_what_each_server_re_uses_is_what_it_says(found: dict[str, Any], asked: Asked) -> None:
    """An exact repeat on both; a changed ending on ours alone."""
    ours, theirs = found[OURS], found[THEIRS]
    prompt = ours["requests"][0]["prompt_tokens"]
    assert prompt > asked[1]
    for server in (ours, theirs):
        assert cached(server, "repeat", "again") == [prompt - 1] * 4
        assert cached(server, "changed-ending", "cold")[0] < 32
    assert cached(theirs, "changed-ending", "ending changed")[0] < 32
    assert cached(ours, "changed-ending", "ending changed")[0] >= 512


@in_full_only
def test_a_shorter_text_and_a_changed_line_are_re_used_by_ours_alone(found: dict[str, Any]) -> None:
    """A text that ends 500 tokens earlier; a system prompt with another day in its middle."""
    ours, theirs = found[OURS], found[THEIRS]
    assert cached(theirs, "completions", "500 shorter")[0] < 32
    assert cached(ours, "completions", "500 shorter")[0] >= 512
    assert cached(theirs, "volatile-line", "line changed")[0] < 32
    assert cached(ours, "volatile-line", "line changed again")[0] > 256


def test_a_restart_is_measured_on_both(found: dict[str, Any]) -> None:
    """Ours is given a cache directory for it, and a note says so."""
    assert cached(found[THEIRS], "restart", "after a restart")[0] < 32
    (kept,) = cached(found[OURS], "restart", "after a restart")
    assert kept == cached(found[OURS], "repeat", "again")[0]
    assert any("--cache-dir" in note for note in found[OURS]["notes"])
    assert "--cache-dir" not in found[OURS]["flags"]


def test_hot_replies_equal_cold_ones(found: dict[str, Any]) -> None:
    """Held against earlier replies, and against those of a new process."""
    for server in found.values():
        assert all(each["same"] for each in server["equalities"])
        against = [each["against"] for each in server["equalities"]]
        seen = {each["scenario"] for each in server["requests"]}
        # Four repeats, the old branch asked again, and what came back after the restart.
        assert against.count("the same request earlier") == 5 + ("branch-and-back" in seen)
        assert against.count("a newly started server") == len(seen & set(SCENARIOS))


def test_clients_at_once_and_memory_are_measured(found: dict[str, Any]) -> None:
    """Two clients with one prompt: ours reads it once."""
    for server in found.values():
        (at_once,) = (e for e in server["situations"] if e["situation"] == "identical")
        assert at_once["values"]["at_once_seconds"] > 0
        assert server["memory"]["warm_bytes"] > 50 * 2**20
    values = situation(found[OURS], "identical")
    assert values["read_tokens"] <= values["prompt_tokens"] + CLIENTS_AT_ONCE - 1
    assert values["cached_tokens"] + values["read_tokens"] == (
        CLIENTS_AT_ONCE * values["prompt_tokens"]
    )


@in_full_only
def test_the_short_question_has_a_hundred_tokens(found: dict[str, Any]) -> None:
    """With the bundled model's template, on both servers."""
    for server in found.values():
        assert situation(server, "short-behind-long")["prompt_tokens"] == 100


@in_full_only
def test_mixed_clients_share_what_they_share(found: dict[str, Any]) -> None:
    """Eight clients with two requests each. What is not cached is read, by the server's own count."""
    ours = situation(found[OURS], "mixed")
    assert ours["requests"] == REQUESTS * len(CLIENTS)
    assert ours["cached_tokens"] + ours["read_tokens"] == ours["prompt_tokens"]
    # Four clients open with one system prompt, and all but the writers go on from their first turn.
    assert ours["cached_tokens"] > 3 * (SIZE // 4)
    assert ours["cached_tokens"] > situation(found[THEIRS], "mixed")["cached_tokens"]


@in_full_only
def test_every_request_is_answered_by_both(found: dict[str, Any]) -> None:
    """Ten scenarios and a restart, and every kind of situation."""
    for server in found.values():
        assert {each["scenario"] for each in server["requests"]} == {*SCENARIOS, "restart"}
        assert {each["situation"] for each in server["situations"]} == {*SITUATIONS, "restart"}
        assert all(each["error"] is None for each in server["requests"])
        sizes = {each["situation"]: each["size"] for each in server["situations"]}
        assert (sizes["identical"], sizes["mixed"]) == (SIZE, SIZE // 4)
    ours, theirs = (
        [(e["scenario"], e["step"]) for e in each["requests"]] for each in found.values()
    )
    assert ours == theirs
    assert len(cached(found[OURS], "sessions", "visited again")) == SESSIONS


def test_ours_never_re_uses_less_than_mlx_lm_server(
    whole: dict[str, Any], found: dict[str, Any]
) -> None:
    """The counted promise, request by request; the figures say so too."""
    worse = [
        (ours["scenario"], ours["step"])
        for ours, theirs in zip(found[OURS]["requests"], found[THEIRS]["requests"], strict=True)
        if ours["cached_tokens"] < theirs["cached_tokens"]
    ]
    assert worse == []
    counted = [figure for figure in whole["figures"] if figure["counted"]]
    assert len(counted) == 3
    assert all(figure["kept"] for figure in counted)


def test_both_servers_write_the_same(whole: dict[str, Any], found: dict[str, Any]) -> None:
    """Greedy replies of one model, hot or cold, whoever serves them."""
    assert whole["replies"] == {"compared": len(found[OURS]["requests"]), "different": []}


def test_an_earlier_run_is_shown_again_without_measuring(out: Path, tmp_path: Path) -> None:
    """Results hold all that a report needs."""
    results = Results.read(out / "results.json")
    command.write(results, tmp_path)
    again = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert again == (out / "report.html").read_text(encoding="utf-8")
