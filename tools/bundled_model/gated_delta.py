"""The gated delta rule in chunks, for training.

mlx-lm's own form loops over tokens, which is right for reading a prompt with the same bits however
it is split, and too slow to train with on a CPU. Here a chunk of tokens becomes a few matrix
products (the WY form of Yang et al. 2024, arXiv 2406.06484, with the decay of Gated DeltaNet,
arXiv 2412.06464); only the chunks follow one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx
from mlx_lm.models import qwen3_next
from mlx_lm.models.gated_delta import compute_g

from .fast_math import silu

CHUNK = 32  # tokens; a power of two, for the inverse below


def unit_lower_inverse(strict: mx.array) -> mx.array:
    """Inverse of `I + strict` for strictly lower triangular matrices (..., C, C), C = 2^n.

    `strict` is nilpotent, so the Neumann series ends and factors into
    (I - A)(I + A^2)(I + A^4)...: log2(C) products, each differentiable. Forward substitution
    would need C dependent steps.
    """
    size = strict.shape[-1]
    identity = mx.eye(size, dtype=strict.dtype)
    inverse, power, reach = identity - strict, strict, 2
    while reach < size:
        power = power @ power
        inverse = inverse + inverse @ power
        reach *= 2
    return inverse


def chunked_gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    chunk: int = CHUNK,
) -> tuple[mx.array, mx.array]:
    """The same function as `mlx_lm.models.gated_delta.gated_delta_ops` without a mask.

    Shapes, all float32: q and k (B, T, Hk, Dk), scaled and normalized by the caller; v (B, T, Hv,
    Dv); g, the decay in (0, 1], and beta (B, T, Hv); state (B, Hv, Dv, Dk) or None for zeros. Any
    T: the last chunk is filled up with tokens that change nothing (decay 1, beta 0). Returns the
    outputs (B, T, Hv, Dv) and the state after the last token.
    """
    batch, length, heads, value_dim = v.shape
    key_dim, repeats = k.shape[-1], heads // k.shape[2]
    if repeats > 1:
        q, k = mx.repeat(q, repeats, axis=2), mx.repeat(k, repeats, axis=2)
    padding = -length % chunk
    count = (length + padding) // chunk

    def chunks(x: mx.array) -> mx.array:  # (B, T, H, ...) -> (B, H, chunks, C, ...)
        x = mx.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return mx.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 3, 1)

    q, k, v, beta = chunks(q), chunks(k), chunks(v), chunks(beta)[..., None]
    decay = mx.cumsum(chunks(mx.log(g)), axis=-1)  # of the chunk's tokens up to each one
    row, column = mx.arange(chunk)[:, None], mx.arange(chunk)[None, :]
    between = decay[..., :, None] - decay[..., None, :]
    # Masked before `exp`: above the diagonal it would overflow and poison the gradients.
    fade = mx.exp(mx.where(row >= column, between, -mx.inf))  # (B, H, chunks, C, C)

    transposed = k.swapaxes(-1, -2)
    strict = mx.where(row > column, beta * (k @ transposed) * fade, 0.0)
    inverse = unit_lower_inverse(strict)
    since_start = mx.exp(decay)[..., None]
    written = inverse @ (beta * v)  # what the chunk would write into an empty state
    erased = inverse @ (beta * since_start * k)  # how it reads the state it starts from
    scores = (q @ transposed) * fade
    reading = q * since_start
    until_end = mx.exp(decay[..., -1:] - decay)[..., None] * k
    whole = mx.exp(decay[..., -1])[..., None, None]

    memory = mx.zeros((batch, heads, key_dim, value_dim)) if state is None else state.swapaxes(2, 3)
    outputs = []
    for i in range(count):
        delta = written[:, :, i] - erased[:, :, i] @ memory
        outputs.append(reading[:, :, i] @ memory + scores[:, :, i] @ delta)
        memory = whole[:, :, i] * memory + until_end[:, :, i].swapaxes(-1, -2) @ delta
    out = mx.stack(outputs, axis=2).reshape(batch, heads, count * chunk, value_dim)
    return mx.moveaxis(out, 1, 2)[:, :length], memory.swapaxes(2, 3)


def _update(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,  # mlx-lm's name
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    **_: Any,
) -> tuple[mx.array, mx.array]:
    if mask is not None:
        raise ValueError("the chunked form takes no padding mask: train on rows of equal length")
    return chunked_gated_delta(q, k, v, compute_g(A_log, a, dt_bias), mx.sigmoid(b), state)


class Balance:
    """Collects each router's load-balancing loss during one forward."""

    def __init__(self) -> None:
        self.terms: list[mx.array] = []

    def dense_moe(self, block: Any, x: Any) -> mx.array:
        """A sparse block's output computed through all its experts: (B, T, D) to (B, T, D).

        With a few small experts one wide product is faster than gathering, and it is exact:
        the weight of an expert that is not chosen is zero. The loss is that of the Switch
        Transformer (Fedus et al. 2021, arXiv 2101.03961): 1 when the load is even.
        """
        experts, dim = block.num_experts, x.shape[-1]
        gates = mx.softmax(block.gate(x), axis=-1, precise=True)
        limit = mx.sort(mx.stop_gradient(gates), axis=-1)[..., -block.top_k, None]
        chosen = (gates >= limit).astype(x.dtype)
        scores = gates * chosen
        if block.norm_topk_prob:
            scores = scores / scores.sum(axis=-1, keepdims=True)
        load = chosen.mean(axis=(0, 1)) / block.top_k
        self.terms.append(experts * (mx.stop_gradient(load) * gates.mean(axis=(0, 1))).sum())

        switch = block.switch_mlp
        inner = silu(x @ switch.gate_proj.weight.reshape(-1, dim).T)
        inner = inner * (x @ switch.up_proj.weight.reshape(-1, dim).T)
        inner = inner.reshape(*x.shape[:-1], experts, -1) * scores[..., None]
        down = switch.down_proj.weight.swapaxes(1, 2).reshape(-1, dim)
        shared = mx.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
        out: mx.array = inner.reshape(*x.shape[:-1], -1) @ down + shared
        return out


@contextmanager
def training_forms() -> Iterator[Balance]:
    """Qwen3-Next computed in these forms inside the block, and as mlx-lm has it afterwards."""
    balance = Balance()

    def dense(block: Any, x: mx.array) -> mx.array:
        return balance.dense_moe(block, x)

    with (
        patch.object(qwen3_next, "gated_delta_update", _update),
        patch.object(qwen3_next.Qwen3NextSparseMoeBlock, "__call__", dense),
    ):
        yield balance
