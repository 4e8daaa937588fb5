"""What `bench ttft` says in one sentence, how long it says it takes, and who is asked when."""

import json
from dataclasses import replace

import pytest
from mlx_hybridcache_bench.kit.machine import machine
from mlx_hybridcache_bench.report.charts import charts
from mlx_hybridcache_bench.report.markdown import markdown
from mlx_hybridcache_bench.report.page import report
from mlx_hybridcache_bench.report.results import Measured, Request, Results
from mlx_hybridcache_bench.report.summary import sheets
from mlx_hybridcache_bench.report.verdict import verdicts
from mlx_hybridcache_bench.serving.servers import OURS, THEIRS, Launch, ServerProcess
from mlx_hybridcache_bench.serving.watch import LoadWatch, sentence
from mlx_hybridcache_bench.ttft.contenders import Contender, flags_of
from mlx_hybridcache_bench.ttft.measure import Measurement
from mlx_hybridcache_bench.ttft.pace import Pace, duration_text
from mlx_hybridcache_bench.ttft.plan import NAMES, USUAL, BenchPlan
from mlx_hybridcache_bench.ttft.remote import at_url
from mlx_hybridcache_bench.ttft.turns import fit_together, measure_in_turns
from places import SUPPORT

Told = dict[str, tuple[tuple[float, ...], int | None]]


def server(name: str, told: Told) -> Measured:
    """Hot requests of 1,000 tokens: by scenario the seconds of three runs, and what was restored."""
    steps = {"repeat": "again", "changed-ending": "ending changed", "chat": "turn 2"}
    requests = [
        Request(scenario, 1_000, step, run, after, after, 1_000, restored, 8, "stop")
        for scenario, (seconds, restored) in told.items()
        for run, after in enumerate(seconds)
        for step in (steps[scenario],)
    ]
    cold = [
        replace(each, step="cold", ttft_seconds=2.0, cached_tokens=0)
        for each in requests
        if each.scenario == "repeat"
    ]
    return Measured(name, "process", requests=[*cold, *requests])


def results(*servers: Measured) -> Results:
    settings = {"sizes": [1_000], "repeats": 3, "clients": 4}
    return Results("2026-11-25", {**machine(), "mlx_hybridcache": "0"}, settings, [*servers])


def said(ours: Told, theirs: Told) -> str:
    (found,) = verdicts(results(server(THEIRS, theirs), server(OURS, ours)))
    return found


def test_one_sentence_says_who_is_faster_where_and_from_what_to_what() -> None:
    """Ten times in one of two scenarios, with both times; equal in the other, whose runs overlap."""
    ours: Told = {"repeat": ((0.03, 0.02, 0.04), 999), "changed-ending": ((0.1, 0.1, 0.1), 900)}
    theirs: Told = {"repeat": ((0.04, 0.03, 0.02), 999), "changed-ending": ((1.0, 0.9, 1.1), 0)}
    assert said(ours, theirs) == (
        f"{OURS} is 10 times faster to the first token than {THEIRS} in 1 of 2 scenarios "
        "(changed-ending: 100 ms instead of 1.00 s); equal in repeat."
    )
    both = results(server(THEIRS, theirs), server(OURS, ours))
    assert verdicts(both)[0] in markdown(both).splitlines()[0]
    page = report(both)
    assert page.index("10 times faster") < page.index("<table")


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        (((3.0,) * 3, 999), ((1.0,) * 3, 0), "undecided in repeat"),  # it restored everything
        (((3.0,) * 3, 999), ((1.0,) * 3, 990), "slower in 1"),  # and so did the other
        (((1.0,) * 3, 0), ((3.0,) * 3, 0), "undecided in repeat"),  # nothing was restored
        (((3.0,) * 3, 0), ((1.0,) * 3, 999), "3.0 times slower in 1 (repeat: 3.00 s instead"),
        (((1.0,) * 3, None), ((3.0,) * 3, None), "3.0 times faster"),  # nobody tells
        (((1.0, 5.0, 9.0), 999), ((2.0, 3.0, 4.0), 0), "equal in repeat"),
    ],
)
def test_a_verdict_never_contradicts_what_was_counted(
    mine: tuple[tuple[float, ...], int | None],
    theirs: tuple[tuple[float, ...], int | None],
    expected: str,
) -> None:
    """Slower though it restored all that the other did not; faster though nothing was restored."""
    assert expected in said({"repeat": mine}, {"repeat": theirs})


@pytest.mark.parametrize(
    ("hot", "restored", "speedup"),
    [(0.02, 999, "100.0x"), (3.0, 999, "undecided"), (0.5, 0, "none"), (2.1, 0, "1.0x")],
)
def test_a_speedup_stands_beside_times_and_counts_or_not_at_all(
    hot: float, restored: int, speedup: str
) -> None:
    """2 s cold: a hundredth is a hundred times; slower with all restored, faster with nothing are none."""
    found = results(server(OURS, {"repeat": ((hot,) * 3, restored)}))
    (row,) = sheets(found)[0].rows
    assert row[3] == speedup
    assert all(row)


def test_one_size_has_a_picture_too() -> None:
    """Bars of three kinds of request instead of single dots, each with its time; labels by decade."""
    told: Told = {"repeat": ((0.03,) * 3, 999), "changed-ending": ((0.5,) * 3, 900)}
    drawn = charts(results(server(OURS, told)))[0].svg()
    assert all(f">{each}<" in drawn for each in ("the same again", "another ending", "30 ms"))
    labels = [f">{each}<" for each in ("10 ms", "100 ms", "300 ms", "1 s", "3 s")]
    assert [each in drawn for each in labels] == [True, True, False, True, False]


def test_a_promise_is_kept_by_leaving_runs_out() -> None:
    """30 s promised for three runs: after 12 s for the first the second fits, the third no more."""
    now = [100.0]
    pace = Pace(clock=lambda: now[0])
    pace.promise(30.0)
    assert pace.goes_on(0)
    now[0] += 12.0
    assert pace.goes_on(1)
    now[0] += 12.0
    assert not pace.goes_on(2)
    now[0] = 100.0
    assert not pace.goes_on(2), "one answer for all servers"
    assert pace.left_out == 1


def test_times_to_wait_are_written_for_people() -> None:
    """Rounded up."""
    assert [duration_text(s) for s in (3, 61, 121, 600, 7_810)] == [
        *("10 s", "70 s", "3 min", "10 min", "2 h 11 min")
    ]


def test_what_else_ran_is_said() -> None:
    """1.4 of 2 cores are too many; 0.1 are not."""
    busy = {"cores": 2, "others_median": 1.4, "others_most": 2.0}
    assert "1.4 of 2 cores busy (median; at most 2.0): times are too long" in sentence(busy)
    assert sentence({**busy, "others_median": 0.1}).endswith("at most 2.0).")
    with LoadWatch() as watch:
        pass
    assert watch.found() == {} or watch.found()["cores"] >= 1


def test_memory_decides_whether_all_run_at_once() -> None:
    """Two of a few MB do; two of a petabyte do not; servers that run already take nothing."""
    launch = Launch("s", ())
    small, huge = ({"bytes": size} for size in (10**6, 10**15))
    assert fit_together([Contender("a", launch, model=small), Contender("b", launch, model=small)])
    assert not fit_together(
        [Contender("a", launch, model=small), Contender("b", launch, model=huge)]
    )
    assert fit_together([Contender("a", url="http://localhost", model=huge)])


@pytest.mark.parametrize("together", [True, False])
def test_servers_are_asked_in_turns(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of two scenarios: a b, then b a; the promise comes before anything is measured."""
    monkeypatch.setenv("STAND_IN", json.dumps({}))
    stand_in = SUPPORT / "serving" / "stand_in_server.py"
    plan = BenchPlan((600,), 2, ("repeat", "chat"), 2, 20, 20, 300, cold_checks=False)
    asked: list[str] = []
    with ServerProcess(Launch("stand-in", (str(stand_in),))) as process:
        process.wait_ready()
        measurements = [
            Measurement(
                at_url(f"{name}={process.url}", model=None, fields={}, api_key=None),
                plan,
                None,
                lambda said, tokens, name=name: asked.append(f"{name} {said.split()[0]}"),
            )
            for name in "ab"
        ]
        measure_in_turns(
            measurements,
            Pace(),
            together=together,
            promised=lambda seconds: asked.append("promised"),
            written=lambda: None,
        )
    order = list(dict.fromkeys(asked[: asked.index("a chat") + 40]))
    if together:
        assert order == ["promised", "a repeat", "b repeat", "b chat", "a chat"]
    else:
        assert order == ["promised", "a repeat", "a chat", "b repeat", "b chat"]
    assert all(each.found.status == "measured" for each in measurements)
    assert [len(each.found.requests) for each in measurements] == [22, 22]


def test_flags_are_split_as_a_shell_would() -> None:
    """Quotes keep a value together, and a name may be given twice."""
    given = ["a=--x 'two words'", "a=--y=1", "b="]
    assert flags_of(given) == {"a": ("--x", "two words", "--y=1"), "b": ()}


def test_the_usual_scenarios_are_those_that_servers_differ_in() -> None:
    """Eleven unless chosen otherwise, three more to choose."""
    assert len(USUAL) == 11
    assert set(NAMES) - set(USUAL) == {"sessions", "throughput", "mixed"}
