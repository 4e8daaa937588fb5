"""Which policy replays fewest tokens, on traces, at budgets of bytes: ours beside what others do.

Nothing is computed here: the real store is filled with payloads that only have sizes, so that a trace
of hundreds of long prompts takes a second. Requests come one at a time, and the running one's bytes count.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from mlx_hybridcache.errors import SettingError
from mlx_hybridcache.sizes import parse_bytes

from .baselines import LlamaCpp, MlxLm, Overlaps
from .machine import machine, one_line
from .offline import Clairvoyant, Knows, floor
from .simulate import SHAPES, Shape, Simulation, coarse_cuts, recency
from .tables import Figure, show, show_figures, write_json
from .traces import Asked, read_trace, summary
from .workloads import WORKLOADS, workload

OURS, LRU, GRID, MLX_LM, LLAMA_CPP = "ours", "lru", "grid-8192", "mlx_lm.server", "llama.cpp"
OFFLINE, UNORDERED, PLACES = "clairvoyant", "what, not when", "where, not what"
BASELINES = (LRU, GRID, MLX_LM, LLAMA_CPP)
ONLINE = (OURS, *BASELINES)
BUDGETS = ("1GB", "2GB", "4GB", "8GB", "16GB")
BOUNDED = ("agents", "chats")
TARGET_OFFLINE = 1.25


class Server(Protocol):
    """Something that a trace is replayed through."""

    def serve(self, index: int) -> int:
        """Request `index` of its trace; returns the tokens replayed."""
        ...


Policy = Callable[[Sequence[Asked], Overlaps, Shape, int], Server]

POLICIES: dict[str, Policy] = {
    OURS: lambda trace, _, shape, budget: Simulation(trace, shape, budget),
    LRU: lambda trace, _, shape, budget: Simulation(trace, shape, budget, weigh=recency),
    GRID: lambda trace, _, shape, budget: Simulation(
        trace, shape, budget, weigh=recency, cuts=coarse_cuts
    ),
    MLX_LM: MlxLm,
    LLAMA_CPP: LlamaCpp,
    OFFLINE: Clairvoyant,
    UNORDERED: partial(Clairvoyant, knows=Knows.UNORDERED),
    PLACES: partial(Clairvoyant, knows=Knows.PLACES),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Tokens replayed on one trace: by policy, one number for each budget."""

    trace: str
    shape: str
    budgets: tuple[int, ...]
    prompt_tokens: int
    floor_tokens: int
    replayed: dict[str, tuple[int, ...]]

    def best_baseline(self, at: int) -> tuple[str, int]:
        """The baseline that replays fewest at budget number `at`, and how many."""
        return min(((name, self.replayed[name][at]) for name in BASELINES), key=lambda x: x[1])

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "trace": self.trace,
            "shape": self.shape,
            "budget_bytes": list(self.budgets),
            "prompt_tokens": self.prompt_tokens,
            "floor_tokens": self.floor_tokens,
            "replayed_tokens": {name: list(each) for name, each in self.replayed.items()},
        }


def measure(name: str, trace: Sequence[Asked], shape: Shape, budgets: Sequence[int]) -> Outcome:
    """Replay a trace with every policy at every budget."""
    overlaps = Overlaps(trace)
    replayed = {
        policy: tuple(
            sum(map(make(trace, overlaps, shape, budget).serve, range(len(trace))))
            for budget in budgets
        )
        for policy, make in POLICIES.items()
    }
    tokens = summary(trace)["prompt_tokens"]
    return Outcome(name, shape.name, tuple(budgets), tokens, floor(trace, overlaps), replayed)


def figures(outcomes: Sequence[Outcome]) -> list[Figure]:
    """The promised ones."""
    beaten = [
        (outcome.replayed[OURS][at], outcome.best_baseline(at)[1])
        for outcome in outcomes
        for at in range(len(outcome.budgets))
    ]
    bounded = [
        outcome.replayed[OURS][at] / outcome.replayed[OFFLINE][at]
        for outcome in outcomes
        if outcome.trace.partition("-seed-")[0] in BOUNDED
        for at in range(len(outcome.budgets))
    ]
    found = [
        Figure("places where a baseline replays fewer", sum(a > b for a, b in beaten), "", 0, True),
        Figure(
            "worst place, ours / least recently used",
            max(
                a / b
                for outcome in outcomes
                for a, b in zip(outcome.replayed[OURS], outcome.replayed[LRU], strict=True)
            ),
            "x",
            1.02,
            True,
        ),
    ]
    if bounded:
        found.append(
            Figure("agents and chats, ours / clairvoyant", max(bounded), "x", TARGET_OFFLINE, True)
        )
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench policies`."""
    parser.add_argument("--trace", type=Path, action="append", metavar="FILE", help="a trace file")
    parser.add_argument("--only", action="append", metavar="NAME", help="this workload alone")
    parser.add_argument("--seed", type=int, action="append", help="of generated traces (3)")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="(qwen3-next-80b)")
    parser.add_argument("--budget", action="append", metavar="SIZE", help=f"({' '.join(BUDGETS)})")
    parser.add_argument("--requests", type=int, help="of each generated trace the first so many")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG")
    parser.set_defaults(model=None)


def run(args: argparse.Namespace, console: Console) -> int:
    """Replay, show, compare with the targets. 1: a target is missed."""
    found = machine()
    console.print(one_line(found))
    budgets = sorted(parse_bytes(size) for size in args.budget or BUDGETS)
    outcomes: list[Outcome] = []
    for shape in args.shape or [next(iter(SHAPES))]:
        for name, trace in _traces(args):
            outcomes.append(measure(name, trace, SHAPES[shape], budgets))
            show_outcome(console, outcomes[-1])
    targets = figures(outcomes)
    show_figures(console, targets)
    result = {
        "command": "policies",
        "machine": found,
        "figures": [figure.as_json() for figure in targets],
        "outcomes": [outcome.as_json() for outcome in outcomes],
    }
    write_json(args.json, result)
    if args.plot is not None:
        from .policies_plot import plot_outcomes

        plot_outcomes(args.plot, outcomes)
    return 0 if all(figure.kept for figure in targets) else 1


def _traces(args: argparse.Namespace) -> list[tuple[str, list[Asked]]]:
    if args.trace:
        traces = [(file.stem, read_trace(file)) for file in args.trace]
        for file, (_, trace) in zip(args.trace, traces, strict=True):
            if not trace:
                raise SettingError(f"{file} holds no requests; record some first.")
        return traces
    seeds = args.seed or [3]
    return [
        (
            f"{name}-seed-{seed}" if len(seeds) > 1 else name,
            workload(name, seed, requests=args.requests),
        )
        for seed in seeds
        for name in args.only or WORKLOADS
    ]


def show_outcome(console: Console, outcome: Outcome) -> None:
    """One table: thousands of tokens replayed, the best of each column marked."""
    rows = []
    for name, counts in outcome.replayed.items():
        marks = [
            ""
            if name not in ONLINE or count > min(outcome.replayed[each][at] for each in ONLINE)
            else "*"
            for at, count in enumerate(counts)
        ]
        rows.append(
            (
                name,
                *(f"{mark}{count / 1e3:,.0f}" for mark, count in zip(marks, counts, strict=True)),
            )
        )
    show(
        console,
        f"{outcome.trace}, {outcome.shape}: thousands of tokens replayed, of {outcome.prompt_tokens / 1e3:,.0f} asked; "
        f"{outcome.floor_tokens / 1e3:,.0f} with unbounded memory",
        ("policy", *(f"{budget / 1e9:g} GB" for budget in outcome.budgets)),
        rows,
    )
