"""The command `mlx-hybridcache plan`: what a model needs for long prompts, before it is downloaded or loaded."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import SettingError
from ..flags import check_can_be_written, tokens
from ..planning.plan import (
    MOST_RUNNING,
    Load,
    Plan,
    make,
    room_here,
    room_on_a_mac,
)
from ..planning.unloaded_model import describe
from ..sizes import format_bytes, parse_bytes

READING_AT_ONCE = 8
"""Prompts that the server reads at once by default."""

SEVERAL = 4
PEAK = "peak, where nothing has to go"

NEARLY = 1.1
"""Weights that exceed the working set by more are beyond what a setting can mend."""

GIB = 2**30
MIB = 2**20


def main(argv: Sequence[str], prog: str = "mlx-hybridcache plan") -> int:
    """Print a plan. 0: one request of that length fits; 1: it does not.

    Raises `ModelError` for a model that cannot be read, `SettingError` for a size that means nothing.
    """
    options = _parser(prog).parse_args(argv)
    check_can_be_written("--json", options.json)
    model = describe(options.model)
    working_set = (
        None if options.working_set is None else _named("--working-set", options.working_set)
    )
    if options.memory is not None:
        room = room_on_a_mac(model.weights_bytes, _named("--memory", options.memory), working_set)
    elif working_set is not None:
        raise SettingError("--working-set is that of a Mac; name its --memory, too.")
    else:
        room = room_here(model.weights_bytes)
    plan = make(
        model,
        room,
        context=options.context,
        max_tokens=options.max_tokens,
        step=options.prefill_step_size,
        every=options.checkpoint_every_n_tokens,
    )
    show(Console() if Console().is_terminal else Console(width=100), plan, options.memory)
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(plan), indent=2) + "\n", encoding="utf-8")
    return 0 if plan.fits else 1


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
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
    add("--working-set", help="what macOS recommends for its GPU (default: an assumption, printed)")
    add("--prefill-step-size", type=tokens(), default=2048, help="as the server's (2048)")
    add("--checkpoint-every-n-tokens", type=tokens(), default=2048, help="as the server's (2048)")
    add("--json", type=Path, metavar="FILE", help="write the plan here too, in bytes and tokens")
    return parser


def as_sold(size: str) -> int:
    """Bytes of a memory size as it is printed on the box, where a GB has 2**30 bytes."""
    parse_bytes(size)
    found = re.fullmatch(r"(.*[kmgt])b?", size.strip().lower())
    return parse_bytes(size if found is None else f"{found[1]}ib")


def _named(flag: str, size: str) -> int:
    try:
        return as_sold(size)
    except SettingError as error:
        raise SettingError(f"{flag} {error}") from error


def flags(plan: Plan) -> list[str]:
    """The server's arguments for this plan; none when it does not fit."""
    if not plan.fits:
        return []
    found = ["--model", plan.model.name, "--prompt-cache-bytes", _size(plan.room.budget_bytes)]
    if plan.longest_context < (plan.model.longest_context or plan.longest_context + 1):
        found += ["--max-prompt-tokens", str(plan.longest_context)]
    if plan.at_once < MOST_RUNNING:
        found += ["--decode-concurrency", str(plan.at_once)]
    if plan.at_once < READING_AT_ONCE:
        found += ["--prompt-concurrency", str(plan.at_once)]
    return [*found, "--cache-dir", "~/.cache/mlx-hybridcache"]


def _size(nbytes: int) -> str:
    """Rounded down, in a unit that the server reads."""
    return f"{nbytes * 10 // GIB / 10}GiB" if nbytes >= GIB else f"{nbytes // MIB}MiB"


def advice(plan: Plan) -> list[str]:
    """What does not fit, and what to do about it."""
    weights, working_set = plan.model.weights_bytes, plan.room.working_set_bytes
    said = []
    if working_set is not None and weights >= working_set:
        said.append(
            f"The weights alone ({format_bytes(weights)}) do not fit into the "
            f"{format_bytes(working_set)} that macOS gives the GPU. Take a smaller quantization, or a "
            "larger machine."
        )
    elif not plan.fits:
        longest = plan.longest_context
        shorter = f"Up to {longest:,} tokens fit: use a shorter --context, " if longest else "Take "
        said.append(
            f"One request of {plan.context:,} tokens needs {format_bytes(plan.load(1).needed_bytes)} "
            f"beside the weights, of {format_bytes(plan.room.budget_bytes)}. "
            f"{shorter}a smaller quantization, or more memory."
        )
    elif plan.at_once < SEVERAL:
        said.append(
            f"{SEVERAL} requests of that length do not fit at once, {plan.at_once} "
            f"{'does' if plan.at_once == 1 else 'do'}: the flags let the others wait. Where prompts "
            "are shorter, leave the two flags for concurrency out."
        )
    elif plan.load(SEVERAL).peak_bytes > plan.room.budget_bytes:
        said.append(
            f"{SEVERAL} requests of that length fit at once, but not with all their checkpoints and a "
            "batch: the least useful checkpoints go, and replies are written in turns."
        )
    if plan.fits and plan.room.budget_bytes < plan.running_bytes + plan.conversation_bytes:
        said.append(
            f"A conversation keeps fewer than its {plan.checkpoints} checkpoints; those near its end "
            "stay longest."
        )
    if working_set is not None and plan.at_once < SEVERAL and weights < NEARLY * working_set:
        said.append(
            "macOS gives the GPU more after `sudo sysctl iogpu.wired_limit_mb=...` (until the next "
            "start; leave 8 GiB or more to the system); plan for it with --working-set."
        )
    limit = plan.model.longest_context
    if limit is not None and plan.context > limit:
        said.append(
            f"The model's configuration names a longest context of {limit:,} tokens, which "
            f"{plan.context:,} exceeds."
        )
    return said


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain values, in bytes and tokens."""
    return {
        "model": plan.model.name,
        "family": plan.model.family,
        "context_tokens": plan.context,
        "weights_bytes": plan.model.weights_bytes,
        "weights_from": plan.model.weights_from,
        "token_bytes": plan.layout.row_bytes,
        "checkpoint_bytes": plan.layout.snapshot_bytes,
        "checkpoints": plan.checkpoints,
        "working_set_bytes": plan.room.working_set_bytes,
        "budget_bytes": plan.room.budget_bytes,
        "running": [_load_json(plan, plan.load(count)) for count in (1, SEVERAL)],
        "conversation_bytes": plan.conversation_bytes,
        "least_conversation_bytes": plan.least_conversation_bytes,
        "conversations": plan.conversations(plan.conversation_bytes),
        "most_conversations": plan.conversations(plan.least_conversation_bytes),
        "at_once": plan.at_once,
        "longest_context_tokens": plan.longest_context,
        "fits": plan.fits,
        "flags": flags(plan),
        "advice": advice(plan),
        "assumptions": assumptions(plan),
    }


def _load_json(plan: Plan, load: Load) -> dict[str, int]:
    return {
        "requests": load.requests,
        "live_bytes": load.live_bytes,
        "joined_bytes": load.joined_bytes,
        "stored_bytes": load.stored_bytes,
        "needed_bytes": load.needed_bytes,
        "peak_bytes": plan.model.weights_bytes + load.peak_bytes,
    }


def assumptions(plan: Plan) -> list[str]:
    """What the figures rest on."""
    said = [f"Weights: by {plan.model.weights_from}.", *plan.model.notes]
    if plan.room.working_set_bytes is not None:
        said.append(
            f"The GPU gets {format_bytes(plan.room.working_set_bytes)} ({plan.room.source}). Nine "
            "tenths of what that leaves beside the weights are the budget; the last tenth is for "
            "what a forward computes with, which is not in these figures."
        )
    else:
        said.append(f"Budget: {plan.room.source}.")
    return said


def show(console: Console, plan: Plan, memory: str | None) -> None:
    """Print it."""
    where = "this machine" if memory is None else f"a Mac with {memory}"
    table = Table(
        title=f"{plan.model.name} ({plan.model.family})\nprompts of {plan.context:,} tokens, {where}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("")
    for name in ("one running", f"{SEVERAL} running"):
        table.add_column(name, justify="right")
    loads = [plan.load(count) for count in (1, SEVERAL)]
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
    console.print(table)
    some = plan.conversations(plan.conversation_bytes)
    most = plan.conversations(plan.least_conversation_bytes)
    token, checkpoint = plan.layout.row_bytes, plan.layout.snapshot_bytes
    budget = plan.room.budget_bytes
    stored = (
        f"Stored beside one running request, conversations of that length: {some:,} with every "
        f"checkpoint, {most:,} with fewer."
    )
    restores = (
        f"a checkpoint {format_bytes(checkpoint)}" if checkpoint else "and needs no checkpoint"
    )
    facts = [
        f"A token weighs {format_bytes(token)}, {restores}.",
        f"Budget for store and running requests: {format_bytes(budget)}.",
        f"Weights and budget together: {format_bytes(weights + budget)}, never more.",
        stored,
        f"The longest prompt that fits: {plan.longest_context:,} tokens.",
    ]
    for line in [*facts, *assumptions(plan)]:
        console.print(line, highlight=False, soft_wrap=True)
    for line in advice(plan):
        console.print(f"! {line}", highlight=False, soft_wrap=True, markup=False)
    if plan.fits:
        said = " ".join(
            word if word.startswith("~/") else shlex.quote(word) for word in flags(plan)
        )
        console.print(f"\nmlx_hybridcache.server {said}", highlight=False, soft_wrap=True)
