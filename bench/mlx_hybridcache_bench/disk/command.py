"""`bench disk`: what a restart costs with a cache directory, and what the directory costs otherwise."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from rich.console import Console

from mlx_hybridcache import models
from mlx_hybridcache.cli.flags import tokens

from ..kit.machine import machine, one_line
from ..kit.standin import SHAPES
from ..kit.tables import show_figures, write_json
from ..overhead.command import Part
from .changes import measure_changes
from .handoff import measure_handoff
from .on_off import measure_on_and_off
from .promotion import Promotions, measure_bundled, measure_stand_in
from .restart import measure_restarts

SIZES, QUICK_SIZES = (3_000, 12_000), (600, 1_500)
RESTART_TOKENS, QUICK_RESTART_TOKENS = 12_000, 3_000
PROMOTION_SIZES, QUICK_PROMOTION_SIZES = (12_000, 60_000), (3_000,)
CHANGES, QUICK_CHANGES = ((40, 58), (4, 580), (160, 58)), ((4, 10), (4, 40))
STAND_IN_TOKENS, QUICK_STAND_IN_TOKENS = 12_000, 2_500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench disk`."""
    parser.add_argument("--model", help="directory, or owner/name (default: the bundled model)")
    parser.add_argument(
        "--only", choices=sorted(PARTS), action="append", help="this part only (may be repeated)"
    )
    parser.add_argument("--quick", action="store_true", help="small prompts, one run, for a try")
    parser.add_argument(
        "--repeats", type=int, help="restarts of each kind, and pairs (restart 3, else 7; quick 1)"
    )
    parser.add_argument(
        "--tokens", type=tokens(), help="restart: prompt (12000; with --quick 3000)"
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="on-off: prompts (3000 12000; with --quick 600 1500)",
    )
    parser.add_argument("--reply-tokens", type=tokens(), default=200, help="on-off: reply (200)")
    parser.add_argument(
        "--promotion-sizes",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="promotion: prompts to the model (12000 60000; with --quick 3000)",
    )
    parser.add_argument(
        "--stand-in-tokens",
        type=int,
        help="promotion and hand-off: prompt to the stand-in (12000, needs 3 GiB; --quick 2500)",
    )
    parser.add_argument(
        "--shapes", choices=list(SHAPES), default="qwen3-next-80b", help="the stand-in's caches"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, print, write. 1 when a counted figure misses its target; timings never fail it."""
    chosen = args.only or list(PARTS)
    found = machine()
    console.print(one_line(found), highlight=False)
    parts: dict[str, Part] = {}
    for name, measured in PARTS.items():
        if name in chosen:
            with console.status(f"measuring {name}"):
                parts[name] = measured(args)
            parts[name].show(console)
    figures = [figure for part in parts.values() for figure in part.figures()]
    show_figures(console, figures)
    write_json(
        args.json,
        {
            "command": "disk",
            "machine": found,
            "figures": [figure.as_json() for figure in figures],
            "parts": {name: part.as_json() for name, part in parts.items()},
        },
    )
    return int(any(figure.counted and not figure.kept for figure in figures))


def _repeats(args: argparse.Namespace, whole: int) -> int:
    return int(args.repeats or (1 if args.quick else whole))


def _size(given: int | None, args: argparse.Namespace, whole: int, quick: int) -> int:
    return given or (quick if args.quick else whole)


def _sizes(
    given: Sequence[int] | None,
    args: argparse.Namespace,
    whole: Sequence[int],
    quick: Sequence[int],
) -> Sequence[int]:
    return given or (quick if args.quick else whole)


def _restart(args: argparse.Namespace) -> Part:
    tokens = _size(args.tokens, args, RESTART_TOKENS, QUICK_RESTART_TOKENS)
    return measure_restarts(args.model, tokens=tokens, repeats=_repeats(args, 3))


def _promotion(args: argparse.Namespace) -> Part:
    model, tokenizer = models.load(args.model)
    pairs = _repeats(args, 7)
    sizes = _sizes(args.promotion_sizes, args, PROMOTION_SIZES, QUICK_PROMOTION_SIZES)
    found = [measure_bundled(model, tokenizer, tokens, pairs=pairs) for tokens in sizes]
    tokens = _size(args.stand_in_tokens, args, STAND_IN_TOKENS, QUICK_STAND_IN_TOKENS)
    found.append(measure_stand_in(args.shapes, tokens, pairs=pairs))
    return Promotions(tuple(found))


def _hand_off(args: argparse.Namespace) -> Part:
    tokens = _size(args.stand_in_tokens, args, STAND_IN_TOKENS, QUICK_STAND_IN_TOKENS)
    return measure_handoff(args.shapes, tokens, runs=_repeats(args, 7))


def _on_off(args: argparse.Namespace) -> Part:
    model, tokenizer = models.load(args.model)
    sizes = _sizes(args.sizes, args, SIZES, QUICK_SIZES)
    return measure_on_and_off(
        model, tokenizer, sizes, reply_tokens=args.reply_tokens, pairs=_repeats(args, 7)
    )


def _changes(args: argparse.Namespace) -> Part:
    return measure_changes(QUICK_CHANGES if args.quick else CHANGES)


PARTS: dict[str, Callable[[argparse.Namespace], Part]] = {
    "restart": _restart,
    "promotion": _promotion,
    "hand-off": _hand_off,
    "on-off": _on_off,
    "changes": _changes,
}
