"""What two servers did with the same requests: medians, spreads, and the figures that were promised."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ..kit.tables import Figure, Spread, show
from .client import Reply
from .rounds import Asked
from .scenarios import AGAIN, CHANGES, COLD, SHORTER_TEXT
from .servers import OURS, THEIRS

SHORT = {OURS: "ours", THEIRS: "theirs"}
COLD_RATIO, HOT_RATIO, SPEEDUP = 1.05, 1.2, 8

PROMISED: tuple[tuple[str, str, tuple[str, ...], float], ...] = (
    ("repeat", "cold", (COLD,), COLD_RATIO),
    ("repeat", "exact repeat", (AGAIN,), HOT_RATIO),
    ("changed-ending", "changed ending", CHANGES, 1 / SPEEDUP),
    ("completions", "shorter completion", (SHORTER_TEXT,), 1 / SPEEDUP),
)
"""Scenario, name in the table, steps that count, and the most that TTFT may be of theirs."""


@dataclass(frozen=True, slots=True)
class Row:
    """The runs of one step of a scenario."""

    scenario: str
    size: int
    step: str
    asked: tuple[Asked, ...]

    def spread(self, server: str, value: Callable[[Reply], float | None]) -> Spread | None:
        """Of `value` over this server's replies; None when there are none."""
        replies = (each.replies.get(server) for each in self.asked)
        values = [value(reply) for reply in replies if isinstance(reply, Reply)]
        known = [each for each in values if each is not None]
        return Spread.of(known) if known else None

    def ratio(self) -> Spread | None:
        """TTFT of ours over theirs, pair by pair; None when no pair was answered."""
        ratios = [ours.first_seconds / theirs.first_seconds for ours, theirs in pairs(self.asked)]
        return Spread.of(ratios) if ratios else None

    def cpu_ratio(self) -> float | None:
        """The same of the processor time that the servers spent; None where no clock tells it."""
        ratios = [
            ours.first_cpu_seconds / theirs.first_cpu_seconds
            for ours, theirs in pairs(self.asked)
            if ours.first_cpu_seconds is not None and theirs.first_cpu_seconds
        ]
        return statistics.median(ratios) if ratios else None

    def failures(self, server: str) -> int:
        """Requests of this step that `server` did not answer."""
        return sum(isinstance(each.replies.get(server), str) for each in self.asked)

    def as_json(self, servers: Sequence[str]) -> dict[str, Any]:
        """Plain values; every single measurement in seconds and tokens, null where it failed."""
        ratio = self.ratio()
        return {
            "scenario": self.scenario,
            "size": self.size,
            "step": self.step,
            "ratio": ratio and ratio.as_json(),
            "cpu_ratio": self.cpu_ratio(),
            "servers": {
                name: [
                    {
                        "ttft_seconds": reply.first_seconds,
                        "ttft_cpu_seconds": reply.first_cpu_seconds,
                        "last_seconds": reply.last_seconds,
                        "prompt_tokens": reply.prompt_tokens,
                        "cached_tokens": reply.cached_tokens,
                        "completion_tokens": reply.completion_tokens,
                    }
                    if isinstance(reply := each.replies[name], Reply)
                    else None
                    for each in self.asked
                ]
                for name in servers
            },
        }


def rows(asked: Sequence[Asked]) -> list[Row]:
    """The requests by scenario, size and step, in the order in which they were first made."""
    grouped: dict[tuple[str, int, str], list[Asked]] = {}
    for each in asked:
        grouped.setdefault((each.scenario, each.size, each.step), []).append(each)
    return [Row(*key, tuple(group)) for key, group in grouped.items()]


def pairs(asked: Sequence[Asked]) -> list[tuple[Reply, Reply]]:
    """(ours, theirs) of every request that both answered."""
    found = [(each.replies.get(OURS), each.replies.get(THEIRS)) for each in asked]
    return [(a, b) for a, b in found if isinstance(a, Reply) and isinstance(b, Reply)]


def different_replies(asked: Sequence[Asked]) -> list[str]:
    """The requests to which the servers, which decode greedily, replied differently."""
    return [
        f"{each.scenario}, {each.size:,} tokens, {each.step}"
        for each in asked
        if any(not ours.same_as(theirs) for ours, theirs in pairs([each]))
    ]


def figures(asked: Sequence[Asked]) -> list[Figure]:
    """The promised ones, as far as both servers were asked for them."""
    failed = sum(isinstance(each.replies.get(OURS), str) for each in asked)
    found = [Figure(f"requests that {OURS} failed", failed, f"of {len(asked)}", 0, True)]
    both = pairs(asked)
    if not both:
        return found
    # Counted by what had to be read: should replies and so histories drift apart, it still compares.
    read = [(ours.read_tokens, theirs.read_tokens) for ours, theirs in both]
    worse = sum(a > b for a, b in read if a is not None and b is not None)
    found.append(Figure("requests with fewer cached tokens", worse, f"of {len(both)}", 0, True))
    for scenario, name, steps, target in PROMISED:
        for size in sorted({each.size for each in asked if each.scenario == scenario}):
            chosen = [
                each
                for each in asked
                if (each.scenario, each.size) == (scenario, size) and each.step in steps
            ]
            ratio = Row(scenario, size, name, tuple(chosen)).ratio()
            if ratio is not None:
                title = f"TTFT, {name}, {size:,} tokens, ours / theirs"
                found.append(Figure(title, ratio.median, "x", target, False))
    return found


def show_rows(console: Console, found: Sequence[Row], servers: Sequence[str]) -> None:
    """A table for each scenario and size: cached tokens and TTFT of each server, side by side."""
    for scenario, size in dict.fromkeys((row.scenario, row.size) for row in found):
        chosen = [row for row in found if (row.scenario, row.size) == (scenario, size)]
        columns = ["request", "prompt"]
        columns += [f"cached\n{SHORT[name]}" for name in servers]
        columns += [f"TTFT ms\n{SHORT[name]}" for name in servers]
        show(
            console,
            f"{scenario}, {size:,} tokens",
            columns + (["ours /\ntheirs", "cpu"] if len(servers) > 1 else []),
            [_cells(row, servers) for row in chosen],
        )


def _cells(row: Row, servers: Sequence[str]) -> list[str]:
    prompt = next(
        (s for name in servers if (s := row.spread(name, lambda reply: reply.prompt_tokens))), None
    )
    cached = [row.spread(name, lambda reply: reply.cached_tokens) for name in servers]
    first = [row.spread(name, lambda reply: reply.first_seconds) for name in servers]
    cells = [row.step, prompt.text() if prompt else ""]
    cells += [each.text() if each else "" for each in cached]
    cells += [
        (each.text(scale=1000) if each else "")
        + (f" {row.failures(name)} failed" if row.failures(name) else "")
        for name, each in zip(servers, first, strict=True)
    ]
    if len(servers) > 1:
        ratio, cpu = row.ratio(), row.cpu_ratio()
        cells += [ratio.text(".2f") if ratio else "", f"{cpu:.2f}" if cpu else ""]
    return cells


def show_throughput(console: Console, found: Sequence[Row], servers: Sequence[str]) -> None:
    """Tokens per second: prompts read cold, and tokens generated after the first."""
    lines: list[list[str]] = []
    for row in found:
        if row.step != COLD:
            continue
        read = [row.spread(name, lambda r: r.prompt_per_second) for name in servers]
        lines.append(
            [
                f"read cold, {row.scenario}, {row.size:,} tokens",
                *(each.text() if each else "" for each in read),
            ]
        )
        if row.scenario == "throughput":
            made = [row.spread(name, lambda reply: reply.generated_per_second) for name in servers]
            lines.append(
                ["generated after it", *(each.text() if each else "too few" for each in made)]
            )
    if lines:
        show(console, "Tokens per second", ("", *servers), lines)
