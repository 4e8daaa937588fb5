"""The Gated-DeltaNet kernel for CUDA beside mlx-lm's loop over tokens: the error, the bits, the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import mlx.core as mx
from mlx_lm.models import qwen3_next
from mlx_lm.models.gated_delta import gated_delta_ops

from mlx_hybridcache.caches import gated_delta
from mlx_hybridcache.caches.layout import Layout, fresh_caches
from mlx_hybridcache.models import has_cuda

from .proofs import Found

HEADS = ((32, 2, 2), (64, 2, 6), (128, 16, 32))
"""Width of a head, heads of keys, heads of values: the bundled model, an odd grouping, Qwen3-Next."""

CUTS = (0, 1, 64, 65, 150)
LAYERS, TOKENS = 24, 2048
PAIRS = 3
DTYPES = (mx.float32, mx.bfloat16)


def recurrence() -> Found:
    """Nothing where no device of CUDA's computes."""
    if not has_cuda():
        yield "kernel", {"skipped": "no GPU of CUDA's computes here; mlx-lm's own scan runs"}
        return
    for width, key_heads, heads in HEADS:
        for dtype in DTYPES:
            for masked in (False, True):
                inputs = _inputs(3 if masked else 1, CUTS[-1], key_heads, heads, width, dtype)
                name = f"width {width}, heads {key_heads}/{heads}, {str(dtype).split('.')[-1]}"
                yield name + ", batch of 3, masked" * masked, _against_the_loop(inputs, masked)
    yield f"{TOKENS} tokens, {LAYERS} layers, the recurrence alone", _timed(_alone())
    yield f"{TOKENS} tokens, {LAYERS} layers, a whole prefill", _timed(_prefill())


def _inputs(
    batch: int, tokens: int, key_heads: int, heads: int, width: int, dtype: mx.Dtype
) -> list[mx.array]:
    """q, k, v, g, beta and a state, of the sizes that a layer hands over."""
    mx.random.seed(tokens + width)

    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape)

    def unit(*shape: int) -> mx.array:
        x = normal(*shape)
        return x / mx.linalg.norm(x, axis=-1, keepdims=True)

    q, k = (unit(batch, tokens, key_heads, width) for _ in range(2))
    v, state = normal(batch, tokens, heads, width), 0.1 * normal(batch, heads, width, width)
    g, beta = (mx.sigmoid(normal(batch, tokens, heads) + shift) for shift in (3, 0))
    q, k, v, beta = ((width**-0.5 * q).astype(dtype), *(x.astype(dtype) for x in (k, v, beta)))
    return [q, k, v, g, beta, state]


def _against_the_loop(inputs: list[mx.array], masked: bool) -> dict[str, Any]:
    q, k, v, g, beta, state = inputs
    batch, tokens = q.shape[:2]
    mask = mx.random.uniform(shape=(batch, tokens)) > 0.2 if masked else None
    read = mx.ones((batch, tokens)) if mask is None else mask
    wanted, wanted_state = gated_delta_ops(q, k, v, g, beta, state, mask)
    found, found_state = gated_delta.recurrence(q, k, v, g, beta, state, mask)
    pieces, states = [], [state]
    for start, end in pairwise(CUTS):
        part = None if mask is None else mask[:, start:end]
        some = [x[:, start:end] for x in (q, k, v, g, beta)]
        y, last = gated_delta.recurrence(*some, states[-1], part)  # type: ignore[call-arg]
        pieces.append(y)
        states.append(last)
    equal = mx.array_equal(mx.concatenate(pieces, axis=1), found).item()
    equal = equal and mx.array_equal(states[-1], found_state).item()
    error = mx.abs(wanted.astype(mx.float32) - found.astype(mx.float32)) * read[..., None, None]
    return {
        "largest_output": float(mx.abs(wanted).max()),
        "error_of_outputs": float(error.max()),
        "error_of_states": float(mx.abs(wanted_state - found_state).max()),
        "pieces_equal_whole": bool(equal),
        "holds": bool(equal),
    }


Ways = tuple[Callable[[], None], Callable[[], None]]


def _alone() -> Ways:
    q, k, v, g, beta, state = _inputs(1, TOKENS, 16, 32, 128, mx.bfloat16)
    mx.eval(q, k, v, g, beta, state)

    def through(scan: Callable[..., Any]) -> Callable[[], None]:
        def run() -> None:
            y = v
            for _ in range(LAYERS):
                y, last = scan(q, k, y, g, beta, state)
                mx.eval(y, last)

        return run

    return through(gated_delta_ops), through(gated_delta.recurrence)


def _prefill() -> Ways:
    """A Qwen3-Next of 32 layers, 24 of them recurrent with the 80B model's heads, the rest narrow."""
    model = qwen3_next.Model(qwen3_next.ModelArgs.from_dict(NARROW))
    model.set_dtype(mx.bfloat16)
    model.eval()
    mx.eval(model.parameters())
    ids = mx.random.randint(0, 1000, (1, TOKENS))

    def read() -> None:
        caches = fresh_caches(model)
        mx.eval(model(ids, cache=caches), [cache.state for cache in caches])

    def hooked() -> None:
        layout = Layout.of(model)
        try:
            read()
        finally:
            layout.release()

    return read, hooked


def _timed(ways: Ways) -> dict[str, Any]:
    """Seconds of the loop and of the kernel, in turns, and the ratios of the pairs."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for way in ways:
        way()
    for which in _in_turns(PAIRS):
        start = time.perf_counter()
        ways[which]()
        seconds[which].append(time.perf_counter() - start)
    ratios = sorted(
        loop / kernel for loop, kernel in zip(seconds[False], seconds[True], strict=True)
    )
    return {
        "loop_seconds": seconds[False],
        "kernel_seconds": seconds[True],
        "ratio": ratios[len(ratios) // 2],
        "ratios": ratios,
        "holds": ratios[len(ratios) // 2] >= 10,
    }


def _in_turns(pairs: int) -> Iterator[bool]:
    for pair in range(pairs):
        yield from (False, True) if pair % 2 == 0 else (True, False)


NARROW = {
    "model_type": "qwen3_next",
    "hidden_size": 512,
    "num_hidden_layers": 32,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "partial_rotary_factor": 0.25,
    "rope_theta": 1e6,
    "max_position_embeddings": 8192,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": 1024,
    "tie_word_embeddings": True,
}
