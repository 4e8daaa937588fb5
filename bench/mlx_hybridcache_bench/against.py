"""`bench against`: one command of this checkout and of an older one in turns, and the ratio of what they measure."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_hybridcache.errors import SettingError

from .kit.checkouts import Checkout
from .kit.machine import machine, one_line
from .kit.tables import Spread, show, write_json

PAIRS = 3
MISSED = 1
"""The exit status of a bench whose counted figure misses its target: it has measured all the same."""

CLOCK, PROCESSOR = "the whole command, clock", "the whole command, processor time"

Values = dict[str, float]


@dataclass(frozen=True, slots=True)
class Compared:
    """One value by both, pair by pair."""

    name: str
    here: tuple[float, ...]
    there: tuple[float, ...]

    @property
    def ratio(self) -> Spread | None:
        """Of this checkout over the other, pair by pair; None where the other is 0."""
        ratios = [a / b for a, b in zip(self.here, self.there, strict=True) if b]
        return Spread.of(ratios) if ratios else None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        ratio = self.ratio
        return {
            "name": self.name,
            "here": list(self.here),
            "there": list(self.there),
            "ratio": ratio and ratio.as_json(),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench against`."""
    parser.add_argument("checkout", type=Path, help="an older checkout, by its folder")
    parser.add_argument(
        "command", nargs="+", help="behind `--`: overhead --only cold, decode, demo, ..."
    )
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"runs of each ({PAIRS})")
    parser.set_defaults(model="")  # the command that is run has its own


def run(args: argparse.Namespace, console: Console) -> int:
    """Run, print, write. 1 when a command did not measure what the other one did."""
    if args.pairs < 1:
        raise SettingError("--pairs takes a number above 0.")
    found = machine()
    console.print(one_line(found), highlight=False)
    both = (Checkout.here(), Checkout.at(args.checkout))
    with console.status("running") as status:
        measured: dict[str, list[Values]] = {each.name: [] for each in both}
        for turn in range(args.pairs):
            for each in both if turn % 2 == 0 else reversed(both):
                status.update(f"{' '.join(args.command)}: {each.name} ({turn + 1} of {args.pairs})")
                measured[each.name].append(values_of(each, args.command))
    rows = compared(*measured.values())
    show(
        console,
        f"{' '.join(args.command)}: {both[0].name} / {both[1].name}, median (smallest-largest)",
        ("", both[0].name, both[1].name, "ratio"),
        [
            (
                each.name,
                *(Spread.of(side).text(".4g") for side in (each.here, each.there)),
                each.ratio.text(".3f") if each.ratio else "",
            )
            for each in rows
        ],
    )
    write_json(
        args.json,
        {
            "command": "against",
            "machine": found,
            "ran": list(args.command),
            "against": str(args.checkout),
            "values": [each.as_json() for each in rows],
        },
    )
    return 0


def values_of(checkout: Checkout, command: Sequence[str]) -> Values:
    """What one run took, and the figures that it wrote, if it is a bench."""
    if command[0] == "demo":
        spent = checkout.run(command)
        return {CLOCK: spent.wall_seconds, PROCESSOR: spent.cpu_seconds}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "result.json"
        arguments = ["bench", *command, "--json", str(file)]
        spent = checkout.run(arguments, statuses=(0, MISSED))
        if not file.exists():
            raise SettingError(f"`bench {' '.join(command)}` of {checkout.root} measured nothing.")
        told = json.loads(file.read_text(encoding="utf-8"))
    figures = {each["name"]: float(each["value"]) for each in told.get("figures", [])}
    return {**figures, CLOCK: spent.wall_seconds, PROCESSOR: spent.cpu_seconds}


def compared(here: Sequence[Values], there: Sequence[Values]) -> list[Compared]:
    """Values that every run of both has, in the order of the first run."""
    runs = (*here, *there)
    return [
        Compared(name, tuple(run[name] for run in here), tuple(run[name] for run in there))
        for name in runs[0]
        if all(name in run for run in runs)
    ]
