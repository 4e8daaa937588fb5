"""The command `mlx-hybridcache plan`: what a model needs for long prompts, before it is downloaded or loaded."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SettingError
from ..sizes import format_bytes, parse_bytes
from .flags import Parser, add_quantizing_flags, add_store_flags, check_can_be_written, tokens

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..caches.kinds.smaller import StorePrecision
    from ..caches.quantizing.precision import Precision
    from ..planning.plan import Plan

PEAK = "peak, where nothing has to go"

WIDTH = 100
"""Columns where no terminal says how wide it is."""


def main(argv: Sequence[str], prog: str) -> int:
    """Print a plan. 0: one request of that length fits; 1: it does not.

    Raises `ModelError` for a model that cannot be read, `SettingError` for a size that means nothing.
    """
    options = _parser(prog).parse_args(argv)
    check_can_be_written("--json", options.json)
    memory = _named("--memory", options.memory)
    working_set = _named("--working-set", options.working_set)
    if memory is None and working_set is not None:
        raise SettingError("--working-set is that of a Mac; name its --memory, too.")

    from ..planning.advice import as_json
    from ..planning.plan import make, room_here, room_on_a_mac
    from ..planning.unloaded_model import describe, heaviest_part
    from .console import wide_console

    model = heaviest_part(describe(options.model), options.ranks)
    room = (
        room_here(model.weights_bytes)
        if memory is None
        else room_on_a_mac(model.weights_bytes, memory, working_set)
    )
    plan = make(
        model,
        room,
        context=options.context,
        max_tokens=options.max_tokens,
        step=options.prefill_step_size,
        every=options.checkpoint_every_n_tokens,
        precision=_precision(options),
        storing=_storing(options),
        ranks=options.ranks,
    )
    show(wide_console(WIDTH), plan, options.memory)
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(plan), indent=2) + "\n", encoding="utf-8")
    return 0 if plan.fits else 1


def _precision(options: argparse.Namespace) -> Precision | None:
    from ..caches.quantizing.precision import Precision

    return Precision.of(options.kv_bits, options.kv_group_size, options.quantized_kv_start)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add(
        "--model", required=True, help="directory, or owner/name, of which only config.json is read"
    )
    add("--context", type=tokens(), default=120_000, help="tokens of a prompt (120k)")
    add(
        "--max-tokens",
        type=tokens(0),
        default=0,
        help="tokens of a reply (no limit, as room for 8192)",
    )
    add(
        "--memory",
        help="of the Mac to plan for, as sold: 128GB are 128 GiB (default: this machine)",
    )
    add("--ranks", type=tokens(), default=1, help="such machines, each with some of the layers (1)")
    add("--working-set", help="what macOS recommends for its GPU (default: an assumption, printed)")
    add("--prefill-step-size", type=tokens(), default=2048, help="as the server's (2048)")
    add("--checkpoint-every-n-tokens", type=tokens(), default=2048, help="as the server's (2048)")
    add_store_flags(parser)
    add_quantizing_flags(parser, 5000, "as the server's (5000)")
    add("--json", type=Path, metavar="FILE", help="write the plan here too, in bytes and tokens")
    return parser


def as_sold(size: str) -> int:
    """Bytes of a memory size as it is printed on the box, where a GB has 2**30 bytes."""
    parse_bytes(size)
    found = re.fullmatch(r"(.*[kmgt])b?", size.strip().lower())
    return parse_bytes(size if found is None else f"{found[1]}ib")


def _named(flag: str, size: str | None) -> int | None:
    try:
        return None if size is None else as_sold(size)
    except SettingError as error:
        raise SettingError(f"{flag} {error}") from error


def _storing(options: argparse.Namespace) -> StorePrecision:
    """What a smaller store is to keep."""
    from ..caches.kinds.smaller import smaller

    found = smaller(options.store_kv, options.store_state)
    if found and options.kv_bits is not None:
        raise SettingError("--store-kv and --store-state are for caches without --kv-bits.")
    return found


def show(console: Console, plan: Plan, memory: str | None) -> None:
    """Print it."""
    from ..planning.advice import advice, assumptions, server_flags

    console.print(_table(plan, "this machine" if memory is None else f"a Mac with {memory}"))
    for line in [*_facts(plan), *assumptions(plan)]:
        console.print(line, highlight=False, soft_wrap=True)
    for line in advice(plan):
        console.print(f"! {line}", highlight=False, soft_wrap=True, markup=False)
    if plan.fits:
        said = " ".join(
            word if word.startswith("~/") else shlex.quote(word) for word in server_flags(plan)
        )
        console.print(f"\n{_starts(plan)} {said}", highlight=False, soft_wrap=True)


def _starts(plan: Plan) -> str:
    """What the flags are for."""
    if plan.layout.parts == 1:
        return "mlx_hybridcache.server"
    return "mlx.launch --hostfile HOSTS -- python -m mlx_hybridcache.server --pipeline"


def _table(plan: Plan, where: str) -> Table:
    from rich.table import Table

    from ..planning.advice import SEVERAL

    table = Table(
        title=f"{plan.model.name} ({plan.model.family})\nprompts of {plan.context:,} tokens, {where}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("")
    for name in ("one running", f"{SEVERAL} running"):
        table.add_column(name, justify="right")
    loads = [plan.occupancy(count) for count in (1, SEVERAL)]
    weights = plan.model.weights_bytes
    rows: list[tuple[str, list[int]]] = [
        ("weights", [weights, weights]),
        ("their caches, with room for the replies", [load.live_bytes for load in loads]),
        (
            "more for a moment, while replies join a batch",
            [load.joined_bytes - load.live_bytes for load in loads],
        ),
        (
            f"what they leave stored, with {plan.checkpoints} checkpoints each",
            [load.stored_bytes for load in loads],
        ),
        (PEAK, [weights + load.peak_bytes for load in loads]),
        (
            "without a batch, with one checkpoint each",
            [weights + load.needed_bytes for load in loads],
        ),
    ]
    for name, sizes in rows:
        table.add_row(name, *map(format_bytes, sizes), style="bold" if name == PEAK else None)
    return table


def _facts(plan: Plan) -> list[str]:
    some = plan.conversations(plan.conversation_bytes)
    most = plan.conversations(plan.least_conversation_bytes)
    token, checkpoint = plan.layout.stored_row_bytes, plan.layout.stored_snapshot_bytes
    weights, budget = plan.model.weights_bytes, plan.room.budget_bytes
    restores = (
        f"a checkpoint {format_bytes(checkpoint)}" if checkpoint else "and needs no checkpoint"
    )
    stored = (
        f"Stored beside one running request, conversations of that length: {some:,} with every "
        f"checkpoint, {most:,} with fewer."
    )
    quantized = []
    if (kv := plan.layout.precision) is not None:
        said = (
            f"Keys and values of {len(plan.layout.quantized)} layers have {kv.bits} bits behind "
            f"{kv.start:,} tokens; replies are decoded one by one."
        )
        quantized = [said]
    return [
        f"A {'stored ' * bool(plan.layout.storing)}token weighs {format_bytes(token)}, {restores}.",
        *quantized,
        f"Budget for store and running requests: {format_bytes(budget)}.",
        f"Weights and budget together: {format_bytes(weights + budget)}, never more.",
        stored,
        f"The longest prompt that fits: {plan.longest_context:,} tokens.",
    ]
