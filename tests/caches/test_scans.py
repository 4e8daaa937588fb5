"""The tests' scans have the bits of mlx-lm's loops, for all that the tests' models may give them."""

import platform

import mlx.core as mx
import numpy as np
import pytest
import scans
import tiny
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import gated_delta, jamba

TOKENS = 33


pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" and not scans.same_bits(), reason="mlx-lm's own loops run here"
)


def bits(*arrays):
    """Each array's type, shape and bytes."""
    return [
        (x.dtype, x.shape, np.array(x.astype(mx.float32)).tobytes())
        for x in map(mx.contiguous, arrays)
    ]


def arguments(batch, key_heads, heads, width, values, dtype):
    """q, k, v, g, beta and a state."""
    mx.random.seed(width)
    q, k = (0.3 * mx.random.normal((batch, TOKENS, key_heads, width)) for _ in range(2))
    v = mx.random.normal((batch, TOKENS, heads, values))
    g, beta = (mx.random.uniform(shape=(batch, TOKENS, heads)) for _ in range(2))
    state = mx.random.normal((batch, heads, values, width))
    return [*(x.astype(dtype) for x in (q, k, v, g, beta)), state]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize(
    "sizes", [(1, 2, 4, 16, 16), (1, 2, 2, 32, 32), (3, 1, 2, 48, 8), (2, 2, 4, 64, 24)]
)
@pytest.mark.parametrize("starts_empty", [False, True])
def test_a_gated_delta_scan_has_the_loops_bits(sizes, dtype, starts_empty):
    """Outputs and state: two value heads to a key head, several prompts at once, odd widths."""
    *given, state = arguments(*sizes, dtype)
    given.append(None if starts_empty else state)
    found = scans.gated_delta_ops(*given)
    assert bits(*found) == bits(*scans.their_gated_delta_ops(*given))


@pytest.mark.parametrize("cut", [1, scans.FEW, 20])
def test_a_cut_does_not_show(cut):
    """Two parts, of which one may be short enough for mlx-lm's loop, give what the whole gives."""
    *given, state = arguments(1, 2, 4, 16, 16, mx.float32)
    first, middle = scans.gated_delta_ops(*(x[:, :cut] for x in given), state)
    second, last = scans.gated_delta_ops(*(x[:, cut:] for x in given), middle)
    whole = scans.gated_delta_ops(*given, state)
    assert bits(mx.concatenate([first, second], axis=1), last) == bits(*whole)


def test_a_masked_scan_is_mlx_lms_own(monkeypatch):
    """Padded batches take the loop, and so does a gate for each key."""
    *given, state = arguments(2, 2, 4, 16, 16, mx.float32)
    monkeypatch.setattr(scans, "_read", None)
    scans.gated_delta_ops(*given, state, mx.ones((2, TOKENS)) > 0)
    given[3] = mx.broadcast_to(given[3][..., None], (*given[3].shape, 16))
    scans.gated_delta_ops(*given, state)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("qwen3_next", mx.float32),
        ("qwen3_5", mx.float32),
        ("qwen3_5", mx.bfloat16),
        ("jamba", mx.float32),
    ],
)
def test_models_read_and_go_on_with_the_same_bits(monkeypatch, name, dtype):
    """Logits of three slices, and all that the caches hold then."""
    model = tiny.fresh(name)
    model.update(tree_map(lambda x: x.astype(dtype), model.parameters()))
    tokens = mx.array([tiny.random_tokens(70, 3)])

    def read():
        caches = tiny.make_prompt_cache(model)
        logits = [model(tokens[:, a:b], cache=caches) for a, b in ((0, 40), (40, 69), (69, 70))]
        states = (x for _, x in tree_flatten([cache.state for cache in caches]))
        return bits(*logits, *(x for x in states if isinstance(x, mx.array)))

    monkeypatch.setattr(gated_delta, "gated_delta_ops", scans.gated_delta_ops)
    monkeypatch.setattr(jamba.JambaMambaMixer, "ssm_step", scans.ssm_step)
    found = read()
    monkeypatch.setattr(gated_delta, "gated_delta_ops", scans.their_gated_delta_ops)
    monkeypatch.setattr(jamba.JambaMambaMixer, "ssm_step", scans.their_ssm_step)
    assert found == read()


def test_a_forward_that_is_traced_takes_the_loop():
    """Shapes are asked for without numbers: `mlx-hybridcache plan` does so."""
    *given, state = arguments(1, 2, 4, 16, 16, mx.float32)
    traced = mx.compile(scans.gated_delta_ops)(*given, state)
    assert [x.shape for x in traced] == [(1, TOKENS, 4, 16), (1, 4, 16, 16)]
