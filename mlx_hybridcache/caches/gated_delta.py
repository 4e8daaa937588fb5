"""The Gated-DeltaNet recurrence on CUDA as one kernel, in token order.

mlx-lm has a kernel for Metal only; elsewhere it loops over tokens, which makes some 49,000 nodes of a
graph out of 2,048 tokens and 24 layers. Here each warp keeps one row of the state in registers and walks
the tokens, so what a token adds depends neither on how many there are nor on where the slice began: a scan
in pieces has the bits of a whole one. Every rounding is spelled out, so that no compiler's choice to fuse
or not changes that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import mlx.core as mx
from mlx_lm.models.gated_delta import gated_delta_ops

from ..models import has_cuda

LOOP = "gated_delta_ops"
"""mlx-lm's loop over tokens, which `gated_delta_update` looks up in its module."""

LANES = 32
ROWS_PER_BLOCK = 4

SOURCE = """
    constexpr int per_lane = Dk / 32;
    const int tokens = q_shape[1];
    const int lane = threadIdx.x;
    const int row = blockIdx.y * blockDim.y + threadIdx.y;
    if (row >= Dv) return;  // whole warps, so the shuffles below stay whole
    const int batch = blockIdx.z / Hv;
    const int head = blockIdx.z % Hv;
    const int key_head = head / (Hv / Hk);

    // q, k: (B, T, Hk, Dk); v, y: (B, T, Hv, Dv); g, beta: (B, T, Hv); states: (B, Hv, Dv, Dk)
    q += ((size_t)batch * tokens * Hk + key_head) * Dk + lane * per_lane;
    k += ((size_t)batch * tokens * Hk + key_head) * Dk + lane * per_lane;
    v += ((size_t)batch * tokens * Hv + head) * Dv + row;
    y += ((size_t)batch * tokens * Hv + head) * Dv + row;
    g += (size_t)batch * tokens * Hv + head;
    beta += (size_t)batch * tokens * Hv + head;
    const size_t own = ((size_t)blockIdx.z * Dv + row) * Dk + lane * per_lane;

    auto sum = [](float x) {
        for (int width = 16; width > 0; width /= 2)
            x = __fadd_rn(x, __shfl_xor_sync(0xffffffff, x, width));
        return x;
    };

    float state[per_lane];
    for (int i = 0; i < per_lane; ++i) state[i] = static_cast<float>(state_in[own + i]);

    for (int t = 0; t < tokens; ++t) {
        float out = 0.0f;
        if (IS_READ) {
            const float decay = static_cast<float>(*g);
            float keys[per_lane];
            float remembered = 0.0f;
            for (int i = 0; i < per_lane; ++i) {
                keys[i] = static_cast<float>(k[i]);
                state[i] = __fmul_rn(state[i], decay);
                remembered = __fmaf_rn(state[i], keys[i], remembered);
            }
            const float error = __fsub_rn(static_cast<float>(*v), sum(remembered));
            const float delta = __fmul_rn(error, static_cast<float>(*beta));
            for (int i = 0; i < per_lane; ++i) {
                state[i] = __fmaf_rn(keys[i], delta, state[i]);
                out = __fmaf_rn(state[i], static_cast<float>(q[i]), out);
            }
            out = sum(out);
        }
        if (lane == 0) *y = static_cast<InT>(out);
        q += Hk * Dk;
        k += Hk * Dk;
        v += Hv * Dv;
        y += Hv * Dv;
        g += Hv;
        beta += Hv;
    }

    for (int i = 0; i < per_lane; ++i) state_out[own + i] = static_cast<StT>(state[i]);
"""

INPUTS = ("q", "k", "v", "g", "beta", "state_in")


@cache
def _kernel(masked: bool) -> Any:
    read = "mask[(size_t)batch * tokens + t]" if masked else "true"
    return mx.fast.cuda_kernel(
        name="gated_delta" + "_masked" * masked,
        input_names=[*INPUTS, *["mask"] * masked],
        output_names=["y", "state_out"],
        source=SOURCE.replace("IS_READ", read),
    )


def fits(k: mx.array, v: mx.array, g: mx.array) -> bool:
    """Whether the kernel knows these shapes: keys in whole warps, one gate for each head."""
    return k.shape[-1] % LANES == 0 and v.shape[2] % k.shape[2] == 0 and g.ndim == 3


def recurrence(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """What `gated_delta_ops` of mlx-lm computes, by one kernel where it fits.

    `q` and `k` are `(B, T, Hk, Dk)`, `v` is `(B, T, Hv, Dv)`, `g` and `beta` `(B, T, Hv)`, `state`
    `(B, Hv, Dv, Dk)`, `mask` `(B, T)`. Gives `y`, `(B, T, Hv, Dv)`, and the state behind the last token.
    """
    if not fits(k, v, g):
        return gated_delta_ops(q, k, v, g, beta, state, mask)
    batch, tokens, key_heads, key_width = k.shape
    heads, width = v.shape[2:]
    y, last = _kernel(mask is not None)(
        inputs=[q, k, v, g, beta, state, *([] if mask is None else [mask])],
        template=[
            ("InT", q.dtype),
            ("StT", state.dtype),
            ("Dk", key_width),
            ("Dv", width),
            ("Hk", key_heads),
            ("Hv", heads),
        ],
        grid=(LANES, -(-width // ROWS_PER_BLOCK) * ROWS_PER_BLOCK, batch * heads),
        threadgroup=(LANES, ROWS_PER_BLOCK, 1),
        output_shapes=[(batch, tokens, heads, width), state.shape],
        output_dtypes=[q.dtype, state.dtype],
    )
    return y, last


def scan_here(update: FunctionType) -> Callable[..., Any]:
    """mlx-lm's `gated_delta_update` as it is best run on the device that computes here."""
    return with_kernel(update) if has_cuda() else update


@cache
def with_kernel(update: FunctionType) -> Callable[..., Any]:
    """mlx-lm's `gated_delta_update`, with its loop over tokens replaced by the kernel."""
    names = {**update.__globals__, LOOP: recurrence}
    own = FunctionType(
        update.__code__, names, update.__name__, update.__defaults__, update.__closure__
    )
    own.__kwdefaults__ = update.__kwdefaults__
    return own
