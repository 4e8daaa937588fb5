"""Our server beside mlx_lm.server: what `bench ttft` counts and promises. No server is needed for that."""

from dataclasses import replace
from typing import Any

from mlx_hybridcache_bench.kit.machine import machine
from mlx_hybridcache_bench.report.beside import (
    beside_sheet,
    different_replies,
    figures,
    throughput_sheet,
)
from mlx_hybridcache_bench.report.results import Measured, Request, Results, Situation
from mlx_hybridcache_bench.serving.client import Reply
from mlx_hybridcache_bench.serving.servers import OURS, THEIRS
from mlx_hybridcache_bench.serving.side import Trouble

Asked = tuple[str, str, Reply | str, Reply | str]


def answer(ttft: float = 1.0, prompt: int = 100, cached: int = 0, content: str = "") -> Reply:
    return Reply(ttft, ttft + 1, prompt, cached, 8, "stop", content)


def asked(step: str, ours: Reply | str, theirs: Reply | str, scenario: str = "repeat") -> Asked:
    return scenario, step, ours, theirs


def results(run: list[Asked], *situations: Situation, clients: int = 4) -> Results:
    """Of both servers, each asked the same in its order."""
    servers = [
        Measured(
            name,
            "process",
            requests=[
                Request.of(scenario, 600, step, 0, both[at]) for scenario, step, *both in run
            ],
        )
        for at, name in enumerate((OURS, THEIRS))
    ]
    servers[0].situations += situations
    return Results("2026-11-25", machine(), {"clients": clients}, servers)


def test_fewer_cached_tokens_and_failures_of_ours_are_counted() -> None:
    """One request of three reads more than theirs; one is not answered by ours."""
    run = [
        asked("again", answer(cached=99), answer(cached=99)),
        asked("again", answer(cached=98), answer(cached=99)),
        asked("again", "status 500", answer(cached=99)),
        asked("again", answer(), "it died"),
    ]
    counted = {figure.name: figure for figure in figures(results(run)) if figure.counted}
    assert counted[f"requests with fewer cached tokens than {THEIRS}"].value == 1
    assert counted[f"requests that {OURS} failed"].value == 1
    assert not any(figure.kept for figure in counted.values())


def test_nothing_is_promised_of_others() -> None:
    """Without ours there are no figures; without theirs nothing is compared."""
    both = results([asked("again", answer(), answer())])
    assert figures(replace(both, servers=both.servers[1:])) == []
    (alone,) = figures(replace(both, servers=both.servers[:1]))
    assert alone.name == f"requests that {OURS} failed"


def test_a_ratio_is_the_median_of_the_pairs() -> None:
    """2, 3 and 10 times: 3. A pair without both replies has no ratio, and no clock no processor time."""
    run = [asked("again", answer(slow), answer()) for slow in (2.0, 3.0, 10.0)]
    (row,) = beside_sheet(results([*run, asked("again", answer(), "it died")])).rows
    assert row == ("repeat, 600: again", "3.00 (2.00-10.00)", "")
    timed = [replace(answer(), first_cpu_seconds=each) for each in (0.5, 1.0)]
    (row,) = beside_sheet(results([asked("again", timed[0], timed[1])])).rows
    assert row[2] == "0.50"


def test_promised_times_stand_beside_their_targets() -> None:
    """An eighth of theirs for a changed ending and shorter raw text, 1.2 and 1.05 otherwise."""
    fast, slow = answer(0.1), answer(1.0)
    run = [
        asked("cold", slow, slow),
        asked("again", slow, slow),
        asked("ending changed", fast, slow, "changed-ending"),
        asked("500 shorter", fast, slow, "completions"),
    ]
    timed = {f.name: (f.value, f.target) for f in figures(results(run)) if not f.counted}
    assert timed == {
        "TTFT, cold, 600 tokens, ours / theirs": (1.0, 1.05),
        "TTFT, exact repeat, 600 tokens, ours / theirs": (1.0, 1.2),
        "TTFT, changed ending, 600 tokens, ours / theirs": (0.1, 0.125),
        "TTFT, shorter completion, 600 tokens, ours / theirs": (0.1, 0.125),
    }


def identical(read: float, ratio: float) -> Situation:
    values = {"prompt_tokens": 100.0, "read_tokens": read, "ratio": ratio}
    return Situation("identical", 600, 0, values)


def test_reading_a_prompt_twice_misses_the_target() -> None:
    """The worst run counts: 203 tokens read for four prompts of 100. Of the times, the median."""
    runs = [identical(103, 1.1), identical(203, 1.2), identical(103, 2)]
    found = figures(results([asked("again", answer(), answer())], *runs))[-2:]
    assert [(figure.value, figure.kept) for figure in found] == [(2, False), (1.2, True)]


def test_a_situation_that_ours_fails_misses_the_target() -> None:
    """It has no step; what the other server does is not promised."""
    found = results([asked("again", answer(), answer())])
    found.servers[1].troubles.append(Trouble("identical", "", "500", False))
    assert figures(found)[0].kept
    found.servers[0].troubles.append(Trouble("identical", "", "500", False))
    assert (figures(found)[0].value, figures(found)[0].kept) == (1, False)


def differing(*run: Asked) -> tuple[int, list[str]]:
    """What `different_replies` finds in a run."""
    mine, theirs = results(list(run)).servers
    replies: Any = ([each[2] for each in run], [each[3] for each in run])
    return different_replies(mine, theirs, replies)


def test_replies_that_differ_are_named() -> None:
    """White space at the ends is how a server cuts its stream, not what it says."""
    same = asked("cold", answer(content="\n\nYes"), answer(content="Yes"))
    other = asked("again", answer(content="No"), answer(content="Yes"))
    assert differing(same) == (1, [])
    assert differing(same, other) == (2, ["repeat, 600 tokens, again"])
    assert differing(asked("cold", "it died", answer())) == (0, [])


def test_tokens_per_second_are_those_of_the_scenario_for_it() -> None:
    """100 tokens in 2 s; 20 tokens in the second after the first one; too few tell nothing."""
    reply = replace(answer(2.0), completion_tokens=20)
    run = [asked("cold", reply, answer(1.0), "throughput"), asked("cold", answer(), answer())]
    assert throughput_sheet(results(run)).rows == (
        ("read cold", "50", "100"),
        ("generated after it", "19", ""),
    )
