"""The figures of a run as sheets of text, for the terminal, the report and Markdown alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from mlx_hybridcache.sizes import format_bytes

from ..kit.tables import Spread, size_text
from ..serving.crowd import IDENTICAL, MIXED, SHORT_BEHIND_LONG
from ..serving.scenarios import AFTER_RESTART, AGAIN, COLD, RESTART, SCENARIOS, steps_of
from ..serving.servers import OURS, THEIRS
from ..serving.watch import sentence
from .beside import beside_sheet, throughput_sheet
from .results import Equality, Measured, Results
from .sheet import Sheet, results_of, seconds_text, sizes_in, ttft

REPEAT = "repeat"

UNDECIDED, NOTHING = "undecided", "none"
"""Speedups that would contradict a count."""

LITTLE, MUCH, ALIKE = 0.05, 0.5, 1.25
"""Shares of a prompt that are next to nothing and most of it; times faster that may be chance."""


def sheets(results: Results) -> list[Sheet]:
    """All of them, in the order in which they are read; those without rows are left out."""
    found = [
        *(_length_sheet(each) for each in results.servers),
        _scenario_sheet(results),
        beside_sheet(results),
        throughput_sheet(results),
        _crowd_sheet(results),
        _memory_sheet(results),
        _equality_sheet(results),
    ]
    return [sheet for sheet in found if sheet.rows]


def servers_sheet(results: Results) -> Sheet:
    """Who was measured, and how each was started."""
    return Sheet(
        "Servers",
        ("server", "outcome", "version", "model", "quantization", "weights", "flags"),
        tuple(
            (
                each.name,
                each.status,
                each.version,
                str(each.model.get("name", "")),
                str(each.model.get("quantization", "")),
                format_bytes(weights) if (weights := each.model.get("bytes")) else "",
                " ".join(each.flags),
            )
            for each in results.servers
        ),
    )


def _length_sheet(server: Measured) -> Sheet:
    """The table of mlx-lm issue 1162 for one server."""
    rows = []
    for size in sizes_in(results_of(server, REPEAT)):
        cold, hot = (
            server.spread(ttft, scenario=REPEAT, size=size, steps=frozenset({step}))
            for step in (COLD, AGAIN)
        )
        if cold is None:
            continue
        speedup = _speedup(server, size, cold, hot) if hot else ""
        rows.append(
            (
                size_text(size),
                seconds_text(cold),
                seconds_text(hot),
                speedup,
                _cached_text(server, REPEAT, size, frozenset({AGAIN})),
            )
        )
    columns = ("Input size", "Cold (1st call)", "Hot (exact repeat)", "Speedup", "Cached / prompt")
    caption = ""
    if any(UNDECIDED in row or NOTHING in row for row in rows):
        caption = (
            f"A speedup is “{UNDECIDED}” where the times say the opposite of what was counted, and "
            f"“{NOTHING}” where nothing was restored: other work kept the machine busy."
        )
    return Sheet(f"{server.name}: the same prompt again", columns, tuple(rows), caption)


def _speedup(server: Measured, size: int, cold: Spread, hot: Spread) -> str:
    """Cold over hot, unless what was restored says that it cannot be that."""
    again = partial(server.spread, scenario=REPEAT, size=size, steps=frozenset({AGAIN}))
    restored, prompt = again(lambda r: r.cached_tokens), again(lambda r: r.prompt_tokens)
    ratio = cold.median / hot.median
    if restored and prompt and prompt.median:
        share = restored.median / prompt.median
        if share < LITTLE and ratio > ALIKE:
            return NOTHING
        if share > MUCH and ratio < 1:
            return UNDECIDED
    return f"{ratio:.1f}x"


def _scenario_sheet(results: Results) -> Sheet:
    rows = []
    for scenario, size, step in _steps(results):
        cells = [f"{scenario}, {size_text(size)}: {step}"]
        for server in results.servers:
            one = frozenset({step})
            spread = server.spread(ttft, scenario=scenario, size=size, steps=one)
            text = " · ".join(
                each
                for each in (seconds_text(spread), _cached_text(server, scenario, size, one))
                if each
            )
            failed = _failures(server, scenario, size, step)
            cells.append(text + (f" {failed} failed" if failed else ""))
        rows.append(tuple(cells))
    columns = ("request", *(f"{server.name}\nTTFT · cached / prompt" for server in results.servers))
    caption = "Median (smallest-largest). Steps of one name are counted together."
    return Sheet("Scenarios", columns, tuple(rows), caption)


def _crowd_sheet(results: Results) -> Sheet:
    clients = results.settings.get("clients", "")
    lines: list[tuple[str, str, str, Callable[[Spread], str]]] = [
        ("one cold prompt alone", IDENTICAL, "alone_seconds", seconds_text),
        (f"{clients} clients send one at once", IDENTICAL, "at_once_seconds", seconds_text),
        ("at once / alone", IDENTICAL, "ratio", lambda spread: spread.text(".2f")),
        ("tokens cached of all theirs", IDENTICAL, "cached_tokens", lambda spread: spread.text()),
        ("a short question alone", SHORT_BEHIND_LONG, "alone_ttft_seconds", seconds_text),
        ("behind a long prompt", SHORT_BEHIND_LONG, "behind_ttft_seconds", seconds_text),
        ("behind / alone", SHORT_BEHIND_LONG, "ratio", lambda spread: spread.text(".2f")),
        ("mixed clients, requests per second", MIXED, "requests_per_second", _rate_text),
        ("generated tokens per second", MIXED, "generated_per_second", _rate_text),
        ("TTFT, 50th percentile", MIXED, "ttft_p50_seconds", seconds_text),
        ("TTFT, 90th percentile", MIXED, "ttft_p90_seconds", seconds_text),
        ("TTFT, 99th percentile", MIXED, "ttft_p99_seconds", seconds_text),
        ("cached tokens", MIXED, "cached_tokens", lambda spread: spread.text()),
        ("a new start, until it answers", RESTART, "ready_seconds", seconds_text),
    ]
    rows = []
    for title, situation, value, text in lines:
        spreads = [server.situation(situation, value) for server in results.servers]
        if any(spreads):
            rows.append((title, *(text(each) if each else "" for each in spreads)))
    columns = ("", *(server.name for server in results.servers))
    return Sheet("Several clients, and a new start", columns, tuple(rows))


def _rate_text(spread: Spread) -> str:
    return spread.text(".2f")


def _memory_sheet(results: Results) -> Sheet:
    in_turns = shares_memory(results)
    rows = tuple(
        (
            each.name,
            *map(format_bytes, (memory.warm_bytes, memory.peak_bytes)),
            *([] if in_turns else [format_bytes(memory.system_bytes)]),
        )
        for each in results.servers
        if (memory := each.memory)
    )
    caption = "Resident bytes do not count all that Metal holds for a process" + (
        "." if in_turns else "; what the system lost counts whatever else ran."
    )
    columns = ("server", "resident when warm", "resident at its peak", "lost by the system")
    return Sheet("Memory", columns[: 3 if in_turns else 4], rows, caption)


def shares_memory(results: Results) -> bool:
    """Whether servers ran beside each other, so that no one of them took what the system lost."""
    return (
        bool(results.settings.get("in_turns")) and sum(bool(e.memory) for e in results.servers) > 1
    )


def _equality_sheet(results: Results) -> Sheet:
    rows = []
    for server in results.servers:
        grouped: dict[str, list[Equality]] = {}
        for each in server.equalities:
            grouped.setdefault(each.against, []).append(each)
        for against, found in grouped.items():
            different = [
                f"{e.scenario}, {size_text(e.size)}: {e.step}" for e in found if not e.same
            ]
            equal = f"{len(found) - len(different)} of {len(found)}"
            rows.append((server.name, against, equal, "; ".join(dict.fromkeys(different))))
    columns = ("server", "held against", "equal", "different in")
    caption = "Replies through the cache, word for word."
    return Sheet("Hot replies and cold ones", columns, tuple(rows), caption)


def notes(results: Results) -> Iterator[str]:
    """What was odd, missing or failed: a sentence each; of a server with its name in front."""
    if results.load:
        yield sentence(results.load)
    if left_out := results.settings.get("runs_left_out"):
        yield f"The machine became slower than at the warm-up: {left_out} of the runs were left out."
    if results.replies:
        different = results.replies["different"]
        where = f" ({'; '.join(dict.fromkeys(different))})" if different else ""
        compared = f"{len(different)} of {results.replies['compared']}"
        yield f"Replies in which {OURS} and {THEIRS} differ: {compared}{where}."
    for server in results.servers:
        if server.reason:
            how = {"missing": "not measured", "failed": "not measured"}.get(server.status)
            yield f"{server.name}: {how or 'measured in part'}: {server.reason}"
        for note in server.notes:
            yield f"{server.name} {note}."
        for each in server.troubles:
            what = "had to be started again after" if each.restarted else "failed in"
            where = f"{each.scenario}, {each.step}" if each.step else each.scenario
            yield f"{server.name} {what} {where}: {each.sentence}"


def hot_steps(scenario: str) -> frozenset[str]:
    """Steps that a cache can answer: all but the first, which nobody has sent before."""
    if scenario not in SCENARIOS:
        return frozenset({AFTER_RESTART})
    first, *others = steps_of(scenario)
    return frozenset(others) - {first}


def _cached_text(server: Measured, scenario: str, size: int, steps: frozenset[str]) -> str:
    """Medians of cached and prompt tokens; `?` for what the server does not tell."""
    cached = server.spread(lambda r: r.cached_tokens, scenario=scenario, size=size, steps=steps)
    prompt = server.spread(lambda r: r.prompt_tokens, scenario=scenario, size=size, steps=steps)
    if server.spread(ttft, scenario=scenario, size=size, steps=steps) is None:
        return ""
    return " / ".join(f"{each.median:,.0f}" if each else "?" for each in (cached, prompt))


def _steps(results: Results) -> list[tuple[str, int, str]]:
    """Scenario, size and step of what was asked, without what has a table of its own."""
    found: dict[tuple[str, int, str], None] = {}
    for server in results.servers:
        for each in server.requests:
            if each.scenario != REPEAT:
                found[each.scenario, each.size, each.step] = None
    return list(found)


def _failures(server: Measured, scenario: str, size: int, step: str) -> int:
    key = (scenario, size, step)
    return sum(
        bool(each.error) and (each.scenario, each.size, each.step) == key
        for each in server.requests
    )
