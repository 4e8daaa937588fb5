"""`bench disk` at a tiny size: each part runs, and its counts are right. Timings are never asserted."""

import json
import re
from dataclasses import replace
from typing import Any
from unittest import mock

import oracle
import pytest
import tiny
from mlx_hybridcache_bench import cli
from mlx_hybridcache_bench.disk import promotion as disk_promotion
from mlx_hybridcache_bench.disk import restart
from mlx_hybridcache_bench.disk.handoff import HandOff, Taken, measure_handoff
from mlx_hybridcache_bench.disk.on_off import OFF, ON, Asked, OnAndOff, measure_on_and_off
from mlx_hybridcache_bench.disk.promotion import AGAIN, NEW, Promotion, measure_stand_in
from mlx_hybridcache_bench.disk.restart import KILLED, STOPPED, STRIDE, Restart, Restarts
from mlx_hybridcache_bench.kit.tables import Figure
from mlx_hybridcache_bench.serving.client import Reply
from places import ROOT

from mlx_hybridcache import HybridPromptCache

SMALL = [
    *("disk", "--quick", "--repeats", "1", "--tokens", "700", "--sizes", "300"),
    *("--reply-tokens", "8", "--promotion-sizes", "600"),
    *("--stand-in-tokens", "600", "--shapes", "tiny"),
]

Result = dict[str, Any]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Result]:
    """The exit status of a small `bench disk`, and what it wrote."""
    file = tmp_path_factory.mktemp("disk") / "disk.json"
    status = cli.main([*SMALL, "--json", str(file)])
    return status, json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def parts(whole_run: tuple[int, Result]) -> Result:
    return dict(whole_run[1]["parts"])


def test_every_counted_figure_keeps_its_target(whole_run: tuple[int, Result]) -> None:
    """Five parts, nine facts; the exit status says so."""
    status, result = whole_run
    assert set(result) == {"command", "machine", "figures", "parts"}
    assert set(result["parts"]) == {"restart", "promotion", "hand-off", "on-off", "changes"}
    counted = [figure for figure in result["figures"] if figure["counted"]]
    assert len(counted) == 9
    assert [figure["name"] for figure in counted if not figure["kept"]] == []
    assert status == 0


def test_a_restart_reads_the_last_token_again(parts: Result) -> None:
    """700 tokens, stopped once and killed once: all but one come from files, none did before."""
    runs = parts["restart"]["runs"]
    assert sorted(run["way"] for run in runs) == sorted([KILLED, STOPPED])
    for run in runs:
        assert run["prompt_tokens"] > 700
        assert run["cold_cached_tokens"] == 0
        assert (run["replayed_tokens"], run["same_reply"]) == (1, True)


def test_a_promotion_reads_what_the_caches_need(parts: Result) -> None:
    """The model and the stand-in at 600 tokens: rows up to each checkpoint, and the last of those."""
    for promotion in parts["promotion"]["promotions"]:
        assert promotion["tokens"] == 600
        assert promotion["wrong"] == 0
        assert {NEW, AGAIN} <= set(promotion["reads"])
        assert promotion["files"] >= 2
        assert 0 <= promotion["file_bytes"] - promotion["needed_bytes"] < 64 * 1024


def test_every_segment_that_is_handed_over_is_heard_of_again(parts: Result) -> None:
    """As many checkpoints as runs of rows, each with the time that both ends of its way took."""
    found = parts["hand-off"]
    kinds = [each["kind"] for each in found["handed"]]
    assert kinds.count("rows") == kinds.count("state") > 0
    assert found["segments"] == len(found["done"]) == len(kinds)
    assert all(each["wall_seconds"] > 0 for each in found["handed"] + found["done"])


def test_requests_are_asked_with_a_directory_and_without(parts: Result) -> None:
    """300 tokens cold, then all but the last again, on both."""
    found = [
        (each["way"], each["step"], each["restored_tokens"]) for each in parts["on-off"]["requests"]
    ]
    assert sorted(found) == [
        *((OFF, "again", 299), (OFF, "cold", 0)),
        *((ON, "again", 299), (ON, "cold", 0)),
    ]


def test_a_run_writes_the_documented_keys(parts: Result) -> None:
    """bench/README.md lists every one of them."""
    documented = ROOT.joinpath("bench", "README.md").read_text("utf-8")
    section = documented.split("## `mlx-hybridcache bench disk`")[1].split("\n## ")[0]
    words = set(re.findall(r"\w+", section))
    keys = {
        *(*parts["restart"], *parts["restart"]["runs"][0]),
        *(*parts["promotion"], *parts["promotion"]["promotions"][0]),
        *(*parts["hand-off"], *parts["hand-off"]["handed"][0]),
        *(*parts["on-off"], *parts["on-off"]["requests"][0]),
    }
    assert words >= keys


def test_one_part_can_be_measured_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """`--only hand-off` prints that table and the figures, and nothing of the rest."""
    assert cli.main([*SMALL, "--only", "hand-off"]) == 0
    printed = capsys.readouterr().out
    assert "The worker thread, milliseconds per segment: tiny shapes" in printed
    assert "Promotion beside" not in printed


def test_a_promotion_with_other_bytes_than_memory_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One cache whose first byte is another: one wrong promotion, where without it there is none."""
    assert measure_stand_in("tiny", 600, pairs=1).wrong == 0
    honest = disk_promotion._bytes_of
    calls: list[int] = []

    def forged(caches: list[Any], position: int) -> list[bytes]:
        calls.append(position)
        found = honest(caches, position)
        return found if len(calls) == 1 else [bytes([found[0][0] ^ 1]) + found[0][1:], *found[1:]]

    monkeypatch.setattr(disk_promotion, "_bytes_of", forged)
    assert measure_stand_in("tiny", 600, pairs=1).wrong == 1


def test_more_runs_hand_over_more() -> None:
    """The unmeasured one is left out: two runs have twice the segments of one."""
    one, two = (measure_handoff("tiny", 600, runs=runs) for runs in (1, 2))
    assert 2 * len(one.handed) == len(two.handed) == len(two.done)


def test_what_a_flush_leaves_unwritten_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of eight: a size, cold and again, on both caches, in the unmeasured pair too."""
    monkeypatch.setattr(HybridPromptCache, "flush", lambda cache, seconds: False)
    model, tokenizer = tiny.build("llama"), oracle.word_tokenizer()
    found = measure_on_and_off(model, tokenizer, [30], reply_tokens=1, pairs=1)
    assert found.unwritten == 8


# What follows needs no model.

RESTART = Restart(
    way=STOPPED,
    prompt_tokens=12_000,
    cold_seconds=9.0,
    cold_cached_tokens=0,
    write_seconds=1.0,
    ready_seconds=2.0,
    hot_seconds=0.3,
    cached_tokens=11_999,
    same_reply=True,
)


def missed(figures: list[Figure]) -> list[str]:
    """The counted ones that miss their targets."""
    return [figure.name for figure in figures if figure.counted and not figure.kept]


@pytest.mark.parametrize(("again", "kept"), [(1, True), (STRIDE, True), (STRIDE + 1, False)])
def test_a_restart_may_read_one_stride_again(again: int, kept: bool) -> None:
    """2,048 tokens, the last one included, and not one more, in the worst run."""
    worst = replace(RESTART, cached_tokens=12_000 - again)
    figures = Restarts((RESTART, worst, replace(RESTART, way=KILLED))).figures()
    assert missed(figures) == ([] if kept else ["tokens read again, stopped, at most"])


def test_another_reply_after_a_restart_is_counted() -> None:
    """One of two: the command fails. None of two: it does not."""
    runs = (RESTART, replace(RESTART, way=KILLED, same_reply=False))
    assert missed(Restarts(runs).figures()) == ["replies that differ from the cold ones"]
    assert missed(Restarts((RESTART, replace(RESTART, way=KILLED))).figures()) == []


def test_the_reply_after_a_restart_is_held_against_the_cold_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another word, and the same."""
    first = Reply(1.0, 1.0, 9, 0, 2, "stop", content="The lamp")
    for again, same in ((replace(first, content="The door"), False), (first, True)):
        replies = [first, again]
        monkeypatch.setattr(restart, "_asked", lambda *asked, told=replies: told.pop(0))
        assert restart._restarted(mock.Mock(), mock.Mock(), STOPPED, "", 9).same_reply is same


def test_how_much_faster_never_fails_the_command() -> None:
    """A third of the cold time, where a fifteenth is promised: told, and no more."""
    slow = replace(RESTART, hot_seconds=3.0)
    figures = Restarts((slow, replace(slow, way=KILLED))).figures()
    assert [figure.kept for figure in figures if not figure.counted] == [False, False]
    assert missed(figures) == []


def test_a_segment_that_is_never_written_is_counted() -> None:
    """Two handed over, one done."""
    taken = Taken("rows", 0.0005, 0.0004)
    figures = HandOff("tiny", 600, (taken, taken), (taken,)).figures()
    assert missed(figures) == ["segments handed over and never heard of again"]


def test_pairs_that_differ_are_counted() -> None:
    """Another reply, another position, and something that was not written: three figures."""
    off = Asked(OFF, 300, "cold", 0, 1.0, 100.0, (1, 2), 0)
    same = OnAndOff((off, replace(off, way=ON)), 0)
    assert missed(same.figures()) == []
    other = OnAndOff((off, replace(off, way=ON, tokens=(1, 3), restored_tokens=64)), 1)
    assert len(missed(other.figures())) == 3


def test_a_wrong_promotion_fails_the_command() -> None:
    """One of three."""
    promotion = Promotion("stand-in", 600, 2, 100, 99, 1, 200, {})
    figures = disk_promotion.Promotions((promotion,)).figures()
    assert missed(figures) == ["promotions that are wrong"]
