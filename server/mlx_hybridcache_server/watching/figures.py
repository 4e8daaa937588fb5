"""What is told of a server at a moment, from what the worker published: for `/v1/cache` and the page."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..generation.serving import Serving


def figures(serving: Serving) -> dict[str, Any]:
    """What the cache holds, as the last request left it, and what it gave since the start."""
    grammars = serving.loaded.constraints.compiled
    encoder = serving.loaded.cache.encoder
    found, disk = serving.loaded.cache.summary, serving.loaded.cache.disk_summary
    return {
        "object": "cache",
        "model": serving.loaded.id,
        "enabled": serving.settings.uses_cache,
        "held_bytes": found.held_bytes,
        **asdict(found),
        "store": _store(serving),
        # What a request gets that says nothing of it; Messages are marked where this is None.
        "stable_prefix": serving.settings.stable_prefix,
        "canonical_tools": serving.settings.canonical_tools,
        "disk": None if disk is None else asdict(disk),
        # Beside the budget, and bounded by themselves.
        "grammars": {
            "count": len(grammars),
            "bytes": grammars.nbytes,
            "most_bytes": grammars.most_bytes,
        },
        "tokenizing": {
            "whole": encoder.whole,
            "texts": len(encoder.remembered),
            "bytes": encoder.remembered.nbytes,
            "most_bytes": encoder.remembered.most_bytes,
        },
        "ranks": [asdict(each) for each in serving.loaded.cache.ranks],
        "requests": asdict(serving.metrics.totals),
    }


def _store(serving: Serving) -> dict[str, Any] | None:
    """What a smaller store keeps of numbers, and what that costs on this model; None where it keeps all."""
    info = serving.loaded.cache.info
    if info.store_error is None:
        return None
    return {
        "kv_bits": serving.settings.store_kv,
        "state": serving.settings.store_state,
        "token_bytes": info.stored_row_bytes,
        "token_bytes_full": info.row_bytes,
        "checkpoint_bytes": info.stored_checkpoint_bytes,
        "checkpoint_bytes_full": info.checkpoint_bytes,
        "error": asdict(info.store_error),
        "told": info.store_error.sentence,
    }


def running(serving: Serving) -> list[dict[str, Any]]:
    """The requests that wait, are read or are written at this moment, oldest first."""
    return [run.progress() for run in serving.runs]
