"""`bench hotpath`: what a hot request costs a server, where the model costs next to nothing.

A hybrid of about 120,000 parameters is made on the spot, so that what is left is what is around the
model: reading a request, its template, its tokens, the cache, the stream.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_hybridcache.errors import SettingError

from ..kit.checkouts import Checkout
from ..kit.machine import machine, one_line
from ..kit.tables import show_figures, write_json
from ..kit.text import tokenizer_of
from ..serving.remote import RemoteServer, name_and_url
from ..serving.scenarios import Material
from ..serving.servers import OURS, THEIRS, Launch, ServerError, ServerProcess
from ..serving.side import Side
from ..serving.target import Server, Target
from .asked import Asked, Request, ask_in_turns
from .floor import Floor, measure_floors
from .model import make_model
from .results import as_json, figures, show_floors, show_requests
from .vocabulary import BUNDLED, VOCABULARIES

SIZES, QUICK_SIZES = (12_000, 60_000, 120_000), (1_500,)
RUNS, QUICK_RUNS = 2, 1
PAIRS, QUICK_PAIRS = 15, 1
WARM_UP = 1_000
"""Tokens of the requests that are not measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench hotpath`."""
    parser.add_argument(
        "--model", default="", help="directory, or owner/name (default: made on the spot)"
    )
    parser.add_argument(
        "--vocabulary",
        choices=VOCABULARIES,
        default=BUNDLED,
        help="of the model that is made: 3,072 entries, or 150,000 of Qwen's or trained here",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where to make it, and leave it")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="measure an older checkout's server too"
    )
    parser.add_argument(
        "--url",
        action="append",
        default=[],
        metavar="[NAME=]URL",
        help="measure a server that runs already too; may be repeated",
    )
    parser.add_argument(
        "--served-model", metavar="NAME", help="what requests to --url name as model"
    )
    parser.add_argument("--sizes", nargs="+", type=int, metavar="TOKENS", help="of the chats")
    parser.add_argument("--runs", type=int, help=f"conversations of each size ({RUNS})")
    parser.add_argument("--pairs", type=int, help=f"repeats in the library ({PAIRS})")
    parser.add_argument("--quick", action="store_true", help="small chats, for a try")


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, print, write. Times never fail it."""
    sizes = sorted(args.sizes or (QUICK_SIZES if args.quick else SIZES))
    runs = args.runs or (QUICK_RUNS if args.quick else RUNS)
    pairs = args.pairs or (QUICK_PAIRS if args.quick else PAIRS)
    if min(*sizes, runs, pairs) < 1:
        raise SettingError("--sizes, --runs and --pairs take numbers above 0.")
    found = machine()
    console.print(one_line(found), highlight=False)
    with console.status("making a model") as status, _model(args) as (model, parameters):
        material = Material(tokenizer_of(model), max(sizes))
        floors = measure_floors(model, material, sizes, pairs, status.update)
        with _servers(args, model, material) as servers:
            requests = [*ask_in_turns(servers, material, sizes, runs, status.update)]
    _tell(args, console, requests, floors, {"machine": found, "parameters": parameters})
    return 0


def _tell(
    args: argparse.Namespace,
    console: Console,
    requests: Sequence[Request],
    floors: Sequence[Floor],
    about: dict[str, Any],
) -> None:
    promised = figures(requests, floors)
    show_requests(console, requests)
    show_floors(console, floors, requests)
    show_figures(console, promised)
    write_json(
        args.json,
        {
            "command": "hotpath",
            **about,
            "vocabulary": None if args.model else args.vocabulary,
            "against": str(args.against) if args.against else None,
            "figures": [each.as_json() for each in promised],
            **as_json(requests, floors),
        },
    )


@contextmanager
def _model(args: argparse.Namespace) -> Iterator[tuple[str, int | None]]:
    """Where the model is, and how many parameters the one that is made has."""
    if args.model:
        yield args.model, None
        return
    with tempfile.TemporaryDirectory() as made:
        directory = args.keep or Path(made)
        directory.mkdir(parents=True, exist_ok=True)
        yield str(directory), make_model(directory, args.vocabulary)


@contextmanager
def _servers(args: argparse.Namespace, model: str, material: Material) -> Iterator[list[Asked]]:
    """All that are measured, warm, ours first. Raises `ServerError`."""
    with ExitStack() as stack:
        processes = [stack.enter_context(ServerProcess(each)) for each in _launches(args, model)]
        for process in processes:
            process.wait_ready()
        elsewhere = [RemoteServer(*name_and_url(each), None) for each in args.url]
        asked: list[Asked] = []
        servers: list[Server] = [*processes, *elsewhere]
        for server in servers:
            target = _target(server, args.served_model)
            stack.callback(target.close)
            side = Side(target, material, WARM_UP, warm_ups=("repeat",))
            side.warm_up()
            asked.append(Asked(server, side))
        yield asked


def _target(server: Server, served_model: str | None) -> Target:
    if not isinstance(server, RemoteServer):
        return Target(server, most_restarts=0)
    if not server.healthy():
        raise ServerError(f"{server.name}: {server.silent}.")
    return Target(server, most_restarts=0, fields={"model": server.chosen(served_model)})


def _launches(args: argparse.Namespace, model: str) -> list[Launch]:
    both = [Launch.of(name, model) for name in (OURS, THEIRS)]
    if not args.against:
        return both
    other = Checkout.at(args.against)
    return [*both, Launch(other.name, both[0].arguments).within(other.variables)]
