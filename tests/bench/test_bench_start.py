"""`bench start` and `bench against`: programs of two checkouts in turns. Times are never asserted."""

import json
from pathlib import Path

import pytest
from mlx_hybridcache_bench import against, cli, start
from mlx_hybridcache_bench.kit.checkouts import HERE, THERE, Checkout
from mlx_hybridcache_bench.kit.paired import Spent
from mlx_hybridcache_bench.serving.servers import OURS, THEIRS
from mlx_hybridcache_bench.start import HELP, LIST, Program
from places import ROOT

from mlx_hybridcache.errors import SettingError


def program(name: str, checkout: str, cpu_seconds: float, order: list[str]) -> Program:
    """One that takes the same time whenever it is started."""

    def started() -> Spent:
        order.append(f"{name} {checkout}")
        return Spent(2 * cpu_seconds, cpu_seconds)

    return Program(name, checkout, started)


def test_programs_are_started_in_turns_and_the_first_start_does_not_count() -> None:
    """A b, b a, a b for two pairs."""
    order: list[str] = []
    programs = [program("a", "", 1.0, order), program("b", "", 1.0, order)]
    start.measure_starts(programs, pairs=2)
    assert "".join(each[0] for each in order) == "abbaab"
    assert [len(each.spent) for each in programs] == [2, 2]


def test_starts_stand_beside_their_targets() -> None:
    """1.5 x mlx_lm.server misses 1.15; a tenth of the other checkout keeps a fifth."""
    order: list[str] = []
    here = [
        program(n, HERE, s, order) for n, s in ((THEIRS, 2), (OURS, 3), (HELP, 0.1), (LIST, 0.4))
    ]
    there = [program(n, THERE, s, order) for n, s in ((OURS, 3), (HELP, 1), (LIST, 1))]
    start.measure_starts([*here, *there], pairs=1)
    assert [(each.value, each.kept) for each in start.figures([*here, *there])] == [
        *((1.5, False), (0.1, True), (0.4, False))
    ]
    assert len(start.figures(here)) == 1


def test_a_checkout_that_is_none_and_a_command_that_fails_are_told(tmp_path: Path) -> None:
    """With its last words."""
    with pytest.raises(SettingError, match="git worktree add"):
        Checkout.at(tmp_path)
    with pytest.raises(SettingError, match="no cache directory"):
        Checkout.here().run(["cache", "ls", "--cache-dir", str(tmp_path)])


def test_programs_are_those_of_their_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with a package of that name, asked from within this checkout: its command fails in its words."""
    package = tmp_path / "mlx_hybridcache"
    package.mkdir()
    package.joinpath("__init__.py").touch()
    package.joinpath("cli.py").write_text("raise SystemExit('so old a command')")
    monkeypatch.chdir(ROOT)
    with pytest.raises(SettingError, match="so old a command"):
        Checkout.at(tmp_path).run(["--help"])


def test_values_of_both_are_compared_pair_by_pair() -> None:
    """2, 3 and 10 times: 3; a value that one run lacks is left out, and nothing is divided by 0."""
    here = [{"cold": each, "more": 1.0, "none": 0.0} for each in (2.0, 3.0, 10.0)]
    there = [{"cold": 1.0, "none": 0.0} for _ in here]
    cold, none = against.compared(here, there)
    assert cold.ratio is not None
    assert (cold.ratio.median, cold.ratio.low, cold.ratio.high) == (3, 2, 10)
    assert none.ratio is None


def test_a_bench_runs_beside_another_checkout(tmp_path: Path) -> None:
    """Against itself: the same counts, so that every ratio of them is 1."""
    file = tmp_path / "against.json"
    ran = ["policies", "--only", "few-shot", "--requests", "6", "--budget", "1GB"]
    assert cli.main(["against", str(ROOT), "--pairs", "1", "--json", str(file), "--", *ran]) == 0
    told = json.loads(file.read_text(encoding="utf-8"))
    assert told["ran"] == ran
    values = {each["name"]: each for each in told["values"]}
    assert {against.CLOCK, against.PROCESSOR} < set(values)
    least_recent = values["worst place, ours / least recently used"]
    assert least_recent["here"] == least_recent["there"]


@pytest.mark.long
def test_servers_and_commands_are_started(tmp_path: Path) -> None:
    """Once each, of this checkout and of the same one again."""
    file = tmp_path / "start.json"
    assert cli.main(["start", "--quick", "--against", str(ROOT), "--json", str(file)]) == 0
    told = json.loads(file.read_text(encoding="utf-8"))
    assert len(told["starts"]) == 7
    assert all(each["cpu_seconds"][0] > 0 for each in told["starts"])
    assert len(told["figures"]) == 3
