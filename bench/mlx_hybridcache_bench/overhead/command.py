"""`bench overhead`: what the cache costs, each part beside its target."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Protocol

from rich.console import Console

from mlx_hybridcache import models
from mlx_hybridcache.cli.flags import tokens

from ..kit.machine import machine, one_line
from ..kit.standin import SHAPES
from ..kit.tables import Figure, show_figures, write_json
from ..kit.text import prompt_of
from .cold import measure_cold
from .full_size import measure_full_size
from .matching import measure_matching
from .selection import measure_selection
from .slices import measure_slices
from .stored import SIZES, measure_stored


class Part(Protocol):
    """One part's result."""

    def figures(self) -> list[Figure]: ...

    def as_json(self) -> dict[str, Any]: ...

    def show(self, console: Console) -> None: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench overhead`."""
    parser.add_argument("--model", help="directory, or owner/name (default: the bundled model)")
    parser.add_argument(
        "--only", choices=sorted(PARTS), action="append", help="this part only (may be repeated)"
    )
    parser.add_argument("--prompt-tokens", type=tokens(), default=4096, help="cold: prompt (4096)")
    parser.add_argument("--max-tokens", type=tokens(), default=8, help="cold: reply (8)")
    parser.add_argument("--pairs", type=int, default=7, help="measurements of each two ways (7)")
    parser.add_argument("--conversations", type=int, default=1000, help="matching: stored (1000)")
    parser.add_argument(
        "--match-tokens", type=tokens(), default=120_000, help="matching: the longest"
    )
    parser.add_argument(
        "--tokens", type=int, default=60_000, help="full-size: prompt (60000, needs 9 GiB)"
    )
    parser.add_argument(
        "--shapes", choices=list(SHAPES), default="qwen3-next-80b", help="full-size: whose caches"
    )
    parser.add_argument(
        "--slice-tokens", type=tokens(), default=9000, help="slices: prompts (9000)"
    )
    parser.add_argument(
        "--nodes", type=int, action="append", help="store: how much is stored (100 to 50000)"
    )
    parser.add_argument("--step", type=tokens(), default=2048, help="slices: prefill step (2048)")


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
            "command": "overhead",
            "machine": found,
            "figures": [figure.as_json() for figure in figures],
            "parts": {name: part.as_json() for name, part in parts.items()},
        },
    )
    return int(any(figure.counted and not figure.kept for figure in figures))


def _cold(args: argparse.Namespace) -> Part:
    model, tokenizer = models.load(args.model)
    prompt = prompt_of(tokenizer, args.prompt_tokens)
    return measure_cold(model, tokenizer, prompt, max_tokens=args.max_tokens, pairs=args.pairs)


def _matching(args: argparse.Namespace) -> Part:
    return measure_matching(
        conversations=args.conversations, tokens=args.match_tokens, rounds=5 * args.pairs
    )


def _full_size(args: argparse.Namespace) -> Part:
    return measure_full_size(args.tokens, pairs=args.pairs, shapes=SHAPES[args.shapes])


def _slices(args: argparse.Namespace) -> Part:
    return measure_slices(tokens=args.slice_tokens, step=args.step)


def _selection(args: argparse.Namespace) -> Part:
    return measure_selection(args.model, pairs=50 * args.pairs)


def _stored(args: argparse.Namespace) -> Part:
    return measure_stored(args.nodes or SIZES, rounds=5 * args.pairs)


PARTS: dict[str, Callable[[argparse.Namespace], Part]] = {
    "cold": _cold,
    "matching": _matching,
    "full-size": _full_size,
    "slices": _slices,
    "router": _selection,
    "store": _stored,
}
