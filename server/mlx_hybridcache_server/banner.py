"""What a server says of itself when it starts: a line for each thing that its user may have to know."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_hybridcache import models
from mlx_hybridcache.request.info import CacheInfo
from mlx_hybridcache.sizes import format_bytes

from .generation.models import Loaded, short_name
from .settings import Settings


def banner(settings: Settings, loaded: Loaded, address: str) -> list[str]:
    """The lines, in the order in which one asks. `address` is where the server listens."""
    info = loaded.cache.info
    return [
        f"Model: {_model(loaded)}.",
        f"Context: {_context(settings, loaded)}.",
        f"Memory: {_memory(settings, loaded)}.",
        f"Cache: {_cache(settings, info)}.",
        *_smaller(info),
        f"Cache directory: {_directory(settings, loaded)}.",
        *_idle(settings),
        f"Batches: {_batches(info)}.",
        *_drafts(settings),
        f"API key: {_key(settings)}.",
        f"Page: {address}/ shows what the cache does.",
    ]


def _idle(settings: Settings) -> list[str]:
    if settings.idle_unload is None:
        return []
    seconds = f"{settings.idle_unload:g} s"
    return [f"Idle: let go of after {seconds} without a request; what is cached stays on disk."]


def _model(loaded: Loaded) -> str:
    model = loaded.cache.info.model
    family = getattr(model, "model_type", None) or type(model).__module__.rpartition(".")[2]
    name = loaded.id if loaded.id == loaded.source else f"{loaded.id} in {loaded.source}"
    size = format_bytes(models.parameter_bytes(model))
    return f"{name} ({family}), {quantization(model)}, {size}"


def quantization(model: Any) -> str:
    """`4-bit weights`, `4- and 8-bit weights`, or what they are kept in: `bfloat16 weights`."""
    bits = sorted({module.bits for module in model.modules() if hasattr(module, "bits")})
    if bits:
        return " and ".join([*(f"{each}-" for each in bits[:-1]), f"{bits[-1]}-bit weights"])
    leaves: Any = tree_flatten(model.parameters())
    arrays = [each for _, each in leaves if mx.issubdtype(each.dtype, mx.floating)]
    largest = max(arrays, key=lambda array: array.nbytes)
    return f"{str(largest.dtype).removeprefix('mlx.core.')} weights"


def _context(settings: Settings, loaded: Loaded) -> str:
    room = loaded.renderer.room
    is_set = settings.context_length is not None
    limits = {
        "by --context-length" if is_set else "by its configuration": room.context,
        "by --max-prompt-tokens": room.most,
        "by the memory budget": room.budget,
    }
    known = {why: tokens for why, tokens in limits.items() if tokens is not None}
    if not known:
        return "no limit is known"
    first = min(known, key=lambda why: known[why])
    others = [f"{tokens:,} {why}" for why, tokens in known.items() if why != first]
    beside = f" ({', '.join(others)})" if others else ""
    return f"prompts of up to {known[first]:,} tokens, {first}{beside}"


def _memory(settings: Settings, loaded: Loaded) -> str:
    info = loaded.cache.info
    if settings.memory_budget:
        why = "as --prompt-cache-bytes says"
    elif models.has_metal():
        working_set = format_bytes(models.metal_working_set())
        why = f"nine tenths of what the weights leave of the {working_set} that macOS gives the GPU"
    else:
        why = "a quarter of what was free"
    reserve = info.reserve_bytes
    left = f"{format_bytes(reserve)} of the system's stay free" if reserve else "none is left free"
    budget = format_bytes(info.budget_bytes)
    return f"{budget} for the cache and running requests, {why}; {left} (--memory-reserve)"


def _cache(settings: Settings, info: CacheInfo) -> str:
    if info.unsupported:
        kinds = ", ".join(info.unsupported)
        return f"none, as {kinds} of this model cannot be stored: every prompt is read as a whole"
    if not settings.uses_cache:
        return "off with --prompt-cache-size 0 or no memory: every prompt is read as a whole"
    token = f"a token weighs {format_bytes(info.row_bytes)}"
    if not info.needs_checkpoints:
        told = f"every prompt is restored at any token; {token}"
    else:
        size = format_bytes(info.checkpoint_bytes)
        told = f"{info.checkpoint_layers} of {info.layers} layers restore at checkpoints only; {token}, a checkpoint {size}"
    if info.slicing_limit is not None:
        told += f"; beyond {info.slicing_limit:,} tokens only what was read in the same slices is shared"
    return told


def _smaller(info: CacheInfo) -> list[str]:
    """What a smaller store saves, and what that costs on this model."""
    if info.store_error is None:
        return []
    sizes = ", ".join(
        f"a {what} weighs {format_bytes(small)} instead of {format_bytes(full)}"
        for what, small, full in (
            ("stored token", info.stored_row_bytes, info.row_bytes),
            ("stored checkpoint", info.stored_checkpoint_bytes, info.checkpoint_bytes),
        )
        if small != full
    )
    told = sizes or "this model has nothing to make small"
    return [f"Smaller store: {told}. Measured on this model: {info.store_error.sentence}."]


def _directory(settings: Settings, loaded: Loaded) -> str:
    stats = loaded.cache.disk_stats()
    if stats is None:
        return "none; with --cache-dir the cache outlives this process"
    most, held = format_bytes(stats.budget_bytes), format_bytes(stats.held_bytes)
    reads = "" if stats.is_writer else "; another process writes there, this one reads"
    return f"{settings.cache_dir}, {held} of {most} used{reads}"


def _batches(info: CacheInfo) -> str:
    """Why replies share no forwards, in the order in which that is decided."""
    if info.batches:
        return "replies that are written at once share each forward"
    if info.exact:
        why = "with --exact"
    elif info.unsupported or not info.merges:
        why = "as caches of this model's kinds cannot be merged without changing a reply"
    elif info.slicing_limit is not None:
        why = "as what this model computes depends on how tokens are put together"
    else:
        why = "as two at once differ from one alone in this model"
    return f"replies are written one by one, {why}"


def _drafts(settings: Settings) -> list[str]:
    """What drafts a reply that is written alone."""
    by = ["what is stored"] if settings.draft_from_cache else []
    if settings.draft_model is not None:
        name = short_name(settings.draft_model)
        by.append(f"{name}, up to {settings.num_draft_tokens} tokens at a time")
    if settings.draft_mtp:
        by.append(f"the model's own head, up to {settings.num_draft_tokens} tokens at a time")
    return [f"Drafts: by {', then by '.join(by)}."] if by else []


def _key(settings: Settings) -> str:
    if settings.api_key is not None:
        return "needed; clients send it as bearer token"
    return f"none; whoever reaches {settings.host} may ask"
