"""Which policy replays fewest tokens, on traces, at budgets of bytes: ours beside what others do.

Nothing is computed here: the real store is filled with payloads that only have sizes, so that a trace
of hundreds of long prompts takes a second. Requests come one at a time, and the running one's bytes count.
With --store-kv or --store-state: how many conversations such a store holds beside the full one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from mlx_hybridcache.caches.kinds.smaller import StorePrecision
from mlx_hybridcache.caches.kinds.smaller import smaller as smaller_store
from mlx_hybridcache.cli.flags import add_store_flags
from mlx_hybridcache.errors import SettingError
from mlx_hybridcache.sizes import parse_bytes

from ..kit.machine import machine, one_line
from ..kit.tables import show, show_figures, write_json
from . import smaller
from .outcomes import ONLINE, Outcome, figures, measure
from .sized import SHAPES
from .traces import TracedRequest, read_trace
from .workloads import WORKLOADS, workload

BUDGETS = ("1GB", "2GB", "4GB", "8GB", "16GB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench policies`."""
    parser.add_argument("--trace", type=Path, action="append", metavar="FILE", help="a trace file")
    parser.add_argument("--only", action="append", metavar="NAME", help="this workload alone")
    parser.add_argument(
        "--seed", type=int, action="append", help="of generated traces (3; with --store-kv 3 4 5)"
    )
    parser.add_argument("--shape", choices=SHAPES, action="append", help="(qwen3-next-80b)")
    sizes = f"({' '.join(BUDGETS)}; with --store-kv {' '.join(smaller.BUDGETS)})"
    parser.add_argument("--budget", action="append", metavar="SIZE", help=sizes)
    add_store_flags(parser)
    parser.add_argument("--requests", type=int, help="of each generated trace the first so many")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG")
    parser.set_defaults(model=None)


def run(args: argparse.Namespace, console: Console) -> int:
    """Replay, show, compare with the targets. 1: a target is missed."""
    found = machine()
    console.print(one_line(found))
    storing = smaller_store(args.store_kv, args.store_state)
    return _smaller(args, console, storing) if storing else _policies(args, console)


def _smaller(args: argparse.Namespace, console: Console, storing: StorePrecision) -> int:
    """Instead of the policies: what a smaller store holds beside the full one."""
    budgets = sorted(parse_bytes(size) for size in args.budget or smaller.BUDGETS)
    shape = SHAPES[(args.shape or [next(iter(SHAPES))])[0]]
    found = [
        smaller.measure(name, trace, shape, storing, budget)
        for name, trace in _joined(args)
        for budget in budgets
    ]
    smaller.show_smaller(console, found, storing)
    targets = [each.figure() for each in found]
    show_figures(console, targets)
    result = {
        "command": "policies",
        "machine": machine(),
        "figures": [figure.as_json() for figure in targets],
        "smaller": [each.as_json() for each in found],
    }
    write_json(args.json, result)
    return 0 if all(figure.kept for figure in targets) else 1


def _joined(args: argparse.Namespace) -> list[tuple[str, list[TracedRequest]]]:
    if args.trace:
        return _traces(args)
    return [
        (
            name,
            smaller.joined(
                workload(name, seed, requests=args.requests) for seed in args.seed or (3, 4, 5)
            ),
        )
        for name in args.only or smaller.TRACES
    ]


def _policies(args: argparse.Namespace, console: Console) -> int:
    found = machine()
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
        from .plot import plot_outcomes

        plot_outcomes(args.plot, outcomes)
    return 0 if all(figure.kept for figure in targets) else 1


def _traces(args: argparse.Namespace) -> list[tuple[str, list[TracedRequest]]]:
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
