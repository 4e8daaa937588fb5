"""Capture hooks: the contract with mlx-lm's layers, and states with the bits of a pause."""

import inspect
import threading

import mlx.core as mx
import pytest
import tiny

from mlx_hybridcache.caches.capture import HOOKED, SCAN, CaptureHook
from mlx_hybridcache.caches.checkpoint import move_state
from mlx_hybridcache.caches.kinds.idle import is_idle
from mlx_hybridcache.caches.layout import Layout, fresh_caches

HOOKED_FAMILIES = ["qwen3_next", "qwen3_5", "qwen3_5_moe"]
TOKENS = mx.array([tiny.random_tokens(150, 2)])


@pytest.mark.parametrize("layer", HOOKED)
def test_mlx_lms_layers_have_the_seams_that_are_listened_to(layer):
    """A call to the scan by its module's name, and one to the layer's own convolution."""
    source = inspect.getsource(layer.__call__)
    assert f" {SCAN}(" in source
    assert "self.conv1d(conv_input)" in source
    assert SCAN in layer.__call__.__globals__
    assert layer.__call__.__closure__ is None


def paused(model, cut):
    """Caches that read `cut` tokens and stopped."""
    caches = fresh_caches(model)
    model(TOKENS[:, :cut], cache=caches)
    mx.eval([cache.state for cache in caches])
    return caches


@pytest.mark.parametrize("family", HOOKED_FAMILIES)
@pytest.mark.parametrize("offsets", [[1], [2, 3, 4], [63, 64, 65], [1, 77, 149]])
def test_captured_states_have_the_bits_of_a_pause(family, offsets):
    """State and taps at each cut, and the logits of the whole slice unchanged."""
    model = tiny.build(family)
    layout = Layout.of(model)
    caches = fresh_caches(model)
    with layout.hook.at(offsets) as snapshots:
        logits = model(TOKENS, cache=caches)
    captured = snapshots()
    mx.eval(logits, [s.arrays for taken in captured.values() for s in taken])
    for k, cut in enumerate(offsets):
        stopped = paused(model, cut)
        for index, taken in captured.items():
            for mine, theirs in zip(taken[k].arrays, stopped[index].cache, strict=True):
                assert mx.array_equal(mine, theirs), (cut, index)
    assert mx.array_equal(logits, model(TOKENS, cache=fresh_caches(model)))


def test_another_thread_may_run_the_same_model_meanwhile():
    """Its one-token steps, in the middle of a captured forward, are as if nobody listened."""
    model = tiny.build("qwen3_next")
    hook = Layout.of(model).hook
    expected = tiny.cold_logits(model, tiny.random_tokens(5, 1))
    seen = []

    def other():
        seen.append(tiny.cold_logits(model, tiny.random_tokens(5, 1)))
        mx.clear_streams()

    with hook.at([40, 80]) as snapshots:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        model(TOKENS, cache=fresh_caches(model))
    assert mx.array_equal(seen[0], expected)
    assert [len(taken) for taken in snapshots().values()] == [2, 2]


def test_a_listened_to_model_is_what_it_was():
    """Parameters keep their names, layers stay instances of their class, twice hooked is once."""
    model = tiny.fresh("qwen3_next")
    before = sorted(name for name, _ in tiny_parameters(model))
    layer = model.layers[0].linear_attn
    plain = type(layer)
    Layout.of(model)
    listening = type(layer)
    Layout.of(model)
    assert isinstance(layer, plain)
    assert type(layer) is listening is not plain
    assert sorted(name for name, _ in tiny_parameters(model)) == before


def tiny_parameters(model):
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


def test_a_family_without_a_hook_has_none():
    """Jamba pauses; a model of which one recurrent layer is unknown does too."""
    assert Layout.of(tiny.build("jamba")).hook is None
    assert CaptureHook.of(tiny.build("qwen3_next"), {0, 1, 2, 3}) is None


def test_caches_whose_state_moved_hold_it_no_more():
    """Three layers of four: no more than one layer's is held twice."""
    model = tiny.build("qwen3_next")
    layout, caches = Layout.of(model), paused(model, 20)
    taken = move_state(layout, caches, 20)
    has_state = [snapshot is not None for snapshot in taken.snapshots]
    assert has_state.count(True) > 1
    assert [is_idle(cache) for cache in caches] == has_state
