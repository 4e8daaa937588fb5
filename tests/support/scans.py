"""The recurrences that mlx-lm walks through token by token, with its bits, for a tenth of the time.

On a GPU a kernel runs them. On a CPU each token takes a dozen operations of MLX in each layer, most of what it
costs to read a prompt. NumPy does here what MLX would, number by number and in the same order, so that every
bit of a state and of a reply is that of mlx-lm's own loop; `tests/caches/test_scans.py` shows it. Where the
bits differ, as they may where a compiler fuses an addition with a product, mlx-lm's loops stay.
"""

import functools
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import gated_delta, jamba

FEW = 4
"""Slices of fewer tokens, as in decoding, are left to mlx-lm's loops."""

Array = np.ndarray[Any, np.dtype[np.float32]]
their_gated_delta_ops = gated_delta.gated_delta_ops
their_ssm_step = jamba.JambaMambaMixer.ssm_step


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the models of mlx-lm that are used in this process read prompts so."""
    if same_bits():
        monkeypatch.setattr(gated_delta, "gated_delta_ops", gated_delta_ops)
        monkeypatch.setattr(jamba.JambaMambaMixer, "ssm_step", ssm_step)


@functools.cache
def same_bits() -> bool:
    """Whether this machine's NumPy computes what its MLX does."""
    if mx.default_device() != mx.cpu:
        return False
    q, k, v = (mx.random.normal((1, 9, 2, 16), key=mx.random.key(n)) for n in range(3))
    g, beta = (mx.random.uniform(shape=(1, 9, 2), key=mx.random.key(n)) for n in range(2))
    pairs = zip(
        gated_delta_ops(q, k, v, g, beta), their_gated_delta_ops(q, k, v, g, beta), strict=True
    )
    return all(mx.array_equal(mine, theirs).item() for mine, theirs in pairs)


def gated_delta_ops(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """What mlx-lm's function of this name computes, from the same arguments."""
    batch, tokens, key_heads, width = q.shape
    heads, values = v.shape[-2:]
    if state is None:
        state = mx.zeros((batch, heads, values, width), dtype=mx.float32)
    theirs = functools.partial(their_gated_delta_ops, q, k, v, g, beta, state, mask)
    if tokens < FEW or mask is not None or g.ndim != 3 or state.dtype != mx.float32:
        return theirs()
    # Tokens first, for the loop; then keys, since NumPy adds row to row along the first axis of a state.
    q, k = (mx.repeat(x, heads // key_heads, -2).transpose(1, 3, 0, 2)[..., None] for x in (q, k))
    per_token = (g.swapaxes(0, 1)[..., None], beta.swapaxes(0, 1)[..., None])
    numbers = _numbers(q, k, v.swapaxes(0, 1), *per_token, state.transpose(3, 0, 1, 2))
    if numbers is None:
        return theirs()
    *given, last = numbers
    outputs = _read(*given, last).swapaxes(0, 1)
    # Nothing is left to compute that would keep more bytes than the state has.
    return mx.array(outputs).astype(q.dtype), mx.array(last.transpose(1, 2, 3, 0))


def _read(q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array) -> Array:
    """The outputs; `state` (Dk, B, Hv, Dv) is updated in place."""
    outputs, product = np.empty_like(v), np.empty_like(state)
    for at, output in enumerate(outputs):
        np.multiply(state, g[at], out=state)
        remembered = np.add.reduce(np.multiply(state, k[at], out=product), initial=0.0)
        missing = (v[at] - remembered) * beta[at]
        np.add(state, np.multiply(k[at], missing, out=product), out=state)
        np.add.reduce(np.multiply(state, q[at], out=product), initial=0.0, out=output)
    return outputs


def ssm_step(
    self: jamba.JambaMambaMixer, x: mx.array, A: mx.array, state: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """What the mixer's own method computes, from the same arguments."""
    if x.shape[1] < FEW or x.dtype != mx.float32:
        return their_ssm_step(self, x, A, state)
    rank, size = self.time_step_rank, self.ssm_state_size
    delta, B, C = mx.split(self.x_proj(x), [rank, rank + size], axis=-1)
    delta, B, C = self.dt_layernorm(delta), self.b_layernorm(B), self.c_layernorm(C)
    delta = nn.softplus(self.dt_proj(delta))
    new = mx.expand_dims(delta * x, -1) * mx.expand_dims(B, -2)
    decays = mx.exp(mx.expand_dims(delta, -1) * A)
    given = [new.swapaxes(0, 1), decays.swapaxes(0, 1), *([] if state is None else [state])]
    numbers = _numbers(*given)
    if numbers is None:
        return their_ssm_step(self, x, A, state)
    states, decays, *before = numbers
    if before:
        states[0] += before[0] * decays[0]
    for at in range(1, len(states)):
        states[at] += states[at - 1] * decays[at]
    read = mx.array(states.swapaxes(0, 1))
    y = (read @ mx.expand_dims(C, -1)).squeeze(-1) + self.D * x
    return y, read[:, -1]


def _numbers(*arrays: mx.array) -> list[Array] | None:
    """Copies, in the order of their axes, computed together. None where a forward is traced, not computed."""
    found = [mx.contiguous(x.astype(mx.float32)) for x in arrays]
    try:
        mx.eval(found)
    except ValueError:
        return None
    return [np.array(x) for x in found]
