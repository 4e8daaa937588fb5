"""The command line of a cache directory: `mlx-hybridcache cache ls | stats | verify | prune | ...`.

It reads headers and moves files, so it needs no model, and shows no text: prompts are private.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from ..flags import Parser

Command = Callable[[str, str, str], argparse.ArgumentParser]
"""Adds a command: its name, the module and function that run it, what it is for."""


def main(argv: Sequence[str], prog: str) -> int:
    """Run one command. 0: done; 1: something is damaged, or pins are in the way; 2: it cannot be done.

    Raises `HybridCacheError` and `OSError`, whose words say why.
    """
    parser = _parser(prog)
    if not argv:
        parser.print_help()
        return 0
    options = parser.parse_args(argv)
    module, name = options.run.split(".")  # imported alone: shipping needs what looking does not
    return int(getattr(import_module(f".{module}", __package__), name)(options))


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    where = Parser(add_help=False)
    where.add_argument("--cache-dir", required=True, type=_path, help="the directory of a server")

    def command(name: str, run: str, what: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[where], help=what, description=what)
        added.set_defaults(run=run)
        return added

    _add_looking(command)
    _add_thinning(command)
    _add_keeping(command)
    return parser


def _add_looking(command: Command) -> None:
    ls = command("ls", "look.ls", "conversations as a tree: positions, sizes, ages, ids")
    ls.add_argument("--all", action="store_true", help="every checkpoint on a line of its own")
    ls.add_argument("--json", action="store_true", help="the same for programs")
    stats = command("stats", "look.stats", "bytes and counts, per model and in total")
    stats.add_argument("--json", action="store_true", help="the same for programs")


def _add_thinning(command: Command) -> None:
    verify = command("verify", "thin.verify", "check every file from its first byte to its last")
    verify.add_argument("--delete", action="store_true", help="delete those that are damaged")
    prune = command("prune", "thin.prune", "let the least useful go, pins excepted")
    prune.add_argument("--yes", action="store_true", help="do not ask")
    prune.add_argument("--to", required=True, metavar="SIZE", help="what may stay: bytes, or 20GB")
    clear = command("clear", "thin.clear", "delete everything, pins included")
    clear.add_argument("--yes", action="store_true", help="do not ask")


def _add_keeping(command: Command) -> None:
    for name in ("pin", "unpin"):
        pin = command(name, f"keep.{name}", f"{name} a checkpoint and what leads to it")
        pin.add_argument("id", help="the beginning of an id that `ls` shows")
    sends = command("export", "keep.export", "write a prefix with its checkpoints into one file")
    sends.add_argument("id", help="the beginning of an id that `ls` shows")
    sends.add_argument("--to", required=True, type=_path, metavar="FILE", help="the file to write")
    sends.add_argument(
        "--only-end", action="store_true", help="leave the checkpoints before the last one out"
    )
    sends.add_argument("--force", action="store_true", help="write over a file that is there")
    gets = command(
        "import", "keep.import_", "put an exported prefix into this directory, and pin it"
    )
    gets.add_argument("file", type=_path, help="what `export` wrote")
    gets.add_argument("--no-pin", action="store_true", help="it may go like everything else")


def _path(text: str) -> Path:
    return Path(text).expanduser()
