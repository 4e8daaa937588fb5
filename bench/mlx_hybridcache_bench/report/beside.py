"""Our server beside mlx_lm.server, request by request: what was promised, and ratios of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..kit.tables import Figure, Spread, size_text
from ..serving.client import Reply
from ..serving.crowd import AT_ONCE, IDENTICAL
from ..serving.scenarios import AGAIN, CHANGES, COLD, SHORTER_TEXT
from ..serving.servers import OURS, THEIRS
from .results import Measured, Request, Results
from .sheet import Sheet

COLD_RATIO, HOT_RATIO, SPEEDUP = 1.05, 1.2, 8
READ_RATIO, AT_ONCE_RATIO = 1.05, 1.3
LEAST_GENERATED = 16
"""Tokens of a reply that is long enough for a rate."""

PROMISED: tuple[tuple[str, str, tuple[str, ...], float], ...] = (
    ("repeat", "cold", (COLD,), COLD_RATIO),
    ("repeat", "exact repeat", (AGAIN,), HOT_RATIO),
    ("changed-ending", "changed ending", CHANGES, 1 / SPEEDUP),
    ("completions", "shorter completion", (SHORTER_TEXT,), 1 / SPEEDUP),
)
"""Scenario, name in the table, steps that count, and the most that TTFT may be of theirs."""

Pair = tuple[Request, Request]


def matched(mine: Measured, theirs: Measured) -> list[tuple[int, int]]:
    """Numbers of the requests that both were sent: one scenario, size, step and run, in their order."""
    places: dict[tuple[str, int, str, int], list[int]] = {}
    for at, each in enumerate(theirs.requests):
        places.setdefault((each.scenario, each.size, each.step, each.run), []).append(at)
    found = []
    for at, each in enumerate(mine.requests):
        left = places.get((each.scenario, each.size, each.step, each.run))
        if left:
            found.append((at, left.pop(0)))
    return found


def pairs(results: Results) -> list[Pair]:
    """(ours, theirs) of every request that both answered; none where one was not measured."""
    mine, theirs = _server(results, OURS), _server(results, THEIRS)
    if mine is None or theirs is None:
        return []
    both = [(mine.requests[a], theirs.requests[b]) for a, b in matched(mine, theirs)]
    return [pair for pair in both if all(each.error is None for each in pair)]


def different_replies(
    mine: Measured,
    theirs: Measured,
    replies: tuple[Sequence[Reply | str], Sequence[Reply | str]],
) -> tuple[int, list[str]]:
    """How many replies were compared, and the requests to which the servers, which decode greedily,
    replied differently. `replies` are those to the requests of each, in their order.
    """
    compared, different = 0, []
    for a, b in matched(mine, theirs):
        ours, others = replies[0][a], replies[1][b]
        if isinstance(ours, Reply) and isinstance(others, Reply):
            compared += 1
            if not ours.same_as(others):
                asked = mine.requests[a]
                different.append(f"{asked.scenario}, {asked.size:,} tokens, {asked.step}")
    return compared, different


def figures(results: Results) -> list[Figure]:
    """The promised ones, as far as they were measured."""
    mine = _server(results, OURS)
    if mine is None:
        return []
    failed = sum(each.error is not None for each in mine.requests)
    failed += sum(not each.step for each in mine.troubles)  # situations have none
    asked = f"of {len(mine.requests) + len(mine.situations)}"
    found = [Figure(f"requests that {OURS} failed", failed, asked, 0, True)]
    both = pairs(results)
    # Counted by what had to be read: should replies and so histories drift apart, it still compares.
    read = [(a.read_tokens, b.read_tokens) for a, b in both]
    known = [(a, b) for a, b in read if a is not None and b is not None]
    if known:
        worse, total = sum(a > b for a, b in known), f"of {len(known)}"
        found.append(
            Figure(f"requests with fewer cached tokens than {THEIRS}", worse, total, 0, True)
        )
    return [*found, *_timed(both), *_at_once(mine, results.settings.get("clients", AT_ONCE))]


def _timed(both: Sequence[Pair]) -> list[Figure]:
    found = []
    for scenario, name, steps, target in PROMISED:
        chosen = [pair for pair in both if pair[0].scenario == scenario and pair[0].step in steps]
        for size in sorted({ours.size for ours, _ in chosen}):
            ratio = _ratio([pair for pair in chosen if pair[0].size == size], _first)
            if ratio is not None:
                title = f"TTFT, {name}, {size:,} tokens, ours / theirs"
                found.append(Figure(title, ratio.median, "x", target, False))
    return found


def _at_once(mine: Measured, clients: int) -> list[Figure]:
    runs = [each.values for each in mine.situations if each.situation == IDENTICAL]
    found = []
    read = [
        # Whoever finds all of it must still read the last token.
        (each["read_tokens"] - (clients - 1)) / each["prompt_tokens"]
        for each in runs
        if {"read_tokens", "prompt_tokens"} <= set(each)
    ]
    if read:
        title = f"tokens read for {clients} identical requests / tokens of one, at most"
        found.append(Figure(title, max(read), "x", READ_RATIO, True))
    if runs:
        ratio = Spread.of([each["ratio"] for each in runs]).median
        title = f"{clients} identical cold requests at once / one alone"
        found.append(Figure(title, ratio, "x", AT_ONCE_RATIO, False))
    return found


def beside_sheet(results: Results) -> Sheet:
    """Ratios of the pairs: the clock's, and those of the processor time that the servers spent."""
    grouped: dict[tuple[str, int, str], list[Pair]] = {}
    for pair in pairs(results):
        each = pair[0]
        grouped.setdefault((each.scenario, each.size, each.step), []).append(pair)
    rows = []
    for (scenario, size, step), found in grouped.items():
        wall, cpu = _ratio(found, _first), _ratio(found, lambda each: each.ttft_cpu_seconds)
        texts = (each.text(".2f") if each else "" for each in (wall, cpu))
        rows.append((f"{scenario}, {size_text(size)}: {step}", *texts))
    columns = ("request", "TTFT, ours / theirs", "processor time, ours / theirs")
    caption = "Pair by pair: median (smallest-largest)."
    return Sheet(f"{OURS} beside {THEIRS}", columns, tuple(rows), caption)


def throughput_sheet(results: Results) -> Sheet:
    """Tokens per second of the scenario that is for it: read cold, and generated after the first."""
    rows = []
    for title, rate in (("read cold", _read_rate), ("generated after it", _generated_rate)):
        cells = []
        for server in results.servers:
            asked = (each for each in server.requests if each.scenario == "throughput")
            rates = [found for each in asked if (found := rate(each)) is not None]
            cells.append(Spread.of(rates).text() if rates else "")
        if any(cells):
            rows.append((title, *cells))
    return Sheet("Tokens per second", ("", *(each.name for each in results.servers)), tuple(rows))


def _read_rate(asked: Request) -> float | None:
    return (
        asked.prompt_tokens / asked.ttft_seconds
        if asked.prompt_tokens and asked.ttft_seconds
        else None
    )


def _generated_rate(asked: Request) -> float | None:
    """None when the reply is too short to tell."""
    if asked.ttft_seconds is None or asked.total_seconds is None:
        return None
    seconds = asked.total_seconds - asked.ttft_seconds
    if (asked.completion_tokens or 0) < LEAST_GENERATED or seconds <= 0:
        return None
    return ((asked.completion_tokens or 0) - 1) / seconds


def _first(asked: Request) -> float | None:
    return asked.ttft_seconds


def _ratio(both: Sequence[Pair], value: Callable[[Request], float | None]) -> Spread | None:
    """Of ours over theirs, pair by pair; None where no pair has both."""
    values = [(value(ours), value(theirs)) for ours, theirs in both]
    ratios = [a / b for a, b in values if a is not None and b]
    return Spread.of(ratios) if ratios else None


def _server(results: Results, name: str) -> Measured | None:
    return next((each for each in results.servers if each.name == name and each.requests), None)
