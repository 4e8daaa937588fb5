"""`bench ranks`: several ranks of this server beside as many of `mlx_lm.server`, each with some of the layers, on this machine.

Both compute the same forwards over MLX's ring; what is beside them is what the ranks say to each other. Every prompt is new
to both, and they are asked in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
from rich.console import Console

from .hotpath.model import make_model
from .hotpath.vocabulary import BUNDLED
from .kit.machine import machine, one_line
from .kit.tables import Figure, Spread, show, show_figures, write_json
from .kit.text import prompt_of, tokenizer_of
from .serving.client import COMPLETIONS, Client
from .serving.servers import OURS, THEIRS, Launch, ServerProcess, free_port

PAIRS, QUICK_PAIRS = 9, 2
PROMPT_TOKENS, QUICK_TOKENS = 2000, 100
REPLY_TOKENS, QUICK_REPLY = 64, 8
RATIO = 1.05

LARGER = {
    "hidden_size": 384,
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 4,
}
"""A random hybrid of 33 million parameters, whose token takes ten times as long as the bundled model's."""

LARGER_TOKENS = 300


@dataclass(slots=True)
class Side:
    """One group that runs, and what its requests took, in seconds: to the first token, and for each later one."""

    name: str
    processes: list[ServerProcess]
    first: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)

    def ask(self, prompt: str, count: int) -> None:
        """A prompt that is new, to the end of a reply of `count` tokens."""
        with Client(self.processes[0].url) as client:
            reply = client.ask(COMPLETIONS, {"prompt": prompt, "max_tokens": count})
        self.first.append(reply.first_seconds)
        self.token.append((reply.last_seconds - reply.first_seconds) / max(1, count - 1))

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Its processes get no turn meanwhile: idle ranks of mlx_lm.server ask each other without a pause."""
        held = [psutil.Process(each.pid) for each in self.processes]
        for process in held:
            process.suspend()
        try:
            yield
        finally:
            for process in held:
                process.resume()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench ranks`."""
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--model", help="directory (default: the bundled model)")
    models.add_argument(
        "--larger",
        action="store_true",
        help="a random hybrid of 33 million parameters, made on the spot; prompts of 300 tokens",
    )
    parser.add_argument("--ranks", type=int, default=2, help="of each group (%(default)s)")
    parser.add_argument("--pairs", type=int, help=f"requests of each ({PAIRS}; with --quick 2)")
    parser.add_argument("--quick", action="store_true", help="short requests, for a try")


def run(args: argparse.Namespace, console: Console) -> int:
    """Start both groups, ask them in turns, print, write. Times never fail it."""
    found = machine()
    console.print(one_line(found), highlight=False)
    pairs = args.pairs or (QUICK_PAIRS if args.quick else PAIRS)
    tokens, count = (QUICK_TOKENS, QUICK_REPLY) if args.quick else (PROMPT_TOKENS, REPLY_TOKENS)
    tokens = min(tokens, LARGER_TOKENS) if args.larger else tokens
    with ExitStack() as held, console.status("starting") as status:
        directory = Path(held.enter_context(tempfile.TemporaryDirectory()))
        model = str(_indexed(_larger(directory) if args.larger else Path(args.model), directory))
        tokenizer: Any = tokenizer_of(model)
        ids = prompt_of(tokenizer, tokens + pairs + 1)
        sides = [
            Side(name, held.enter_context(_group(name, model, args.ranks, directory)))
            for name in (THEIRS, OURS)
        ]
        for turn in range(pairs + 1):
            text = tokenizer.decode(ids[turn : turn + tokens])
            for side, other in [sides, sides[::-1]] if turn % 2 == 0 else [sides[::-1], sides]:
                status.update(f"{side.name} ({turn} of {pairs})")
                with other.standing_still():
                    side.ask(text, count)
    for side in sides:  # the first request of each is for warming up
        del side.first[0], side.token[0]
    promised = _figures(*sides)
    _show(console, sides)
    show_figures(console, promised)
    told = [{"name": each.name, "first": each.first, "token": each.token} for each in sides]
    figures = [figure.as_json() for figure in promised]
    write_json(args.json, {"command": "ranks", "machine": found, "figures": figures, "sides": told})
    return 0


def _figures(theirs: Side, ours: Side) -> list[Figure]:
    def ratio(of: str) -> float:
        pairs = zip(getattr(theirs, of), getattr(ours, of), strict=True)
        return float(statistics.median(b / a for a, b in pairs))

    return [
        Figure(f"cold TTFT, / {THEIRS}", ratio("first"), "x", RATIO, False),
        Figure(f"a token, / {THEIRS}", ratio("token"), "x", RATIO, False),
    ]


def _show(console: Console, sides: list[Side]) -> None:
    rows = [
        (
            each.name,
            *(Spread.of([1000 * s for s in of]).text(".1f") for of in (each.first, each.token)),
        )
        for each in sides
    ]
    show(console, "By the clock, ms: median (smallest-largest)", ("", "cold TTFT", "a token"), rows)


def _larger(directory: Path) -> Path:
    made = directory / "larger"
    made.mkdir()
    make_model(made, BUNDLED, shapes=LARGER)
    return made


def _indexed(model: Path, directory: Path) -> Path:
    """The same model with an index of its files, which mlx-lm's pipeline needs."""
    index = "model.safetensors.index.json"
    made = directory / "model"
    made.mkdir()
    for each in model.iterdir():
        (made / each.name).symlink_to(each.resolve())
    if not (made / index).exists():
        names: dict[str, str] = {}
        for each in made.glob("*.safetensors"):
            weights: Any = mx.load(str(each))
            names |= dict.fromkeys(weights, each.name)
        (made / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return made


@contextmanager
def _group(name: str, model: str, size: int, directory: Path) -> Iterator[list[ServerProcess]]:
    """All ranks of a group, once it answers."""
    hosts = directory / f"{name}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(size)]))
    launch = Launch.of(name, model, ["--pipeline"])
    with ExitStack() as held:
        ranks = [
            held.enter_context(
                ServerProcess(launch.within({"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}))
            )
            for rank in range(size)
        ]
        ranks[0].wait_ready()
        yield ranks
        for rank in ranks:
            rank.kill()
