"""`bench kills`: kill writers and servers, cut the power of disks, and count what went wrong."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ..kit.machine import machine, one_line
from ..kit.tables import Figure, show, show_figures, write_json
from . import power
from .server_kills import ServerAccount, kill_servers
from .writer_kills import Account, kill_at_every_operation, kill_at_random, started_writers

Accounts = Mapping[str, Account | ServerAccount]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench kills`."""
    parser.add_argument("--model", help="directory, or owner/name (default: the bundled model)")
    parser.add_argument("--writer", type=int, default=200, help="writers to kill (%(default)s)")
    parser.add_argument(
        "--stages",
        type=int,
        default=3,
        metavar="N",
        help="checkpoints of a writer that is killed at each of its file operations (%(default)s)",
    )
    parser.add_argument("--server", type=int, default=15, help="servers to kill (%(default)s)")
    parser.add_argument("--cuts", type=int, default=20, help="power cuts; needs root (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is random (%(default)s)")


def run(args: argparse.Namespace, console: Console) -> int:
    """Kill, print, write. 1 when anything was lost, damaged, left over or answered otherwise."""
    found = machine()
    console.print(one_line(found), highlight=False)
    why = power.why_not() if args.cuts else None
    accounts = _killed(args, console, cuts=args.cuts if why is None else 0)
    if why is not None:
        console.print(f"No power cuts: {why}.", highlight=False, markup=False)
    _show(console, accounts)
    counted = figures(accounts)
    show_figures(console, counted)
    write_json(
        args.json,
        {
            "command": "kills",
            "machine": found,
            "seed": args.seed,
            "accounts": {name: _as_json(account) for name, account in accounts.items()},
            "figures": [figure.as_json() for figure in counted],
        },
    )
    return int(not all(figure.kept for figure in counted))


def _killed(
    args: argparse.Namespace, console: Console, *, cuts: int
) -> dict[str, Account | ServerAccount]:
    """Everything that is asked for, by what was done."""
    accounts: dict[str, Account | ServerAccount] = {}
    with console.status("starting") as status, started_writers() as writers:
        if args.writer:
            status.update(f"killing {args.writer} writers")
            with tempfile.TemporaryDirectory() as folder:
                accounts["killed at random"] = kill_at_random(
                    writers, Path(folder), args.writer, args.seed
                )
        if args.stages:
            status.update("killing writers at every file operation")
            with tempfile.TemporaryDirectory() as folder:
                accounts["killed at every file operation"] = kill_at_every_operation(
                    writers, Path(folder), args.stages, args.seed
                )
        if cuts:
            status.update(f"cutting the power of {cuts} writers")
            with power.small_disk() as disk:
                accounts["power cut"] = power.cut_power(writers, disk, cuts, args.seed)
        if args.server:
            with tempfile.TemporaryDirectory() as folder:
                accounts["servers killed"] = kill_servers(
                    args.model,
                    Path(folder),
                    args.server,
                    args.seed,
                    on_kill=lambda number: status.update(f"killed {number} servers"),
                )
    return accounts


def figures(accounts: Accounts) -> list[Figure]:
    """One for each way of killing: none of what must not be."""
    return [
        Figure(f"faults, {name}", len(account.faults), f"in {account.kills}", 0, True)
        for name, account in accounts.items()
    ]


def _as_json(account: Account | ServerAccount) -> dict[str, Any]:
    values = asdict(account)
    values.pop("promised", None)
    return values


def _show(console: Console, accounts: Accounts) -> None:
    for name, account in accounts.items():
        counts = [(what, n) for what, n in _as_json(account).items() if what != "faults"]
        show(console, name.capitalize(), ["", ""], [(what, f"{n:,}") for what, n in counts])
        for fault in account.faults:
            console.print(fault, highlight=False, markup=False)
