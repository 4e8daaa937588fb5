"""The command line: `mlx-hybridcache serve | launch | explain | demo | verify | plan | canonicalize | cache | bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ..backend import explaining
from ..errors import HybridCacheError, printable, refusal

PROG = "mlx-hybridcache"

COMMANDS = {
    "serve": ("mlx_hybridcache.server", "answer over HTTP as OpenAI does"),
    "launch": ("mlx_hybridcache.cli.launch.main", "run a coding agent on a server of ours"),
    "explain": (
        "mlx_hybridcache.cli.explain.main",
        "say why a prompt is read again, and what to change",
    ),
    "demo": ("mlx_hybridcache.cli.demo", "read a long text, cold and through the cache"),
    "verify": ("mlx_hybridcache.cli.verify", "prove hot == cold for a model on this device"),
    "plan": ("mlx_hybridcache.cli.plan", "memory for a model, by its config.json alone"),
    "canonicalize": (
        "mlx_hybridcache.cli.canonicalize",
        "find experts that are one and give them one router row; `canonicalize -h` lists how",
    ),
    "cache": (
        "mlx_hybridcache.cli.cache.main",
        "look into a cache directory and keep it; `cache -h` lists how",
    ),
    "bench": ("mlx_hybridcache.cli.bench", "measure; `bench -h` lists what"),
}
"""Each with the module whose `main(words, prog)` reads what stands behind the command's name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0: done; 1: a comparison did not hold; 2: the request could not be served.

    The first word is read here and the others by the command's own parser. Only the module of the
    command that is named is imported.
    """
    words = sys.argv[1:] if argv is None else [*argv]
    parser = _parser()
    if not words:
        parser.print_help()
        return 0
    command: str = parser.parse_args(words[:1]).command
    prog = f"{PROG} {command}"
    try:
        with explaining():
            return int(import_module(COMMANDS[command][0]).main(words[1:], prog))
    except (HybridCacheError, OSError) as error:
        said = refusal(error) if isinstance(error, OSError) else str(error)
        shown = "\n".join(map(printable, said.split("\n")))
        print(f"{prog}: {shown}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__)
    parser.add_argument("--version", action=_Version, help="show which versions are at work")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, purpose) in COMMANDS.items():
        commands.add_parser(name, help=purpose, add_help=False)
    return parser


class _Version(argparse.Action):
    """Argparse's own has to be told the text beforehand, and looking it up takes time."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):  # noqa: A002
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .versions import versions

        print(versions())
        parser.exit()
