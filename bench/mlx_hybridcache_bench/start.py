"""`bench start`: the processor time until servers answer and commands have ended, each beside another."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
from rich.console import Console

from .kit.checkouts import Checkout
from .kit.machine import machine, one_line
from .kit.paired import Paired, Spent
from .kit.tables import Figure, Spread, show, show_figures, write_json
from .serving.client import COMPLETIONS, Client
from .serving.servers import OURS, THEIRS, Launch, ServerError, ServerProcess

PAIRS, QUICK_PAIRS = 7, 1
SERVER_RATIO = 1.15
COMMAND_RATIO = 0.2
HELP, LIST = "mlx-hybridcache --help", "mlx-hybridcache cache ls"


@dataclass(slots=True)
class Program:
    """Something that is started again and again. `start` starts it once and says what that took."""

    name: str
    checkout: str
    start: Callable[[], Spent]
    spent: list[Spent] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench start`."""
    parser.add_argument("--model", help="directory, or owner/name (default: the bundled model)")
    parser.add_argument(
        "--pairs", type=int, help=f"starts of each program ({PAIRS}; with --quick 1)"
    )
    parser.add_argument("--quick", action="store_true", help="one start of each, for a try")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="start an older checkout's programs too"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Start everything in turns, print, write. Times never fail it."""
    found = machine()
    console.print(one_line(found), highlight=False)
    checkouts = [Checkout.here(), *([Checkout.at(args.against)] if args.against else [])]
    pairs = args.pairs or (QUICK_PAIRS if args.quick else PAIRS)
    with console.status("starting") as status, tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "segments").mkdir()  # by which `cache ls` knows a cache directory
        programs = _programs(checkouts, args.model, directory)
        measure_starts(programs, pairs, status.update)
    promised = figures(programs)
    _show(console, programs)
    show_figures(console, promised)
    write_json(
        args.json,
        {
            "command": "start",
            "machine": found,
            "against": str(args.against) if args.against else None,
            "figures": [figure.as_json() for figure in promised],
            "starts": [
                {
                    "program": each.name,
                    "checkout": each.checkout,
                    "cpu_seconds": [spent.cpu_seconds for spent in each.spent],
                    "wall_seconds": [spent.wall_seconds for spent in each.spent],
                }
                for each in programs
            ],
        },
    )
    return 0


def measure_starts(
    programs: Sequence[Program], pairs: int, told: Callable[[str], object] = lambda said: None
) -> None:
    """All of them `pairs` times after one start that does not count, in turns: a b c, then c b a."""
    for turn in range(1 + pairs):
        for each in programs if turn % 2 == 0 else reversed(programs):
            told(f"{each.name} of {each.checkout} ({turn} of {pairs})")
            spent = each.start()
            if turn:  # the first one reads files that nobody had read, and compiles them
                each.spent.append(spent)


def figures(programs: Sequence[Program]) -> list[Figure]:
    """The promised ones: beside mlx_lm.server, and beside the other checkout if there is one."""
    here, *others = dict.fromkeys(each.checkout for each in programs if each.name != THEIRS)
    by = {(each.name, each.checkout): each for each in programs}
    ratio = _paired(by[THEIRS, here], by[OURS, here]).cpu_ratio
    found = [Figure(f"processor time, {OURS} / {THEIRS}", ratio, "x", SERVER_RATIO, False)]
    for other in others:
        for name in (HELP, LIST):
            ratio = _paired(by[name, other], by[name, here]).cpu_ratio
            title = f"processor time, {name}, {here} / {other}"
            found.append(Figure(title, ratio, "x", COMMAND_RATIO, False))
    return found


def _paired(reference: Program, other: Program) -> Paired:
    return Paired(tuple(reference.spent), tuple(other.spent))


def _programs(checkouts: Sequence[Checkout], model: str, directory: str) -> list[Program]:
    here = checkouts[0]
    found = [Program(THEIRS, here.name, partial(_start_server, THEIRS, here, model))]
    for each in checkouts:
        ls = ["cache", "ls", "--cache-dir", directory]
        found += [
            Program(OURS, each.name, partial(_start_server, OURS, each, model)),
            Program(HELP, each.name, partial(each.run, ["--help"])),
            Program(LIST, each.name, partial(each.run, ls)),
        ]
    return found


def _start_server(name: str, checkout: Checkout, model: str) -> Spent:
    """Until its first reply, as mlx_lm.server listens before its model is loaded; it is stopped then."""
    began = time.perf_counter()
    with ServerProcess(Launch.of(name, model).within(checkout.variables)) as process:
        process.wait_ready()
        with Client(process.url) as client:
            client.ask(COMPLETIONS, {"prompt": "The", "max_tokens": 1})
        wall = time.perf_counter() - began
        if process.pid is None:
            raise ServerError(f"{name} ended as soon as it had started.")
        used = psutil.Process(process.pid).cpu_times()
        return Spent(wall, used.user + used.system)


def _show(console: Console, programs: Sequence[Program]) -> None:
    rows = []
    for each in programs:
        cpu = [spent.cpu_seconds for spent in each.spent]
        wall = [spent.wall_seconds for spent in each.spent]
        rows.append(
            (f"{each.name}, {each.checkout}", *(Spread.of(v).text(".2f") for v in (cpu, wall)))
        )
    show(console, "Starts, median (smallest-largest)", ("", "processor time, s", "clock, s"), rows)
