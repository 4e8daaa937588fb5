"""The command line of the bench: `mlx-hybridcache bench NAME ...`."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_hybridcache.cli.console import wide_console
from mlx_hybridcache.cli.flags import Parser, check_can_be_written
from mlx_hybridcache.demo import BUNDLED_MODEL

COMMANDS = {
    "overhead": ("overhead.command", "what the cache costs, each part beside its target"),
    "decode": ("decode", "tokens per second with and without the KV cache"),
    "speculate": ("speculate.command", "forwards and seconds of replies that are drafted"),
    "quantized": (
        "quantized",
        "what quantized keys and values weigh, and what they cost a hot request",
    ),
    "ttft": ("ttft.command", "time to first token of any server, with a report to show"),
    "hotpath": ("hotpath.command", "what a hot request costs a server, beside others"),
    "start": ("start", "what it takes to start servers and commands, beside others"),
    "ranks": ("ranks", "what ranks that agree cost, beside mlx_lm.server's"),
    "against": ("against", "a bench or the demo of this checkout beside an older one"),
    "disk": ("disk.command", "a restart with a cache directory, and what the directory costs"),
    "kills": ("kills.command", "what a cache directory loses by kill -9 and power cuts: nothing"),
    "page": ("page", "what the live page costs the server and the browser"),
    "router": ("router.command", "what canonicalizing a router does, and whether it helps here"),
    "traces": ("policies.generate", "write generated traces for `policies`"),
    "policies": ("policies.command", "tokens replayed by policy and budget, on traces"),
}
"""Each with its module, which is imported when it is named: most need MLX."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one measurement. 0: done; 1: a counted figure misses its target."""
    words = [*(argv or ())]
    parser = Parser(prog="mlx-hybridcache bench", description=__doc__)
    add_commands(parser.add_subparsers(dest="measurement", required=True), words[:1])
    if not words:
        parser.print_help()
        return 0
    return run(parser.parse_args(words))


def add_commands(commands: Any, named: Collection[str] = tuple(COMMANDS)) -> None:
    """Add every measurement to an argparse `add_subparsers()` object, with the options of those `named`."""
    for name, (_, purpose) in COMMANDS.items():
        parser = commands.add_parser(name, help=purpose)
        if name not in named:
            continue
        module = _module(name)
        parser.description = module.__doc__
        module.add_arguments(parser)
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
        parser.set_defaults(measurement=name)


def _module(name: str) -> Any:
    return import_module(f".{COMMANDS[name][0]}", __package__)


def run(args: argparse.Namespace) -> int:
    """Run the measurement that `args` names."""
    check_can_be_written("--json", args.json)
    # A server that runs elsewhere has a model of its own, whose tokens are not the bundled one's.
    if args.model is None and not getattr(args, "url", None):
        args.model = str(BUNDLED_MODEL)
    return int(_module(args.measurement).run(args, wide_console()))
