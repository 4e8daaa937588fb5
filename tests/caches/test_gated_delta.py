"""The Gated-DeltaNet scan on CUDA: when it stands in for mlx-lm's loop, and for what. `tools/on_a_gpu.sh` runs it."""

import inspect

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.models import gated_delta as theirs

from mlx_hybridcache.caches import gated_delta as ours
from mlx_hybridcache.caches.layout import Layout, fresh_caches

TOKENS = mx.array([tiny.random_tokens(40, 3)])
RECURRENT_LAYERS = 2


def arguments(width: int = 32, heads: int = 4, tokens: int = 9, batch: int = 2) -> list[mx.array]:
    """q, k, v, g, beta and a state, of two heads of keys."""
    mx.random.seed(width + heads)
    q, k = (0.3 * mx.random.normal((batch, tokens, 2, width)) for _ in range(2))
    v, state = (
        mx.random.normal((batch, tokens, heads, 8)),
        mx.random.normal((batch, heads, 8, width)),
    )
    g, beta = (mx.random.uniform(shape=(batch, tokens, heads)) for _ in range(2))
    return [q, k, v, g, beta, state]


@pytest.fixture
def on_cuda(monkeypatch):
    """As if CUDA computed; the kernel is mlx-lm's loop, and its calls are noted by their tokens."""
    calls = []

    def loop(q, *rest):
        calls.append(q.shape[1])
        return theirs.gated_delta_ops(q, *rest)

    monkeypatch.setattr(ours, "has_cuda", lambda: True)
    monkeypatch.setattr(ours, "recurrence", loop)
    ours.with_kernel.cache_clear()
    yield calls
    ours.with_kernel.cache_clear()


def test_mlx_lms_scan_has_the_seam_that_is_used():
    """It looks its loop up by a name of its module, and takes the same arguments."""
    assert f"return {ours.LOOP}(q, k, v, g, beta, state, mask)" in inspect.getsource(
        theirs.gated_delta_update
    )
    assert theirs.gated_delta_update.__closure__ is None
    assert list(inspect.signature(theirs.gated_delta_ops).parameters) == list(
        inspect.signature(ours.recurrence).parameters
    )


def test_elsewhere_the_scan_is_mlx_lms_own():
    """The very function, so not a bit can differ from what it gives."""
    if ours.has_cuda():
        pytest.skip("CUDA computes here")
    assert ours.scan_here(theirs.gated_delta_update) is theirs.gated_delta_update


def test_the_scan_with_the_kernel_is_mlx_lms_but_for_its_loop(on_cuda):
    """Gates and keyword arguments are computed as before: the bits are those of the plain scan."""
    q, k, v, a, b, state = arguments()
    rest = [mx.zeros(4), mx.ones(4), state]
    for options in ({}, {"allow_neg_eigval": True}, {"lower_bound": -5.0}):
        plain = theirs.gated_delta_update(q, k, v, a, b, *rest, **options)
        found = ours.scan_here(theirs.gated_delta_update)(q, k, v, a, b, *rest, **options)
        assert all(mx.array_equal(x, y) for x, y in zip(plain, found, strict=True))
    assert on_cuda == [9, 9, 9]


def test_a_hooked_layer_takes_it_with_cuts_and_without(on_cuda):
    """A slice of 40 is one call for each layer, and one for each piece of it where states are captured."""
    model = tiny.fresh("qwen3_next")
    plain = model(TOKENS, cache=fresh_caches(model))
    assert on_cuda == []
    layout = Layout.of(model)
    on_cuda.clear()
    whole = model(TOKENS, cache=fresh_caches(model))
    assert on_cuda == [40] * RECURRENT_LAYERS
    on_cuda.clear()
    with layout.hook.at([7, 30]):
        captured = model(TOKENS, cache=fresh_caches(model))
    assert on_cuda == [7, 23, 10] * RECURRENT_LAYERS
    assert mx.array_equal(plain, whole)
    assert mx.array_equal(plain, captured)
    on_cuda.clear()
    layout.release()
    mx.eval(model(TOKENS, cache=fresh_caches(model)))
    assert on_cuda == []


def test_a_model_that_is_trained_keeps_the_loop(on_cuda):
    """The kernel has no gradient."""
    model = tiny.fresh("qwen3_next")
    layout = Layout.of(model)
    on_cuda.clear()
    model.train()
    mx.eval(model(TOKENS, cache=fresh_caches(model)))
    assert on_cuda == []
    layout.release()


@pytest.mark.parametrize(
    ("width", "heads", "vector_gate", "fits"),
    [
        (32, 4, False, True),
        (128, 2, False, True),
        (48, 4, False, False),
        (32, 3, False, False),
        (32, 4, True, False),
    ],
)
def test_what_the_kernel_does_not_know_is_left_to_the_loop(width, heads, vector_gate, fits):
    """Keys of 48, three heads of values for two of keys, a gate for each key."""
    _, k, v, g, *_ = arguments(width, heads)
    gates = mx.broadcast_to(g[..., None], (*g.shape, width)) if vector_gate else g
    assert ours.fits(k, v, gates) is fits


def test_an_unknown_shape_has_the_loops_bits():
    """Keys of 48, half of the tokens masked."""
    mask = mx.arange(18).reshape(2, 9) % 2 == 0
    found = ours.recurrence(*arguments(48), mask)
    wanted = theirs.gated_delta_ops(*arguments(48), mask)
    assert all(mx.array_equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_the_loop_is_the_recurrence_that_the_kernel_spells_out():
    """In float64: decay the state, take what it remembers of v, add what is missing of it, read with q."""
    q, k, v, g, beta, state = (np.array(x, np.float64) for x in arguments())
    q, k = (np.repeat(x, 2, axis=2) for x in (q, k))
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None]
        remembered = (state * k[:, t, :, None]).sum(-1)
        delta = (v[:, t] - remembered) * beta[:, t, :, None]
        state = state + delta[..., None] * k[:, t, :, None]
        outputs.append((state * q[:, t, :, None]).sum(-1))
    found, last = theirs.gated_delta_ops(*arguments())
    np.testing.assert_allclose(found, np.stack(outputs, axis=1), atol=1e-5)
    np.testing.assert_allclose(last, state, atol=1e-5)
