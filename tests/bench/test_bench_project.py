"""Projections: what is read again agrees with the engine, and each second is accounted for."""

import json
import re

import known_models
import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_hybridcache_bench import cli
from mlx_hybridcache_bench.disk_promotion import FORGOTTEN, NEW
from mlx_hybridcache_bench.project import (
    BEHIND,
    ISSUE_1162,
    ISSUE_1162_WEIGHTS,
    SIZES,
    Projection,
    Watched,
    target_of,
)
from mlx_hybridcache_bench.project_costs import Costs, Speed, costs, read_cold
from mlx_hybridcache_bench.project_scenarios import COLD, SCENES
from mlx_hybridcache_bench.simulate import SHAPES
from mlx_hybridcache_bench.workloads import Chance
from places import ROOT

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.errors import SettingError

SHAPE = SHAPES["qwen3-next-80b"]
AMPLE = 10**12
KNOWN = Costs(1e-9, 2e-9, 4e-9, 1e-6, {"cores": 1, "device": "none"}, ("a test",))


def by_name(name):
    """A scenario."""
    return next(scene for scene in (COLD, *SCENES) if scene.name == name)


class Turns:
    """Turn marks of the request that is asked."""

    def __init__(self):
        self.turns = ()

    def starts(self, tokens):
        """As the trace has them."""
        return self.turns

    def strips(self, reply):
        """Decided by the trace."""
        return False


@pytest.mark.parametrize(
    "scene", {scene.asks: scene for scene in SCENES}.values(), ids=lambda scene: scene.name
)
def test_what_is_read_again_is_what_the_engine_reads_again(scene):
    """1,700 tokens on a tiny Qwen3-Next, every request of every scenario: restored tokens, forwards, checkpoints."""
    trace = scene.asks(Chance(3), 1700)
    simulation = Watched(trace, SHAPE, AMPLE)
    model = tiny.build("qwen3_next")
    with HybridPromptCache(model, memory_budget="1TiB") as cache:
        cache.engine.prefill.marks = marks = Turns()
        for index, asked in enumerate(trace):
            replayed = simulation.serve(index)
            tokens, reply = ((x % 151).tolist() for x in (asked.tokens, asked.reply))
            marks.turns = asked.turns
            ready = cache.prefill(tokens)
            report = ready.report
            assert simulation.restored == report.restored_tokens
            assert replayed == report.replayed_tokens
            assert len(simulation.slices) == report.forwards
            assert simulation.saved == report.checkpoints_taken
            if asked.keeps_reply:
                # The reply's end, which the simulation saves too.
                model(mx.array([[*ready.rest, *reply]]), cache=ready.prompt_cache)
                cache.save([*tokens, *reply], ready.prompt_cache)
            ready.release()


def test_the_fit_finds_what_the_times_are_made_of():
    """1 ms a token and 4 ns times the square: found, and exact where nothing was measured."""
    times = {n: 1e-3 * n + 4e-9 * n**2 for n in (5_000, 20_000, 50_000)}
    speed = Speed.fitted(times)
    assert speed.linear == pytest.approx(1e-3)
    assert speed.quadratic == pytest.approx(4e-9)
    assert speed.worst_miss < 1e-9
    assert speed.seconds(0, 80_000) == pytest.approx(80 + 25.6)
    assert speed.seconds(40_000, 60_000) == pytest.approx(20 + 8)


def test_the_fit_of_issue_1162_is_near_its_figures():
    """12.4, 28.7 and 71.6 s: within 10 %, no part negative, 120,000 is beyond them."""
    speed = Speed.fitted(ISSUE_1162)
    assert speed.worst_miss < 0.1
    assert min(speed.linear, speed.quadratic) > 0
    assert [speed.is_known(size) for size in SIZES] == [True, True, True, False]


@pytest.mark.parametrize("times", [{1000: 2.0}, {1000: 1.0, 2000: 1.5}, {1000: 1.0, 2000: 9.0}])
def test_neither_part_of_a_fit_is_negative(times):
    """One time alone; sublinear; more than quadratic."""
    speed = Speed.fitted(times)
    assert speed.linear >= 0
    assert speed.quadratic >= 0
    assert speed.seconds(0, 1000) > 0


@pytest.mark.parametrize("given", ["12000", "12000=fast", "12000=-1", "0=3", "1000=nan", "1=inf"])
def test_cold_times_that_are_none_are_refused(given):
    """A sentence, not a traceback."""
    with pytest.raises(SettingError):
        Speed.fitted(read_cold([given]))


def projection(**changes):
    """One with round costs: 1 GB a second restored, 0.5 saved, 0.25 promoted, 1 us a token tokenized."""
    settings = {
        "speed": Speed.fitted({10_000: 10.0}),
        "costs": KNOWN,
        "target": target_of(None),
        "bandwidth": ISSUE_1162_WEIGHTS * 10,
        "budget_bytes": AMPLE,
    }
    return Projection(**(settings | changes))


def test_an_exact_repeat_costs_its_tokenizing_its_copy_and_one_forward():
    """30,000 tokens: 0.03 s of tokenizing, a byte a nanosecond, a tenth of a second for the last token."""
    row = projection().scene(by_name("exact repeat"), 30_000)
    assert (row.replayed_tokens, row.forwards, row.checkpoints) == (1, 1, 0)
    nbytes = (row.prompt_tokens - 1) * SHAPE.row_bytes + SHAPE.checkpoint_bytes
    assert row.restored_bytes == nbytes
    assert row.seconds == pytest.approx(row.prompt_tokens * 1e-6 + nbytes * 1e-9 + 0.1)
    again = projection().scene(by_name("exact repeat after a restart"), 30_000)
    assert again.seconds - row.seconds == pytest.approx(nbytes * 3e-9)


def test_what_is_read_again_costs_its_forwards_and_what_it_saves():
    """A changed last line: 63 tokens in one forward that takes its floor, and two checkpoints or so."""
    row = projection().scene(by_name("last line changed"), 30_000)
    read = row.replayed_tokens - 1
    assert 0 < read < 64
    saved = read * SHAPE.row_bytes + row.checkpoints * SHAPE.checkpoint_bytes
    assert row.checkpoints >= 1
    expected = row.prompt_tokens * 1e-6 + row.restored_bytes * 1e-9 + saved * 2e-9 + 0.1 + 0.1
    assert row.seconds == pytest.approx(expected)


def test_a_changed_line_near_the_beginning_costs_nearly_all_of_it():
    """No cache restores what stands behind it: at least nine tenths of the cold time at 60,000."""
    whole = projection()
    row = whole.scene(by_name("line at the end of 3,000 changed"), 60_000)
    assert row.seconds > 0.9 * whole.cold_seconds(60_000)
    assert row.restored_tokens > 2_900


def test_clients_at_once_wait_for_each_other_and_a_short_one_for_a_slice():
    """Four identical: one reading and three repeats. 100 tokens: at most the slice that has begun."""
    whole = projection()
    repeat = whole.scene(by_name("exact repeat"), 12_000)
    cold = whole.scene(COLD, 12_000)
    at_once = whole.scene(by_name("4 cold ones at once, identical"), 12_000)
    assert at_once.seconds == pytest.approx(cold.seconds + 3 * repeat.seconds)
    behind = whole.behind(12_000)
    assert behind.seconds == pytest.approx(2.048 + 0.1 + 0.1 + 1e-4)


def test_a_budget_that_holds_no_such_prompt_is_refused():
    """60,000 tokens of rows are 1.5 GB."""
    with pytest.raises(SettingError, match=r"60,0.. tokens does not fit .* 953\.7 MiB"):
        projection(budget_bytes=10**9).scene(COLD, 60_000)


def test_a_model_of_its_own_is_projected_with_its_own_shapes(tmp_path):
    """Qwen3.5-122B by its config: twice the checkpoint, the same rows. Attention alone is refused."""
    target = target_of(known_models.directory(tmp_path, "qwen3.5-122b"))
    assert target.shape.row_bytes == SHAPE.row_bytes
    assert 1.9 < target.shape.checkpoint_bytes / SHAPE.checkpoint_bytes < 2.1
    row = projection(target=target).scene(by_name("exact repeat"), 12_000)
    assert row.restored_bytes > projection().scene(by_name("exact repeat"), 12_000).restored_bytes
    dense = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    dense |= {"intermediate_size": 64, "num_attention_heads": 2, "rms_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(dense))
    with pytest.raises(SettingError, match="restores at any token"):
        target_of(str(tmp_path))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Results of the real commands at full shapes, few tokens."""
    path = tmp_path_factory.mktemp("measured")
    overhead, disk = path / "overhead.json", path / "disk.json"
    full = ["--only", "full-size", "--tokens", "600", "--pairs", "1"]
    assert cli.main(["overhead", *full, "--json", str(overhead)]) in (0, 1)
    sizes = ["--promotion-sizes", "300", "--stand-in-tokens", "600", "--repeats", "1"]
    assert cli.main(["disk", "--only", "promotion", *sizes, "--json", str(disk)]) in (0, 1)
    return overhead, disk


def test_costs_are_those_of_the_files(measured):
    """Seconds per byte, as `bench overhead` and `bench disk` measured them."""
    overhead, disk = measured
    found = costs(overhead, disk, tokens=0, pairs=0)
    part = json.loads(overhead.read_text())["parts"]["full-size"]
    assert found.restore == part["restore"]["b_seconds"] / part["restored_bytes"]
    assert found.save == part["save"]["b_seconds"] / part["saved_bytes"]
    promotion = json.loads(disk.read_text())["parts"]["promotion"]["promotions"][-1]
    reads = promotion["reads"]
    way = FORGOTTEN if FORGOTTEN in reads else NEW
    assert found.promote == reads[way]["b_seconds"] / promotion["needed_bytes"]
    assert 1e-9 < found.tokenize < 1e-3


@pytest.mark.parametrize(
    ("which", "change", "said"),
    [
        (0, lambda told: told["machine"].update(cores=99), "different machines"),
        (0, lambda told: told["parts"]["full-size"].update(shapes="tiny"), "tiny shapes"),
        (0, lambda told: told["parts"].clear(), "no result of .*overhead"),
        (1, lambda told: told.update(command="decode"), "no result of .*disk"),
        (1, lambda told: told["parts"]["promotion"]["promotions"].pop(), "has no promotion at"),
    ],
)
def test_files_that_are_something_else_are_refused(measured, tmp_path, which, change, said):
    """Another machine's, other shapes, another command's: a sentence that says what to run."""
    told = json.loads(measured[which].read_text())
    change(told)
    files = list(measured)
    files[which] = tmp_path / "changed.json"
    files[which].write_text(json.dumps(told))
    with pytest.raises(SettingError, match=said):
        costs(*files, tokens=0, pairs=0)
    files[which].write_text("no json")
    with pytest.raises(SettingError, match="Write it anew"):
        costs(*files, tokens=0, pairs=0)


def test_the_command_prints_a_projection_and_says_so(measured, tmp_path, capsys):
    """Every scenario at every size, the assumptions, and what issue 1162 reported."""
    overhead, disk = measured
    file = tmp_path / "projection.json"
    options = ["--overhead", str(overhead), "--disk", str(disk), "--json", str(file)]
    assert cli.main(["project", *options]) == 0
    shown = capsys.readouterr().out
    assert "PROJECTION, not a measurement" in shown
    assert "mlx-lm issue 1162" in shown
    assert "120,000*" in shown
    told = json.loads(file.read_text())
    assert told["is_projection"] is True
    documented = ROOT.joinpath("bench", "README.md").read_text("utf-8")
    section = documented.split("`mlx-hybridcache bench project`")[1].split("\n## ")[0]
    assert {*told, *told["rows"][0]} <= set(re.findall(r"\w+", section))
    assert len(told["assumptions"]) == 7
    assert told["cold_seconds"]["60000"] == 71.6
    names = {row["scenario"] for row in told["rows"]}
    assert names == {scene.name for scene in SCENES} | {BEHIND}
    assert len(told["rows"]) == len(names) * len(SIZES)
    assert all(np.isfinite(row["seconds"]) and row["seconds"] > 0 for row in told["rows"])


def test_what_is_not_given_is_measured(tmp_path, capsys):
    """600 tokens at full shapes; times of one's own."""
    file = tmp_path / "projection.json"
    options = ["--measure-tokens", "600", "--pairs", "1", "--sizes", "2000", "--json", str(file)]
    assert cli.main(["project", *options, "--cold", "2000=2.5", "--source", "my Mac"]) == 0
    shown = capsys.readouterr().out
    assert "Cold times: my Mac (2,000: 2.5 s)" in shown
    assert "measured just now" in shown
    assert json.loads(file.read_text())["cold_seconds"] == {"2000": 2.5}
