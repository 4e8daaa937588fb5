"""`bench ttft` from one command, with the real servers on the bundled model."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from mlx_hybridcache_bench import cli
from mlx_hybridcache_bench.report.results import Results
from mlx_hybridcache_bench.serving.servers import OURS, THEIRS
from mlx_hybridcache_bench.ttft import command

SIZE = 900
SCENARIOS = ("repeat", "changed-ending", "volatile-line", "restart", "identical")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run beside mlx_lm.server."""
    folder = tmp_path_factory.mktemp("ttft")
    only = [
        "--quick",
        "--repeats",
        "1",
        "--sizes",
        str(SIZE),
        "--clients",
        "2",
        "--scenarios",
        *SCENARIOS,
    ]
    assert cli.main(["ttft", "--compare", THEIRS, *only, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def found(out: Path) -> dict[str, Any]:
    """Its results by server."""
    result = json.loads((out / "results.json").read_text(encoding="utf-8"))
    schema = files("mlx_hybridcache_bench.report") / "results.schema.json"
    jsonschema.validate(result, json.loads(schema.read_text(encoding="utf-8")))
    return {each["name"]: each for each in result["servers"]}


def cached(server: dict[str, Any], scenario: str, step: str) -> list[int]:
    """Cached tokens of each request of one step."""
    return [
        each["cached_tokens"]
        for each in server["requests"]
        if (each["scenario"], each["step"]) == (scenario, step)
    ]


def test_one_command_measures_both_and_writes_every_file(out: Path, found: dict[str, Any]) -> None:
    """Ours joins without being named; the page, Markdown and pictures stand beside the figures."""
    assert list(found) == [THEIRS, OURS]
    assert all(each["status"] == "measured" for each in found.values())
    assert all(each["troubles"] == [] for each in found.values())
    assert {path.name for path in out.iterdir()} == {
        *("results.json", "report.html", "report.md", "memory.png"),
        *("ttft-by-length.png", "ttft-by-scenario.png", "several-clients.png"),
    }
    assert "| 900 |" in (out / "report.md").read_text(encoding="utf-8")


def test_what_each_server_re_uses_is_what_it_says(found: dict[str, Any]) -> None:
    """An exact repeat on both; a changed ending and a changed line on ours alone."""
    ours, theirs = found[OURS], found[THEIRS]
    prompt = ours["requests"][0]["prompt_tokens"]
    assert prompt > SIZE
    for server in (ours, theirs):
        assert cached(server, "repeat", "again") == [prompt - 1] * 4
        assert cached(server, "changed-ending", "cold")[0] < 32
    assert cached(theirs, "changed-ending", "ending changed")[0] < 32
    assert cached(ours, "changed-ending", "ending changed")[0] >= 512
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
        assert against.count("the same request earlier") == 5
        assert against.count("a newly started server") == 3


def test_clients_at_once_and_memory_are_measured(found: dict[str, Any]) -> None:
    """Two clients with one prompt: ours reads it once."""
    for server in found.values():
        (at_once,) = (e for e in server["situations"] if e["situation"] == "identical")
        assert at_once["values"]["at_once_seconds"] > 0
        assert server["memory"]["warm_bytes"] > 50 * 2**20
    (at_once,) = (e for e in found[OURS]["situations"] if e["situation"] == "identical")
    assert at_once["values"]["cached_tokens"] > SIZE // 2


def test_an_earlier_run_is_shown_again_without_measuring(out: Path, tmp_path: Path) -> None:
    """Results hold all that a report needs."""
    results = Results.read(out / "results.json")
    command.write(results, tmp_path)
    again = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert again == (out / "report.html").read_text(encoding="utf-8")
