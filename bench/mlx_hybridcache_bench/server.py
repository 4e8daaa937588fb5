"""`bench server`: TTFT cold and hot, cached tokens and throughput beside mlx_lm.server in one run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from mlx_hybridcache import PromptError

from .kit.machine import machine, one_line
from .kit.tables import show_figures, write_json
from .kit.text import tokenizer_of
from .serving.comparison import different_replies, figures, pairs, rows, show_rows, show_throughput
from .serving.rounds import Asked, Death, measure_rounds, started
from .serving.scenarios import LONGER, SCENARIOS, Material
from .serving.servers import COMMANDS, OURS, THEIRS, Launch

SIZES, QUICK_SIZES = (3_000, 12_000), (1_050,)
REPEATS, QUICK_REPEATS = 5, 1
QUICK_WARM_UP = 400
SPARE_TOKENS = 4_000
"""Text beyond the largest prompt, so that conversations can start at different places."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench server`."""
    parser.add_argument("--model", help="directory, or owner/name (default: the bundled model)")
    parser.add_argument("--quick", action="store_true", help="small prompts, one run, for a try")
    parser.add_argument("--repeats", type=int, help="runs of each scenario (5; with --quick 1)")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="prompt lengths; the first serves all scenarios (3000 12000; with --quick 1050)",
    )
    parser.add_argument(
        "--scenarios", nargs="+", choices=list(SCENARIOS), metavar="NAME", help=", ".join(SCENARIOS)
    )
    parser.add_argument("--only", choices=list(COMMANDS), help="measure this server alone")


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, print, write. 1 when a counted figure misses its target; timings never fail it."""
    sizes = args.sizes or (QUICK_SIZES if args.quick else SIZES)
    repeats = args.repeats or (QUICK_REPEATS if args.quick else REPEATS)
    names = args.scenarios or list(SCENARIOS)
    servers = [args.only] if args.only else [THEIRS, OURS]
    if min(sizes) <= LONGER:
        raise PromptError(f"A size must exceed {LONGER} tokens, by which raw text is shortened.")
    found = machine()
    console.print(one_line(found), highlight=False)
    material = Material(tokenizer_of(args.model), max(sizes) + SPARE_TOKENS)
    launches = [Launch.of(name, args.model) for name in servers]
    warm_up = QUICK_WARM_UP if args.quick else sizes[0]
    with (
        console.status("starting the servers") as status,
        started(launches, material, warm_up) as sides,
    ):
        asked = measure_rounds(
            sides,
            material,
            names=names,
            sizes=sizes,
            repeats=repeats,
            on_step=lambda each: status.update(
                f"measured {each.scenario} {each.size:,}: {each.step} ({each.run + 1} of {repeats})"
            ),
        )
        deaths = [death for side in sides for death in side.deaths]
    by_step, promised = rows(asked), figures(asked)
    console.print(
        f"ours: {OURS}, theirs: {THEIRS}. TTFT and ratios: median (smallest-largest).\n"
        "cpu: the median ratio of the servers' processor time until the first token.",
        highlight=False,
    )
    show_rows(console, by_step, servers)
    show_throughput(console, by_step, servers)
    _show_notes(console, asked, deaths)
    show_figures(console, promised)
    write_json(
        args.json,
        {
            "command": "server",
            "machine": found,
            "sizes": list(sizes),
            "repeats": repeats,
            "figures": [figure.as_json() for figure in promised],
            "rows": [row.as_json(servers) for row in by_step],
            "compared_replies": len(pairs(asked)),
            "different_replies": different_replies(asked),
            "deaths": [
                {
                    "server": death.server,
                    "scenario": death.scenario,
                    "step": death.step,
                    "sentence": death.sentence,
                    "restarted": death.restarted,
                }
                for death in deaths
            ],
        },
    )
    return int(any(figure.counted and not figure.kept for figure in promised))


def _show_notes(console: Console, asked: Sequence[Asked], deaths: Sequence[Death]) -> None:
    both = len(pairs(asked))
    different = different_replies(asked)
    if both:
        where = f" ({'; '.join(dict.fromkeys(different))})" if different else ""
        console.print(
            f"Replies that differ between the servers: {len(different)} of {both}{where}",
            highlight=False,
        )
    for death in deaths:
        what = "died and was started again" if death.restarted else "failed"
        console.print(
            f"{death.server} {what} in {death.scenario}, {death.step}: {death.sentence}",
            highlight=False,
            markup=False,
        )
