"""`bench load`: many clients at once, beside mlx_lm.server in one run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace

from rich.console import Console

from .kit.machine import machine, one_line
from .kit.tables import Figure, Spread, show, show_figures, write_json
from .kit.text import tokenizer_of
from .serving.comparison import SHORT
from .serving.crowd import AT_ONCE, SITUATIONS, Failure, Run, Sizes, measure_runs
from .serving.mixture import CLIENTS, ROOM
from .serving.scenarios import Material
from .serving.servers import COMMANDS, OURS, THEIRS, Launch, ServerError, ServerProcess
from .serving.target import Target

SIZES = Sizes(identical=3_000, long=12_000, mixed=1_000, requests=8)
QUICK_SIZES = Sizes(identical=600, long=2_200, mixed=200, requests=2)
WARM_UP = Sizes(identical=300, long=300, mixed=100, requests=1)
REPEATS, QUICK_REPEATS = 5, 1
AT_ONCE_RATIO = 1.3
READ_RATIO = 1.05

IDENTICAL, SHORT_BEHIND_LONG, MIXED = SITUATIONS

ROWS: dict[str, tuple[tuple[str, str, str, float], ...]] = {
    IDENTICAL: (
        ("one alone, s", "alone_seconds", ".2f", 1),
        (f"{AT_ONCE} at once, until the last is done, s", "at_once_seconds", ".2f", 1),
        (f"{AT_ONCE} at once / one alone", "ratio", ".2f", 1),
        ("tokens of one prompt", "prompt_tokens", ".0f", 1),
        (f"cached tokens of all {AT_ONCE}", "cached_tokens", ".0f", 1),
    ),
    SHORT_BEHIND_LONG: (
        ("TTFT alone, ms", "alone_ttft_seconds", ".0f", 1000),
        ("TTFT behind a long prompt, ms", "behind_ttft_seconds", ".0f", 1000),
        ("behind / alone", "ratio", ".2f", 1),
        ("TTFT of the long prompt, s", "long_ttft_seconds", ".2f", 1),
    ),
    MIXED: (
        ("requests per second", "requests_per_second", ".2f", 1),
        ("generated tokens per second", "generated_per_second", ".1f", 1),
        ("TTFT p50, ms", "ttft_p50_seconds", ".0f", 1000),
        ("TTFT p90, ms", "ttft_p90_seconds", ".0f", 1000),
        ("TTFT p99, ms", "ttft_p99_seconds", ".0f", 1000),
        ("prompt tokens", "prompt_tokens", ".0f", 1),
        ("cached tokens", "cached_tokens", ".0f", 1),
    ),
}
"""For each situation: what a row is called, its value, how it is written, and its scale."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench load`."""
    parser.add_argument("--model", help="directory, or owner/name (default: the bundled model)")
    parser.add_argument("--quick", action="store_true", help="small prompts, one run, for a try")
    parser.add_argument("--repeats", type=int, help="runs of each situation (5; with --quick 1)")
    parser.add_argument(
        "--situations",
        nargs="+",
        choices=list(SITUATIONS),
        metavar="NAME",
        help=", ".join(SITUATIONS),
    )
    parser.add_argument(
        "--requests", type=int, help="of each of the mixed clients (8; with --quick 2)"
    )
    parser.add_argument("--only", choices=list(COMMANDS), help="measure this server alone")


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, print, write. 1 when a counted figure misses its target; timings never fail it."""
    sizes = QUICK_SIZES if args.quick else SIZES
    sizes = replace(sizes, requests=args.requests or sizes.requests)
    repeats = args.repeats or (QUICK_REPEATS if args.quick else REPEATS)
    names = args.situations or list(SITUATIONS)
    servers = [args.only] if args.only else [THEIRS, OURS]
    found = machine()
    console.print(one_line(found), highlight=False)
    material = Material(tokenizer_of(args.model), max(sizes.long, ROOM * sizes.mixed))
    with (
        console.status("starting the servers") as status,
        started([Launch.of(name, args.model) for name in servers], material) as targets,
    ):
        runs, failures = measure_runs(
            targets,
            material,
            names=names,
            sizes=sizes,
            repeats=repeats,
            on_run=lambda said: status.update(f"measured {said}"),
        )
    console.print(f"ours: {OURS}, theirs: {THEIRS}. Median (smallest-largest).", highlight=False)
    for name in names:
        _show(console, name, sizes, [each for each in runs if each.situation == name], servers)
    for failure in failures:
        what = "died and was started again" if failure.restarted else "failed"
        console.print(
            f"{failure.server} {what} in {failure.situation}: {failure.sentence}",
            highlight=False,
            markup=False,
        )
    promised = figures(runs, failures)
    show_figures(console, promised)
    write_json(
        args.json,
        {
            "command": "load",
            "machine": found,
            "sizes": asdict(sizes),
            "clients": len(CLIENTS),
            "repeats": repeats,
            "figures": [figure.as_json() for figure in promised],
            "runs": [asdict(each) for each in runs],
            "failures": [asdict(each) for each in failures],
        },
    )
    return int(any(figure.counted and not figure.kept for figure in promised))


@contextmanager
def started(launches: Sequence[Launch], material: Material) -> Iterator[list[Target]]:
    """The servers, loaded at the same time, warm and ready; all stopped at the end."""
    with ExitStack() as stack:
        processes = [stack.enter_context(ServerProcess(launch)) for launch in launches]
        targets = []
        for process in processes:
            process.wait_ready()
            targets.append(Target(process))
            stack.callback(targets[-1].close)
        # The first requests pay for the model, its kernels and new memory.
        _, failures = measure_runs(
            targets, material, names=list(SITUATIONS), sizes=WARM_UP, repeats=1
        )
        for failure in failures:
            raise ServerError(f"{failure.server} failed while warming up: {failure.sentence}")
        yield targets


def figures(runs: Sequence[Run], failures: Sequence[Failure]) -> list[Figure]:
    """The promised ones, as far as ours was measured."""
    failed = sum(failure.server == OURS for failure in failures)
    asked = sum(OURS in each.values for each in runs) + failed
    found = [Figure(f"runs in which {OURS} failed a request", failed, f"of {asked}", 0, True)]
    ours = [
        each.values[OURS] for each in runs if each.situation == IDENTICAL and OURS in each.values
    ]
    if ours:
        most = max(each["read_tokens"] / each["prompt_tokens"] for each in ours)
        title = f"tokens read for {AT_ONCE} identical requests / tokens of one, at most"
        found.append(Figure(title, most, "x", READ_RATIO, True))
        ratio = Spread.of([each["ratio"] for each in ours]).median
        title = f"{AT_ONCE} identical cold requests at once / one alone"
        found.append(Figure(title, ratio, "x", AT_ONCE_RATIO, False))
    return found


def _show(
    console: Console, name: str, sizes: Sizes, runs: Sequence[Run], servers: Sequence[str]
) -> None:
    lines = []
    for title, value, form, scale in ROWS[name]:
        each = [
            [run.values[s][value] for run in runs if value in run.values.get(s, {})]
            for s in servers
        ]
        cells = [Spread.of(values).text(form, scale) if values else "" for values in each]
        if len(servers) > 1:
            ratios = [
                run.values[OURS][value] / run.values[THEIRS][value]
                for run in runs
                if {OURS, THEIRS} <= set(run.values) and run.values[THEIRS][value]
            ]
            cells.append(Spread.of(ratios).text(".2f") if ratios else "")
        lines.append([title, *cells])
    columns = ["", *(SHORT[server] for server in servers)]
    title = {
        IDENTICAL: f"{AT_ONCE} identical cold requests of {sizes.identical:,} tokens",
        SHORT_BEHIND_LONG: f"A short question behind a cold prompt of {sizes.long:,} tokens",
        MIXED: f"{len(CLIENTS)} mixed clients, {sizes.requests} requests each",
    }[name]
    show(console, title, columns + ["ours /\ntheirs"] * (len(servers) > 1), lines)
