"""What to make of a plan: the server's flags for it, advice, and what its figures rest on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..sizes import format_bytes
from .plan import MOST_RUNNING, Occupancy, Plan

READING_AT_ONCE = 8
"""Prompts that the server reads at once by default."""

SEVERAL = 4
"""Requests at once that a plan tells of beside one."""

NEARLY = 1.1
"""Weights that exceed the working set by more are beyond what a setting can mend."""

GIB = 2**30
MIB = 2**20


def server_flags(plan: Plan) -> list[str]:
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
    storing = plan.layout.storing
    if storing.kv_bits is not None:
        found += ["--store-kv", str(storing.kv_bits)]
    if storing.state_bits is not None:
        found += ["--store-state", f"int{storing.state_bits}"]
    if (kv := plan.layout.precision) is not None:
        found += ["--kv-bits", str(kv.bits), "--kv-group-size", str(kv.group_size)]
        found += ["--quantized-kv-start", str(kv.start)]
    if plan.layout.parts > 1:
        return found
    return [*found, "--cache-dir", "~/.cache/mlx-hybridcache"]


def _size(nbytes: int) -> str:
    """Rounded down, in a unit that the server reads."""
    return f"{nbytes * 10 // GIB / 10}GiB" if nbytes >= GIB else f"{nbytes // MIB}MiB"


def advice(plan: Plan) -> list[str]:
    """What does not fit, and what to do about it."""
    return [*_about_fitting(plan), *_about_checkpoints(plan), *_about_limits(plan)]


def _about_fitting(plan: Plan) -> Iterator[str]:
    """The first that is true of: the weights, one request, several, several with all that they leave."""
    weights, working_set = plan.model.weights_bytes, plan.room.working_set_bytes
    if working_set is not None and weights >= working_set:
        yield (
            f"The weights alone ({format_bytes(weights)}) do not fit into the "
            f"{format_bytes(working_set)} that macOS gives the GPU. Take a smaller quantization, or a "
            "larger machine."
        )
    elif not plan.fits:
        longest = plan.longest_context
        shorter = f"Up to {longest:,} tokens fit: use a shorter --context, " if longest else "Take "
        yield (
            f"One request of {plan.context:,} tokens needs {format_bytes(plan.occupancy(1).needed_bytes)} "
            f"beside the weights, of {format_bytes(plan.room.budget_bytes)}. "
            f"{shorter}a smaller quantization, or more memory."
        )
    elif plan.at_once < SEVERAL:
        yield (
            f"{SEVERAL} requests of that length do not fit at once, {plan.at_once} "
            f"{'does' if plan.at_once == 1 else 'do'}: the flags let the others wait. Where prompts "
            "are shorter, leave the two flags for concurrency out."
        )
    elif plan.occupancy(SEVERAL).peak_bytes > plan.room.budget_bytes:
        yield (
            f"{SEVERAL} requests of that length fit at once, but not with all their checkpoints and a "
            "batch: the least useful checkpoints go, and replies are written in turns."
        )


def _about_checkpoints(plan: Plan) -> Iterator[str]:
    if plan.fits and plan.room.budget_bytes < plan.running_bytes + plan.conversation_bytes:
        yield (
            f"A conversation keeps fewer than its {plan.checkpoints} checkpoints; those near its end "
            "stay longest."
        )


def _about_limits(plan: Plan) -> Iterator[str]:
    """Those that the system and the model's configuration set."""
    weights, working_set = plan.model.weights_bytes, plan.room.working_set_bytes
    if working_set is not None and plan.at_once < SEVERAL and weights < NEARLY * working_set:
        yield (
            "macOS gives the GPU more after `sudo sysctl iogpu.wired_limit_mb=...` (until the next "
            "start; leave 8 GiB or more to the system); plan for it with --working-set."
        )
    limit = plan.model.longest_context
    if limit is not None and plan.context > limit:
        yield (
            f"The model's configuration names a longest context of {limit:,} tokens, which "
            f"{plan.context:,} exceeds."
        )


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


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain values, in bytes and tokens."""
    return {
        "model": plan.model.name,
        "family": plan.model.family,
        "context_tokens": plan.context,
        "weights_bytes": plan.model.weights_bytes,
        "weights_from": plan.model.weights_from,
        "ranks": plan.layout.parts,
        "token_bytes": plan.layout.row_bytes,
        "checkpoint_bytes": plan.layout.snapshot_bytes,
        "stored_token_bytes": plan.layout.stored_row_bytes,
        "stored_checkpoint_bytes": plan.layout.stored_snapshot_bytes,
        "checkpoints": plan.checkpoints,
        "working_set_bytes": plan.room.working_set_bytes,
        "budget_bytes": plan.room.budget_bytes,
        "running": [_load_json(plan, plan.occupancy(count)) for count in (1, SEVERAL)],
        "conversation_bytes": plan.conversation_bytes,
        "least_conversation_bytes": plan.least_conversation_bytes,
        "conversations": plan.conversations(plan.conversation_bytes),
        "most_conversations": plan.conversations(plan.least_conversation_bytes),
        "at_once": plan.at_once,
        "longest_context_tokens": plan.longest_context,
        "fits": plan.fits,
        "flags": server_flags(plan),
        "advice": advice(plan),
        "assumptions": assumptions(plan),
    }


def _load_json(plan: Plan, load: Occupancy) -> dict[str, int]:
    return {
        "requests": load.requests,
        "live_bytes": load.live_bytes,
        "joined_bytes": load.joined_bytes,
        "stored_bytes": load.stored_bytes,
        "needed_bytes": load.needed_bytes,
        "peak_bytes": plan.model.weights_bytes + load.peak_bytes,
    }
