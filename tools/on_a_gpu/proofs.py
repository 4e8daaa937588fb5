"""Hot against cold on this device: the bundled model as it can be stored, and a model of each layer kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import tiny

from mlx_hybridcache import models
from mlx_hybridcache.caches.layout import fresh_caches
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.demo.workloads import default_text
from mlx_hybridcache.verify import verify

KINDS = {
    "qwen3_next": "recurrent, captured",
    "jamba": "recurrent, paused",
    "recurrent_gemma": "recurrent beside a window",
    "gemma3_text": "window",
    "gpt_oss": "window with sinks",
    "llama4": "chunked window",
    "qwen3": "rows",
    "deepseek_v3": "latent rows",
}
STORED_AS = {
    "float32": (mx.float32, None),
    "bfloat16": (mx.bfloat16, None),
    "4-bit bfloat16": (mx.bfloat16, 4),
    "4-bit float32": (mx.float32, 4),
}
"""What is not quantized, and the bits of the rest."""

TOKENS, STEP = 900, 128
KIND_TOKENS, KIND_STEP = 330, 64
TWICE = (1, 8, 64, 128, 300)

Found = Iterator[tuple[str, dict[str, Any]]]
"""What a part found, one by one: a name, and plain values."""


def stored_as(how: str) -> tuple[Any, Any]:
    """The bundled model in that form, and its tokenizer."""
    model, tokenizer = models.load(str(BUNDLED_MODEL))
    dtype, bits = STORED_AS[how]
    model.set_dtype(dtype)
    if bits is not None:
        nn.quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    return model, tokenizer


def text_tokens(tokenizer: Any, count: int) -> list[int]:
    """The first tokens of Python's reference."""
    return list(tokenizer.encode(default_text()[: 12 * count], add_special_tokens=False))[:count]


def control(model: Any, ids: list[int]) -> dict[str, Any]:
    """Prompts read twice by plain mlx-lm, in one slice each: `steady` if their logits are numbers and equal.

    Where they are not, nothing can be proven of a cache.
    """
    logits = []
    try:
        for count in (*TWICE, *TWICE):
            read = model(mx.array([ids[:count]]), cache=fresh_caches(model))
            logits.append(np.array(read[0, -1].astype(mx.float32)))
    except RuntimeError as error:
        return {"skipped": f"MLX cannot compute this here: {error}"}
    first, second = np.split(np.stack(logits), 2)
    differing = int((first != second).sum())  # what is no number differs from itself
    return {"logits": first.size, "that_differ": differing, "steady": not differing}


def bundled(how: str) -> Found:
    """`verify` and `verify --exact` of the bundled model."""
    model, tokenizer = stored_as(how)
    ids = text_tokens(tokenizer, TOKENS + TOKENS // 3)
    yield f"bundled, {how}, plain mlx-lm twice", (seen := control(model, ids))
    if seen.get("steady"):
        prompts = [ids[:TOKENS], ids[: 2 * TOKENS // 3] + ids[TOKENS:]]
        yield from _both_modes(f"bundled, {how}", model, prompts, STEP)


def kind(family: str) -> Found:
    """The same of a tiny model whose layers are of one kind."""
    shared = tiny.random_tokens(2 * KIND_TOKENS // 3, 1)
    prompts = [shared + tiny.random_tokens(KIND_TOKENS // 3, seed) for seed in (2, 3)]
    yield from _both_modes(f"{KINDS[family]}: {family}", tiny.build(family), prompts, KIND_STEP)


def _both_modes(name: str, model: Any, prompts: list[list[int]], step: int) -> Found:
    for exact in (False, True):
        proof = verify(model, prompts, step=step, exact=exact)
        others = [point.found.first_differing_token for point in proof.points]
        yield (
            f"{name}, {'exact' if exact else 'default'}",
            {
                "points": len(proof.points),
                "cold_against_cold": proof.probe,
                "allowed": proof.allowed,
                "worst": proof.worst,
                "points_that_differ": sum(point.found.max_abs > 0 for point in proof.points),
                "other_tokens": sum(other is not None for other in others),
                "holds": proof.holds,
            },
        )
