"""What the tiny models promise to the tests that use them, one family at a time."""

from typing import Any

import mlx.core as mx
import pytest
import tiny
from long import mostly_long
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList

# Read in slices, these are bit-equal only at multiples of `ssm_attn`'s block.
BLOCKED = ("falcon_h1", "granitemoehybrid", "mamba2")
BLOCK = 256

# One-token steps take another path here than slices do: past a window the ring is summed out of
# temporal order, and multi-head latent attention folds a projection into the query.
STEPS_DIFFER = ("gemma3_text", "recurrent_gemma", "gpt_oss", "deepseek_v3")

RECURRENT = (
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_moe",
    "recurrent_gemma",
    "jamba",
    "falcon_h1",
    "mamba2",
    "granitemoehybrid",
)

SAME_READING = 1e-4
"""Largest difference of two logits that rounding in another order explains on the CPU wheel."""

ON_OTHER_DEVICES = 1e-2
"""The same where the device itself computes a row differently in another chunk."""

each_family = pytest.mark.parametrize(
    "name",
    mostly_long(
        tiny.FAMILIES, ("qwen3_next", "jamba", "gemma3_text", "qwen3", "deepseek_v3", "mamba2")
    ),
)


def distance(a: mx.array, b: mx.array) -> float:
    """Largest absolute difference of two logit vectors (VOCAB,)."""
    return float(mx.abs(a - b).max().item())


def assert_same_bits(a: mx.array, b: mx.array) -> None:
    """Equal to the last bit where the device allows it, else within its own noise."""
    if tiny.device_is_split_invariant():
        assert distance(a, b) == 0.0
    else:
        assert distance(a, b) <= ON_OTHER_DEVICES


def recurrent_caches(caches: list[Any]) -> list[ArraysCache]:
    """The caches that hold a running state, those inside composites included."""
    flat = [
        child
        for cache in caches
        for child in (cache.caches if isinstance(cache, CacheList) else [cache])
    ]
    return [cache for cache in flat if isinstance(cache, ArraysCache)]


@each_family
def test_a_family_always_has_the_same_weights(name: str) -> None:
    """Two models built from one name give the same logits, so a failure can be run again."""
    tokens = tiny.random_tokens(20, seed=1)
    again = tiny.FAMILIES[name]()
    assert again is not tiny.build(name)
    assert (
        distance(tiny.cold_logits(again, tokens), tiny.cold_logits(tiny.build(name), tokens)) == 0
    )


@pytest.mark.parametrize("name", [name for name in tiny.FAMILIES if name not in BLOCKED])
@pytest.mark.parametrize("step", mostly_long([7, 64], [64]))
def test_a_prefill_has_the_same_bits_however_it_is_sliced(name: str, step: int) -> None:
    """110 tokens, past every window, in slices of 7 or 64 or at once: the same logits."""
    model, tokens = tiny.build(name), tiny.random_tokens(110, seed=2)
    assert_same_bits(tiny.cold_logits(model, tokens, step), tiny.cold_logits(model, tokens))


@pytest.mark.parametrize(
    "name",
    mostly_long(
        [name for name in tiny.FAMILIES if name not in BLOCKED + STEPS_DIFFER],
        ["qwen3_next", "qwen3", "jamba"],
    ),
)
def test_reading_one_by_one_has_the_bits_of_a_prefill(name: str) -> None:
    """110 one-token steps leave what one slice leaves."""
    model, tokens = tiny.build(name), tiny.random_tokens(110, seed=3)
    assert_same_bits(tiny.cold_logits(model, tokens, step=1), tiny.cold_logits(model, tokens))


@pytest.mark.parametrize("name", STEPS_DIFFER)
def test_where_one_token_steps_differ_they_differ_by_rounding_only(name: str) -> None:
    """110 one-token steps against one slice: not the same bits, but the same reading."""
    model, tokens = tiny.build(name), tiny.random_tokens(110, seed=4)
    difference = distance(tiny.cold_logits(model, tokens, step=1), tiny.cold_logits(model, tokens))
    assert difference <= (SAME_READING if tiny.device_is_split_invariant() else ON_OTHER_DEVICES)


@pytest.mark.parametrize("name", BLOCKED)
def test_blocked_layers_agree_in_bits_at_multiples_of_their_block(name: str) -> None:
    """600 tokens in slices of 256 and at once agree in bits; in slices of 100 within 1e-4."""
    model, tokens = tiny.build(name), tiny.random_tokens(600, seed=5)
    at_once = tiny.cold_logits(model, tokens)
    assert_same_bits(tiny.cold_logits(model, tokens, step=BLOCK), at_once)
    off_block = distance(tiny.cold_logits(model, tokens, step=100), at_once)
    assert off_block <= (SAME_READING if tiny.device_is_split_invariant() else ON_OTHER_DEVICES)


@pytest.mark.parametrize("name", ["granitemoehybrid", "mamba2"])
def test_blocked_layers_are_sensitive_to_slices_by_nature(name: str) -> None:
    """Slices of 100 leave other bits than one slice, so exact mode has something to prove here."""
    model, tokens = tiny.build(name), tiny.random_tokens(600, seed=5)
    assert distance(tiny.cold_logits(model, tokens, step=100), tiny.cold_logits(model, tokens)) > 0


@each_family
def test_a_noisy_model_depends_on_how_a_prefill_is_cut(name: str) -> None:
    """110 tokens in slices of 64 and of 50 differ clearly; the same slices never do."""
    model, tokens = tiny.NoisyChunks(tiny.build(name)), tiny.random_tokens(110, seed=6)
    by_64 = tiny.cold_logits(model, tokens, step=64)
    assert distance(by_64, tiny.cold_logits(model, tokens, step=50)) > 1e-5
    assert distance(by_64, tiny.cold_logits(model, tokens, step=64)) == 0.0


@each_family
def test_a_noisy_model_leaves_other_rows_and_states_for_other_cuts(name: str) -> None:
    """After 96 tokens read in slices of 64 and of 48 the caches differ, layer by layer."""
    model, tokens = tiny.NoisyChunks(tiny.build(name)), tiny.random_tokens(96, seed=7)
    pairs = zip(
        tiny.cold_caches(model, tokens, step=64),
        tiny.cold_caches(model, tokens, step=48),
        strict=True,
    )
    for one, other in pairs:
        arrays_one = [a for _, a in tree_flatten(one.state) if isinstance(a, mx.array)]
        arrays_other = [a for _, a in tree_flatten(other.state) if isinstance(a, mx.array)]
        assert arrays_one
        assert any(
            a.shape != b.shape or distance(a, b) > 0.0
            for a, b in zip(arrays_one, arrays_other, strict=True)
        )


@each_family
def test_wrapping_a_model_leaves_it_clean(name: str) -> None:
    """Logits of the shared model are the same before and after its noisy wrapper ran."""
    model, tokens = tiny.build(name), tiny.random_tokens(20, seed=8)
    before = tiny.cold_logits(model, tokens)
    tiny.cold_logits(tiny.NoisyChunks(model), tokens)
    assert distance(tiny.cold_logits(model, tokens), before) == 0.0


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("stale", mostly_long([1, 60], [1]))
def test_a_stale_state_shows_in_the_logits(name: str, stale: int) -> None:
    """Running states left 1 or 60 tokens behind, rows and windows right: off by over 1e-3."""
    model, tokens = tiny.build(name), tiny.random_tokens(100, seed=9)
    caches = tiny.cold_caches(model, tokens)
    behind = recurrent_caches(tiny.cold_caches(model, tokens[:-stale]))
    for cache, old in zip(recurrent_caches(caches), behind, strict=True):
        cache.state = old.state
    mixed = tiny.next_logits(model, caches, token=5)
    assert distance(mixed, tiny.cold_logits(model, [*tokens, 5])) > 1e-3


@each_family
def test_the_first_tokens_still_move_the_logits(name: str) -> None:
    """Another token at position 5 of 110 changes the last logits by over 1e-3."""
    model, tokens = tiny.build(name), tiny.random_tokens(110, seed=10)
    other = [*tokens[:5], (tokens[5] + 1) % tiny.VOCAB, *tokens[6:]]
    assert distance(tiny.cold_logits(model, tokens), tiny.cold_logits(model, other)) > 1e-3
