"""The bench runs, prints its tables and counts right. Timings are never asserted here."""

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny
from mlx_hybridcache_bench import cli
from mlx_hybridcache_bench.kit.models import wide_qwen3
from mlx_hybridcache_bench.kit.paired import Paired, Spent, measure
from mlx_hybridcache_bench.kit.standin import QWEN3_NEXT_80B, TINY
from mlx_hybridcache_bench.kit.tables import Figure
from mlx_hybridcache_bench.overhead import cold
from mlx_hybridcache_bench.overhead.full_size import FullSize, measure_full_size
from mlx_hybridcache_bench.overhead.selection import Selection
from mlx_hybridcache_bench.overhead.slices import Run, Slices, measure_slices
from mlx_hybridcache_bench.overhead.stored import Filled, Stored
from mlx_hybridcache_bench.quantized import Mlxlm
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from places import ROOT
from rich.console import Console

SMALL_OVERHEAD = [
    *("overhead", "--pairs", "1", "--prompt-tokens", "300", "--max-tokens", "2"),
    *("--conversations", "20", "--match-tokens", "6000"),
    *("--shapes", "tiny", "--tokens", "1200"),
    *("--slice-tokens", "1500", "--step", "512"),
    *("--nodes", "100", "--nodes", "200"),
]


@pytest.fixture(scope="module")
def overhead(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a small `bench overhead` wrote."""
    file = tmp_path_factory.mktemp("overhead") / "overhead.json"
    assert cli.main([*SMALL_OVERHEAD, "--json", str(file)]) == 0
    return dict(json.loads(file.read_text(encoding="utf-8")))


def test_overhead_writes_the_documented_keys(overhead: dict[str, Any]) -> None:
    """bench/README.md lists them; programs that read the file rely on them."""
    assert set(overhead) == {"command", "machine", "figures", "parts"}
    assert set(overhead["parts"]) == {
        *("cold", "matching", "full-size", "slices", "router", "store"),
    }
    assert {"date", "cores", "memory_bytes", "device", "mlx", "mlx_lm"} <= set(overhead["machine"])
    assert {"name", "value", "unit", "target", "counted", "kept"} == set(overhead["figures"][0])
    assert {"ratio", "ratio_min", "ratio_max", "cpu_ratio"} <= set(
        overhead["parts"]["cold"]["paired"]
    )


def test_every_counted_figure_keeps_its_target(overhead: dict[str, Any]) -> None:
    """Facts do not depend on how busy the machine is."""
    counted = [figure for figure in overhead["figures"] if figure["counted"]]
    assert len(counted) == 6
    assert [figure["name"] for figure in counted if not figure["kept"]] == []


def test_a_cold_run_gives_the_plain_reply_and_leaves_checkpoints(overhead: dict[str, Any]) -> None:
    """300 tokens in two ways: the same tokens out."""
    cold = overhead["parts"]["cold"]
    assert cold["same_reply"]
    assert cold["checkpoints"] >= 1


def test_a_long_prompt_matches_as_far_as_it_is_stored(overhead: dict[str, Any]) -> None:
    """6,000 tokens of which all but the last, half, a system prompt, and none are stored."""
    lookups = overhead["parts"]["matching"]["lookups"]
    assert [each["matched_tokens"] for each in lookups] == [5999, 3000, 1500, 0]


def test_a_full_store_is_measured_in_every_shape(overhead: dict[str, Any]) -> None:
    """100 and 200 nodes: each save pushes something out."""
    stores = overhead["parts"]["store"]["stores"]
    shapes = [(each["shape"], each["nodes"]) for each in stores]
    assert shapes == [
        (shape, size) for shape in ("flat", "deep", "one path") for size in (100, 200)
    ]
    assert all(0 < each["evictions_per_round"] <= 3 for each in stores)
    assert all(set(each["ms"]) == {"publish", "evicting save", "afford"} for each in stores)


def test_one_part_can_be_measured_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """`--only matching` prints that table and the figures, and nothing of the rest."""
    assert cli.main([*SMALL_OVERHEAD, "--only", "matching"]) == 0
    printed = capsys.readouterr().out
    assert "Matching in 20 conversations" in printed
    assert "Figures and targets" in printed
    assert "Forwards by slice length" not in printed


@pytest.fixture(scope="module")
def full_size() -> FullSize:
    """On tiny shapes."""
    return measure_full_size(1200, pairs=1, shapes=TINY)


def test_restored_buffers_are_not_copied_by_the_next_tokens(full_size: FullSize) -> None:
    """The control, a cache of exactly the prompt's size, is: so the count can see a copy."""
    assert full_size.growth_copies == 0
    assert full_size.exact_size_growth_copies == 1
    assert full_size.restored_right


def test_ten_branches_hold_the_shared_rows_once(full_size: FullSize) -> None:
    """At most 5 % more than one set of rows, the branches' own and the checkpoints."""
    assert full_size.branch_ratio <= 1.05
    assert full_size.branch_reported_bytes == full_size.branch_expected_bytes


def test_the_stand_in_weighs_what_qwen3_next_80b_weighs() -> None:
    """24 KiB a token, about 74 MiB a checkpoint (design section 1)."""
    assert QWEN3_NEXT_80B.row_bytes == 24 * 1024
    assert round(QWEN3_NEXT_80B.snapshot_bytes / 2**20) == 74


def test_every_run_stays_within_its_bound_of_forwards() -> None:
    """Cold and hot, with and without capture hook, without, with few and with many turn tokens."""
    found = measure_slices(tokens=1500, step=512)
    assert {(run.name, run.hook, run.turns > 6) for run in found.runs} == {
        (name, hook, many)
        for name in ("cold", "hot")
        for hook in (True, False)
        for many in (True, False)
    }
    for run in found.runs:
        assert len(run.lengths) <= run.bound
        assert sum(run.lengths) == run.replayed_tokens
    cold = [run for run in found.runs if run.name == "cold"]
    for hooked, paused in zip(cold[:3], cold[3:], strict=True):
        assert len(hooked.lengths) < len(paused.lengths), "the hook was not taken away"


def test_quantized_rows_are_weighed_and_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Heads of 64: for 4 bits and for 8 the bytes, counted and kept, and times beside two references."""
    file = tmp_path / "quantized.json"
    small = ["--context", "24", "--new-tokens", "1", "--pairs", "1"]
    assert cli.main(["quantized", *small, "--json", str(file)]) == 0
    written = json.loads(file.read_text(encoding="utf-8"))
    figures = written["figures"]
    assert [each["value"] for each in figures if each["counted"]] == [4.5 / 16, 8.5 / 16]
    assert [each["name"] for each in figures[1:5]] == [
        f"4 bits / {reference}: {what}"
        for reference in ("mlx-lm's own", "full precision")
        for what in ("hot request", "a token")
    ]
    assert set(written["theirs"]) == {"4", "8"}
    assert "by MLX's kernels" in capsys.readouterr().out


def test_what_quantized_rows_are_timed_against_is_mlx_lms_own_cache() -> None:
    """Its classes, which have read all but the last token, and have the reply's bits; asked for twice."""
    prompt = [*range(3, 27)]
    own = Mlxlm(wide_qwen3(), prompt, bits=4)
    assert {type(each) for each in own.stored} == {QuantizedKVCache}
    for _ in range(2):
        own.first_token()
        assert {each.offset for each in own.stored} == {len(prompt) - 1}
    assert {type(each) for each in Mlxlm(wide_qwen3(), prompt).stored} == {KVCache}


def test_decode_prints_a_table_and_chooses_the_tokens_of_a_full_re_prefill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen3-MoE, dense Qwen3 and the bundled model, at two lengths."""
    plot, file = tmp_path / "decode.png", tmp_path / "decode.json"
    small = ["--contexts", "16", "40", "--new-tokens", "2"]
    assert cli.main(["decode", *small, "--plot", str(plot), "--json", str(file)]) == 0
    written = json.loads(file.read_text(encoding="utf-8"))
    assert set(written) == {"command", "machine", "new_tokens", "figures", "contexts", "plot"}
    assert [each["context_tokens"] for each in written["contexts"]] == [16, 40] * 3
    assert all(each["same_tokens"] for each in written["contexts"])
    printed = capsys.readouterr().out
    assert "Qwen3-MoE" in printed
    assert "Qwen3 dense" in printed
    if written["plot"] is None:  # matplotlib comes with the `bench` extra only
        assert "no plot" in printed
    else:
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_pairs_are_measured_in_turns_after_a_warm_up() -> None:
    """In the order a b, b a, a b: whatever grows slower with time does so for both."""
    order: list[str] = []
    found = measure(lambda: order.append("a"), lambda: order.append("b"), pairs=2, warm_up=1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert len(found.a) == len(found.b) == 2


def test_a_ratio_is_the_median_of_the_pairs() -> None:
    """2, 3 and 10 times: 3, though the medians alone would say 6."""
    a = tuple(Spent(each, each) for each in (1.0, 2.0, 1.0))
    b = tuple(Spent(each, 2 * each) for each in (2.0, 6.0, 10.0))
    found = Paired(a, b)
    assert (found.ratio, found.cpu_ratio) == (3.0, 6.0)
    assert found.ratios == [2.0, 3.0, 10.0]


@pytest.mark.parametrize(("value", "kept"), [(1.03, True), (1.031, False)])
def test_a_figure_keeps_its_target_up_to_the_target_itself(value: float, kept: bool) -> None:
    """`at most 1.03` includes 1.03."""
    assert Figure("cold", value, "x", 1.03, counted=False).kept is kept


def test_the_page_is_watched_and_what_it_costs_is_counted(tmp_path: Path) -> None:
    """Twenty conversations, two updates, no browser: nothing is asked of the worker, little is told."""
    file = tmp_path / "page.json"
    small = ["--conversations", "20", "--updates", "2", "--no-browser"]
    assert cli.main(["page", *small, "--json", str(file)]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert set(found) == {
        *("command", "machine", "conversations", "nodes", "updates", "costs", "figures")
    }
    assert found["conversations"] == 20
    assert found["nodes"] > 60
    assert found["costs"]["events"] >= 2
    assert found["costs"]["told_runs"]
    assert all(0 < each <= 3 for each in found["costs"]["told_runs"])
    counted = [figure for figure in found["figures"] if figure["counted"]]
    assert len(counted) == 2
    assert all(figure["kept"] for figure in counted)


def documented_commands() -> list[str]:
    """Every command of the bench that a code block of a page shows."""
    found = []
    for page in (ROOT / "bench" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if line.startswith("mlx-hybridcache bench ")]
    return found


def test_documented_commands_are_understood() -> None:
    """Every line as it stands, read but not run; names and options that are gone would be refused."""
    parser = argparse.ArgumentParser()
    cli.add_commands(parser.add_subparsers(dest="measurement", required=True))
    commands = documented_commands()
    for line in commands:
        parser.parse_args(shlex.split(line, comments=True)[2:])
    assert len(commands) > 10
    readme = ROOT.joinpath("bench", "README.md").read_text(encoding="utf-8")
    assert all(f"`mlx-hybridcache bench {name}`" in readme for name in cli.COMMANDS)


def test_forwards_beyond_their_bound_are_counted() -> None:
    """1,024 tokens in slices of 512 with a hook: four forwards may be, and there were six."""
    run = Run("cold", True, 0, 1024, 1024, 512, (256, 256, 256, 254, 1, 1))
    assert run.bound == 4
    (figure,) = Slices(512, (run,)).figures()
    assert (figure.value, figure.kept) == (2, False)


def test_another_reply_than_the_plain_one_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm's own says one token less."""
    plain = cold.stream_generate
    monkeypatch.setattr(cold, "stream_generate", lambda *asked, **how: [*plain(*asked, **how)][1:])
    model, tokenizer = tiny.build("llama"), oracle.word_tokenizer()
    found = cold.measure_cold(model, tokenizer, [1, 2, 3], max_tokens=2, pairs=1)
    assert found.figures()[1].value == 1


def test_what_selecting_by_groups_adds_is_a_share_of_a_token(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A hundredth and three, where two are promised; of the processor's time half."""
    plain = (Spent(1.0, 1.0),)
    cases = {str(wall): Paired(plain, (Spent(wall, 1.5),)) for wall in (1.01, 1.03)}
    found = Selection(1, cases)
    assert [each.value for each in found.figures()] == pytest.approx([0.01, 0.03])
    assert [each.kept for each in found.figures()] == [True, False]
    found.show(Console())
    printed = capsys.readouterr().out
    assert "+3.00%" in printed
    assert printed.count("+50.00%") == 2


def test_what_is_stored_must_not_show_in_what_a_call_costs() -> None:
    """Three times as long at 10,000 nodes as at 100."""
    few, many = (
        Filled("flat", size, [ms], [ms], [ms], [1]) for size, ms in ((100, 1), (10_000, 3))
    )
    figures = Stored((few, many)).figures()
    assert [figure.value for figure in figures] == [3, 3, 3, 3]
    assert [figure.kept for figure in figures] == [False, False, False, True]
