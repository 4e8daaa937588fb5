"""What `bench ttft` writes: figures in, tables and one page out. No server is needed for that."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from mlx_hybridcache_bench.kit import machine as machine_module
from mlx_hybridcache_bench.kit import text
from mlx_hybridcache_bench.kit.machine import machine
from mlx_hybridcache_bench.kit.tables import Spread, size_text
from mlx_hybridcache_bench.kit.text import ByCharacters, library_text, prompt_of
from mlx_hybridcache_bench.report.charts import charts
from mlx_hybridcache_bench.report.markdown import markdown
from mlx_hybridcache_bench.report.oddities import odd
from mlx_hybridcache_bench.report.page import report
from mlx_hybridcache_bench.report.results import (
    Equality,
    Measured,
    Memory,
    Request,
    Results,
    ResultsError,
    Situation,
    Trouble,
)
from mlx_hybridcache_bench.report.sheet import seconds_text
from mlx_hybridcache_bench.report.summary import hot_steps, notes, sheets
from mlx_hybridcache_bench.serving.scenarios import SCENARIOS, Material, steps_of
from mlx_hybridcache_bench.ttft.model import describe, describe_gguf
from mlx_hybridcache_bench.ttft.plan import sizes_of

from mlx_hybridcache import PromptError
from mlx_hybridcache.demo import BUNDLED_MODEL

SCHEMA = json.loads(
    (files("mlx_hybridcache_bench.report") / "results.schema.json").read_text(encoding="utf-8")
)
HOSTILE = "<script>alert(1)</script>"

COLD_1162 = {12_000: 12.4, 30_000: 28.7, 60_000: 71.6, 120_000: 250.0}
"""Seconds: what mlx-lm issue 1162 reports of a Mac Studio, and llama.cpp's at 120K."""


def server(name: str, hot: float, **more: Any) -> Measured:
    """One that repeats in `hot` seconds, three runs, and fails one request."""
    requests = [
        Request("repeat", size, step, run, seconds * spread, 300.0, size, cached, 8, "length")
        for size, cold in COLD_1162.items()
        for step, seconds, cached in (("cold", cold, 0), ("again", hot, size - 1))
        for run, spread in enumerate((1.0, 0.9, 1.1))
    ]
    requests += [
        Request("chat", 12_000, "turn 1", 0, 6.0, 7.0, 6_000, 0, 48, "length"),
        Request("chat", 12_000, "turn 2", 0, 0.5, 1.5, None, None, None, "length"),
        Request("chat", 12_000, "turn 3", 0, error="status 500: no"),
    ]
    return Measured(
        name,
        "process",
        version="1.0",
        flags=["--model", "Qwen3-Next"],
        model={"name": "Qwen3-Next", "quantization": "8 bits, groups of 64", "bytes": 80 * 2**30},
        ready_seconds=30.0,
        requests=requests,
        situations=[
            Situation("identical", 12_000, 0, {"alone_seconds": 12.0, "at_once_seconds": 48.0}),
            Situation("short-behind-long", 12_000, 0, {"behind_ttft_seconds": 2.0}),
        ],
        equalities=[
            Equality("repeat", 12_000, "again", "the same request earlier", same=True),
            Equality("chat", 12_000, "turn 2", "a newly started server", same=False),
        ],
        troubles=[Trouble("chat", "turn 3", "status 500: no", restarted=False)],
        memory=Memory(80 * 2**30, 85 * 2**30, 90 * 2**30),
        **more,
    )


@pytest.fixture
def results() -> Results:
    """Two servers that were measured and one that was not there."""
    settings = {
        "quick": False,
        "sizes": list(COLD_1162),
        "repeats": 3,
        "scenarios": ["repeat", "chat"],
        "clients": 4,
        "timeout_seconds": 600.0,
        "warm_up_tokens": 12_000,
        "cold_checks": True,
        "extra": {},
    }
    servers = [
        server("mlx_lm.server", 70.0, notes=["sends events that are not JSON"]),
        server(HOSTILE, 1.2),
        Measured("llama-server", "process", "missing", "there is none on the PATH"),
    ]
    found = {**machine(), "mlx_hybridcache": "0.1.0"}
    return Results("2026-11-25T12:00:00+00:00", found, settings, servers)


def test_results_follow_the_schema_and_come_back_the_same(results: Results, tmp_path: Path) -> None:
    """What is written is what is read; an unknown key anywhere breaks the schema."""
    written = results.as_json()
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(written, SCHEMA)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(written), encoding="utf-8")
    assert Results.read(file).as_json() == written
    written["servers"][0]["requests"][0]["seconds"] = 1
    with pytest.raises(jsonschema.ValidationError, match="seconds"):
        jsonschema.validate(written, SCHEMA)


def test_the_table_of_issue_1162_is_filled_in(results: Results) -> None:
    """Each size with the median of three; one of 60 x, and none that a count contradicts."""
    lines = markdown(results).splitlines()
    start = lines.index("### mlx_lm.server: the same prompt again")
    assert lines[start + 2 : start + 5] == [
        "| Input size | Cold (1st call) | Hot (exact repeat) | Speedup | Cached / prompt |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 12K | 12.4 s (11.2-13.6) | 70.0 s (63.0-77.0) | undecided | 11,999 / 12,000 |",
    ]
    assert lines[start + 6].startswith("| 60K | 71.6 s")
    assert lines[start + 7].startswith("| 120K | 250 s")
    assert "| 60K | 71.6 s (64.4-78.8) | 1.20 s (1.08-1.32) | 59.7x | 59,999 / 60,000 |" in lines


def test_markdown_says_what_was_measured_and_with_what(results: Results) -> None:
    """Machine, each server with model and flags, method, software; then the notes."""
    text = markdown(results)
    assert f"{machine()['cores']} cores" in text
    assert "Qwen3-Next, 8 bits, groups of 64, 80.0 GiB, flags `--model Qwen3-Next`" in text
    assert "sizes 12K, 30K, 60K, 120K; median of 3 runs" in text
    assert "- llama-server: not measured: there is none on the PATH" in text
    assert "- mlx_lm.server failed in chat, turn 3: status 500: no" in text
    assert HOSTILE not in text, "a server's words are no HTML"


def test_tables_show_failures_unknown_counts_and_differences(results: Results) -> None:
    """`?` for what was not told; a failed request beside the time it has not."""
    found = {sheet.title: sheet for sheet in sheets(results)}
    chat = {row[0]: row[1] for row in found["Scenarios"].rows}
    assert chat["chat, 12K: turn 1"] == "6.00 s · 0 / 6,000"
    assert chat["chat, 12K: turn 2"] == "500 ms · ? / ?"
    assert chat["chat, 12K: turn 3"].strip() == "1 failed"
    assert found["Memory"].rows[0] == ("mlx_lm.server", "80.0 GiB", "85.0 GiB", "90.0 GiB")
    crowd = {row[0]: row[1] for row in found["Several clients, and a new start"].rows}
    assert crowd["4 clients send one at once"] == "48.0 s"
    equal = found["Hot replies and cold ones"].rows
    assert equal[0][1:] == ("the same request earlier", "1 of 1", "")
    assert equal[1][1:] == ("a newly started server", "0 of 1", "chat, 12K: turn 2")
    assert "mlx_lm.server sends events that are not JSON." in list(notes(results))


class Links(HTMLParser):
    """Everything in a page that a browser would fetch or run, its ids, and its rules."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.fetched.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if (name, value) == ("http-equiv", "Content-Security-Policy"):
                self.policy = dict(attrs)["content"] or ""


def test_the_report_is_one_page_that_asks_nobody_for_anything(results: Results) -> None:
    """No script, no link but within the page, no font or picture from elsewhere."""
    page = report(results)
    found = Links()
    found.feed(page)
    assert {"svg", "table", "details"} <= found.tags
    assert not {"script", "iframe", "link", "object", "embed", "img"} & found.tags
    assert all(each.startswith("#") for each in found.fetched)
    assert all(each.startswith("#") for each in re.findall(r"url\(([^)]*)\)", page))
    assert "@import" not in page
    assert found.policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert len(found.ids) == len(set(found.ids)), "four pictures share one page"
    assert {each[1:] for each in found.fetched} <= set(found.ids)


def test_the_report_follows_the_readers_colours_and_width(results: Results) -> None:
    """Dark pages, phones; pictures in the colour of the text, with words for those who do not see."""
    page = report(results)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert page.count("<svg") == page.count('role="img"') == 4
    assert "currentColor" in page
    assert "#010203" not in page
    assert "#040506" not in page


def test_what_a_server_says_is_text(results: Results) -> None:
    """Its name, its notes, its errors: nothing of it becomes part of the page."""
    results.servers[0].notes.append(HOSTILE)
    page = report(results)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 4


def test_pictures_are_drawn_for_what_was_measured(results: Results, tmp_path: Path) -> None:
    """Four with everything; none of nothing."""
    names = [chart.name for chart in charts(results)]
    assert names == ["ttft-by-length", "ttft-by-scenario", "several-clients", "memory"]
    for chart in charts(results):
        assert chart.png(tmp_path).read_bytes().startswith(b"\x89PNG")
    svg = charts(results)[0].svg()
    assert all(f">{size_text(size)}<" in svg for size in COLD_1162)
    assert "mlx_lm.server, hot" in svg
    results.servers = results.servers[2:]
    assert charts(results) == []
    assert "<svg" not in report(results)


def test_an_earlier_run_joins_on_the_same_machine_only(results: Results) -> None:
    """Its servers come first, and one of the same name is told apart."""
    earlier = replace(results, servers=[server("ollama", 2.0), server("mlx_lm.server", 3.0)])
    results.join(earlier)
    names = [each.name for each in results.servers]
    assert names == ["ollama", "mlx_lm.server", "mlx_lm.server'", HOSTILE, "llama-server"]
    other = replace(results, machine={**results.machine, "chip": "Apple M4 Ultra"})
    with pytest.raises(ResultsError, match="another machine: its chip is Apple M4 Ultra"):
        results.join(other)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Another bench's result, a list, half a file."""
    file = tmp_path / "results.json"
    for wrong in ('{"command": "server"}', "[]", '{"schema": "mlx-', '{"schema": "other/1"}'):
        file.write_text(wrong, encoding="utf-8")
        with pytest.raises(ResultsError):
            Results.read(file)


def repeats(*counts: tuple[int | None, int | None]) -> Measured:
    """One run of a prompt of 1,000: cold, then again."""
    steps = ("cold", "again", "again")
    return Measured(
        "s",
        "url",
        requests=[
            Request("repeat", 1_000, step, 0, 1.0, 1.0, prompt, cached, 8, "length")
            for step, (prompt, cached) in zip(steps, counts, strict=False)
        ],
    )


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (((1_030, 3), (1_030, 1_029)), []),
        (((400, 0), (400, 399)), ["context is too small"]),
        (((1_030, 500), (1_030, 1_029)), ["cold times are too good"]),
        (((1_030, 0), (1, 0)), ["counts as prompt only what it read"]),
        (((None, None), (None, None)), []),
    ],
)
def test_figures_that_cannot_be_believed_are_found(
    counts: tuple[tuple[int | None, int | None], ...], expected: list[str]
) -> None:
    """A prompt that was cut, one that was warm, and counts that mean something else."""
    found = list(odd(repeats(*counts)))
    assert len(found) == len(expected)
    assert all(words in each for words, each in zip(expected, found, strict=True))


def test_times_are_written_for_people() -> None:
    """Milliseconds below a second, three digits above."""
    assert [seconds_text(Spread(s, s, s)) for s in (0.0421, 1.234, 12.34, 123.4)] == [
        *("42 ms", "1.23 s", "12.3 s", "123 s")
    ]
    assert seconds_text(Spread(0.9, 0.8, 1.1)) == "900 ms (800-1100)"
    assert seconds_text(None) == ""


def test_sizes_are_written_as_in_the_issue() -> None:
    """In order, each once."""
    assert sizes_of(["60K", "12000", "12k", "1.5K", "1050"]) == (1_050, 1_500, 12_000, 60_000)
    assert [size_text(each) for each in (1_050, 12_000)] == ["1,050", "12K"]


def test_what_a_cache_can_answer_is_all_but_the_first_step() -> None:
    """Of every scenario but the one that only measures speed."""
    assert hot_steps("repeat") == {"again"}
    assert hot_steps("sessions") == {"visited again"}
    assert all(hot_steps(name) for name in SCENARIOS if name != "throughput")
    assert steps_of("changed-ending") == ["cold", "ending changed", "changed again"]


def test_text_goes_on_where_the_reference_ends() -> None:
    """120,000 tokens of a large vocabulary are more than the reference has; all of it is real."""
    tokenizer = ByCharacters(4.5)
    material = Material(tokenizer, 124_000)
    long = material.text(120_000)
    assert len(long) == 540_000
    assert long.endswith(tokenizer.decode(prompt_of(tokenizer, 120_000)[-10:]))
    assert len({long[at : at + 200] for at in range(0, len(long), 1_000)}) > 530
    assert len(library_text(10_000)) == 10_000


def test_text_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python without the sources of its library."""
    monkeypatch.setattr(text, "library_text", lambda characters: "")
    with pytest.raises(PromptError, match="fewer than 400,000"):
        prompt_of(ByCharacters(4.5), 400_000)


def test_a_model_is_described_by_its_files(tmp_path: Path) -> None:
    """Kind, quantization and bytes, and no folder of the user's."""
    bundled = describe(str(BUNDLED_MODEL))
    assert (bundled["type"], bundled["layers"], bundled["quantization"]) == (
        *("qwen3_next", 4, "float32"),
    )
    assert bundled["bytes"] > 5_000_000
    config = {
        "text_config": {"num_hidden_layers": 48},
        "quantization": {"bits": 8, "group_size": 64},
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert describe(str(tmp_path))["quantization"] == "8 bits, groups of 64"
    assert describe("mlx-community/Some-Model") == {"name": "mlx-community/Some-Model"}
    for part in (1, 2):
        (tmp_path / f"Big-UD-Q4_K_XL-0000{part}-of-00002.gguf").write_bytes(b"12345")
    parts = describe_gguf(tmp_path / "Big-UD-Q4_K_XL-00001-of-00002.gguf")
    assert (parts["quantization"], parts["bytes"]) == ("UD-Q4_K_XL", 10)


def test_macos_names_the_chip_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `sysctl`, which other systems have not; there the kernel's list of processors does."""
    told = {"machdep.cpu.brand_string": "Apple M4 Ultra", "hw.model": "Mac16,9"}
    monkeypatch.setattr(machine_module, "_sysctl", told.__getitem__)
    assert (machine()["chip"], machine()["model"]) == ("Apple M4 Ultra", "Mac16,9")
