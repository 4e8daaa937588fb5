"""Quantized keys and values: begun at exactly one position, cut, shared and stored like full ones.

Every reply is held against mlx-lm's own quantized cache, to the last bit.
"""

import gc
import logging

import mlx.core as mx
import numpy as np
import oracle
import pytest
import tiny
from long import in_turns, mostly_long
from odd_models.quantizing import Quantized, wide

from mlx_hybridcache import HybridPromptCache, SettingError
from mlx_hybridcache.caches.checkpoint import take_rows
from mlx_hybridcache.caches.kinds.quantized import QuantizedRowsKind
from mlx_hybridcache.caches.quantizing.cache import QuantizingCache
from mlx_hybridcache.caches.quantizing.precision import Precision
from mlx_hybridcache.disk.contents import damaged
from mlx_hybridcache.report import Reason

START = 150
PROMPT = oracle.prompt(300, seed=3)
OTHER = oracle.prompt(300, seed=4)

FAMILIES, STARTS = ["llama", "qwen3_next"], [0, START, 1000]
each_family = pytest.mark.parametrize("family", FAMILIES)
each_start = pytest.mark.parametrize("start", STARTS)


def opened(model, quantized, **settings):
    return oracle.new_cache(
        model, tokenizer=oracle.word_tokenizer(), **quantized.settings, **settings
    )


def off(model, cache, quantized, prompt, *, allowed=0.0):
    """What is restored of a prompt; asserts that what follows is mlx-lm's, token by token."""
    ready = cache.prefill(prompt, max_tokens=64)
    followed = [*prompt, *oracle.prompt(6, seed=9)]
    expected = quantized.cold(model, followed)[len(prompt) - 1 :]
    hot = []
    for token in followed[len(prompt) - 1 :]:
        logits = model(mx.array([[token]]), cache=ready.prompt_cache)
        mx.eval(logits)
        hot.append(np.array(logits[0, 0]))
    ready.release()
    assert oracle.distance(np.stack(hot), expected) <= allowed
    return ready.report.restored_tokens


PATHS = {
    "repeat": PROMPT,
    "longer": [*PROMPT, *OTHER[:60]],
    "branch before the start": [*PROMPT[:100], *OTHER[:200]],
    "branch at the start": [*PROMPT[:START], *OTHER[:100]],
    "one before the start": [*PROMPT[: START - 1], *OTHER[:100]],
    "one behind the start": [*PROMPT[: START + 1], *OTHER[:100]],
    "branch behind the start": [*PROMPT[:230], *OTHER[:50]],
    "changed ending": [*PROMPT[:-1], (PROMPT[-1] + 2) % tiny.VOCAB],
    "shorter than the start": PROMPT[:120],
    "crossing in the reply": PROMPT[: START - 2],
    "ending at the start": PROMPT[:START],
    "ending behind the start": PROMPT[: START + 1],
}


@pytest.mark.parametrize(
    ("family", "bits", "start"),
    mostly_long(
        [
            ("llama", 4, 0),
            ("llama", 4, START),
            ("llama", 8, 1000),
            ("qwen3_next", 8, 0),
            ("qwen3_next", 4, START),
        ],
        [("llama", 4, 0), ("llama", 8, 1000), ("qwen3_next", 4, START)],
    ),
)
def test_every_path_has_the_bits_of_a_cold_run(family, bits, start):
    """Cold, then each path with what those before it have stored; all but the last token may be restored."""
    model, quantized = wide(family), Quantized(bits, start)
    with opened(model, quantized) as cache:
        assert off(model, cache, quantized, PROMPT) == 0
        for name, prompt in PATHS.items():
            restored = off(model, cache, quantized, prompt)
            assert restored >= (_shared(prompt) if family == "llama" else 1), name


def _shared(prompt):
    """How many tokens of it rows restore that `PROMPT` has left."""
    same = [a == b for a, b in zip(prompt[:-1], PROMPT[:-1], strict=False)]
    return (*same, False).index(False)


@each_family
def test_what_was_read_in_other_slices_is_the_same(family):
    """Steps of 64 and of 48: the start is cut out of either."""
    model, quantized = wide(family), Quantized(4, START)
    with opened(model, quantized, prefill_step_size=48, checkpoint_every=48) as cache:
        assert off(model, cache, quantized, PROMPT) == 0
        assert off(model, cache, quantized, [*PROMPT[:230], 1, 2]) > 0


@pytest.mark.parametrize(("family", "start"), in_turns(FAMILIES, STARTS))
def test_after_a_restart_files_give_the_same(family, start, tmp_path):
    """Rows on both sides of the start come back from the disk; no file holds both."""
    model, quantized = wide(family), Quantized(4, start)
    with opened(model, quantized, cache_dir=tmp_path) as cache:
        oracle.read(cache, PROMPT)
        oracle.read(cache, PATHS["branch before the start"])
        assert cache.flush(20)
    with opened(model, quantized, cache_dir=tmp_path) as cache:
        for name, prompt in PATHS.items():
            restored = off(model, cache, quantized, prompt)
            assert restored >= (_shared(prompt) if family == "llama" else 1), name
        assert cache.disk_stats().rejected == 0
    segments = [entry.segment for entry in damaged(tmp_path)[0]]
    assert segments
    assert not [each for each in segments if each.kind == "rows" and each.start < start < each.end]


@each_family
def test_replies_that_cross_the_start_are_stored_to_their_end(family):
    """The streamed reply is that of no cache; its end is restored by the next turn."""
    model, quantized = wide(family), Quantized(8, START)
    prompt = PROMPT[: START - 10]
    with opened(model, quantized) as cache:

        def reply(tokens, **options):
            generation = cache.stream_generate(tokens, 40, sampler=oracle.never_ending, **options)
            made = list(generation)
            return [r.token for r in made], mx.stack([r.logprobs for r in made]), generation.report

        tokens, logprobs, _ = reply(prompt)
        without, same, report = reply(prompt, use_cache=False)
        assert report.reason is Reason.DISABLED
        assert tokens == without
        assert mx.array_equal(logprobs, same)
        assert mx.array_equal(reply(prompt)[1], logprobs)
        later = [*prompt, *tokens, *OTHER[:30]]
        assert off(model, cache, quantized, later) >= len(prompt) + len(tokens) - 2


@each_family
def test_who_is_cancelled_behind_the_start_keeps_what_was_read(family):
    """Three slices in, the client goes; the next one goes on from there."""
    model, quantized = wide(family), Quantized(4, START)
    with opened(model, quantized) as cache:
        generation = cache.stream_generate(PROMPT, 4, prompt_progress_callback=_stop_at(200))
        with pytest.raises(_StopError):
            list(generation)
        assert off(model, cache, quantized, PROMPT) >= 192


class _StopError(Exception):
    pass


def _stop_at(position):
    def stop(read, total):
        if read >= position:
            raise _StopError

    return stop


def test_whoever_runs_the_model_stops_at_the_start():
    """Restored caches read on in one forward across the start: as if it were two. Then the model is itself."""
    model, quantized = wide("llama"), Quantized(4, START)
    before = type(model)
    with opened(model, quantized) as cache:
        oracle.read(cache, PROMPT[:100])
        ready = cache.restore(PROMPT, max_tokens=64)
        assert ready.position == 99
        hot = np.array(model(mx.array([ready.rest]), cache=ready.prompt_cache)[0])
        assert oracle.distance(hot, quantized.cold(model, PROMPT)[99:]) == 0.0
        cache.save(PROMPT, ready.prompt_cache)
        ready.release()
        assert off(model, cache, quantized, [*PROMPT, 5, 6]) == len(PROMPT)
        del ready
    assert type(model) is before


@pytest.mark.parametrize(("bits", "most"), [(4, 0.30), (8, 0.55)])
def test_a_stored_token_weighs_a_part_of_what_it_weighs_in_half_precision(bits, most):
    """Heads of 64, groups of 64: by the store's own count, which is of real arrays."""
    model = tiny.made(lambda: type(wide("llama"))(wide("llama").args))
    model.set_dtype(mx.bfloat16)
    held = {}
    for name, settings in (("full", {}), ("quantized", Quantized(bits, 0).settings)):
        with oracle.new_cache(model, **settings) as cache:
            oracle.read(cache, PROMPT)
            stats = cache.stats()
            assert stats.rows_bytes == cache.info.row_bytes * stats.tokens
            held[name] = stats.rows_bytes
    assert held["quantized"] <= most * held["full"]


def test_rows_before_the_start_stay_full_and_are_counted_as_such():
    """150 tokens of float32 and 149 of 4 bits, to the byte; what runs is claimed before it is there."""
    quantized = Quantized(4, START)
    with opened(wide("llama"), quantized) as cache:
        oracle.read(cache, PROMPT)
        layout = cache.engine.layout
        (kind, *_) = layout.kinds
        assert isinstance(kind, QuantizedRowsKind)
        full, packed = 2 * 64 * 2 * 4, 2 * 2 * (64 // 2 + 2 * 4)  # of a layer, 2 heads
        assert (kind.full.row_bytes, kind.row_bytes) == (full, packed)
        layers = len(layout.kinds)
        assert cache.stats().rows_bytes == layers * (START * full + 149 * packed)
        assert layout.rows_nbytes(0, 299) == cache.stats().rows_bytes
        assert layout.rows_nbytes(100, 200) == layers * 50 * (full + packed)
        assert layout.running_bytes(START) == layers * START * full
        assert layout.running_bytes(400) == layers * (START * full + 400 * packed)


@pytest.mark.parametrize(
    "other",
    [{}, {"kv_bits": 8}, {"kv_group_size": 32}, {"quantized_kv_start": 151}],
    ids=lambda other: next(iter(other), "none"),
)
def test_rows_of_other_settings_are_never_mixed(other, tmp_path):
    """In one directory each has its own namespace."""
    model, settings = wide("llama"), Quantized(4, START).settings
    with oracle.new_cache(model, cache_dir=tmp_path, **settings) as cache:
        oracle.read(cache, PROMPT)
        assert cache.flush(20)
    settings = {**settings, **other} if other else {}
    with oracle.new_cache(model, cache_dir=tmp_path, **settings) as cache:
        assert cache.lookup(PROMPT).restored_tokens == 0


def test_windows_stay_in_full_precision():
    """Gemma 3: its full layers are quantized, its windows are mlx-lm's own, which sum single tokens
    in another order.
    """
    model, quantized = wide("gemma3_text"), Quantized(8, START)
    with opened(model, quantized) as cache:
        layout = cache.engine.layout
        windows = {leaf for leaf, kind in enumerate(layout.kinds) if hasattr(kind, "size")}
        assert windows
        assert layout.quantized == {*range(len(layout.kinds))} - windows
        assert off(model, cache, quantized, PROMPT, allowed=oracle.ROUNDING) == 0
        assert off(model, cache, quantized, PROMPT, allowed=oracle.ROUNDING) == len(PROMPT) - 1


NOTHING = {
    "latent attention": ("deepseek_v3", {"kv_lora_rank": 64, "qk_rope_head_dim": 64}),
    "sinks": ("gpt_oss", {"head_dim": 64}),
    "no rows": ("mamba2", {"head_dim": 16}),
    "narrow heads": ("llama", {"head_dim": 16}),
}


@pytest.mark.parametrize("why", NOTHING)
def test_where_it_has_no_effect_the_cache_is_kept_and_that_is_said(why, caplog):
    """Once, and what is stored is what it would be without."""
    family, changed = NOTHING[why]
    model = wide(family, **changed)
    with caplog.at_level(logging.WARNING), opened(model, Quantized(8, START)) as cache:
        said = [r.message for r in caplog.records if "kv_bits has no effect" in r.message]
        assert len(said) == 1
        oracle.read(cache, PROMPT)
        assert cache.lookup(PROMPT).restored_tokens > 0
        with oracle.new_cache(model) as plain:
            assert plain.info.settings == cache.info.settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kv_bits": 7}, "kv_bits is 7"),
        ({"kv_bits": True}, "kv_bits is True"),
        ({"kv_bits": 4, "kv_group_size": 48}, "kv_group_size is 48"),
        ({"kv_bits": 4, "quantized_kv_start": -1}, "quantized_kv_start is -1"),
    ],
)
def test_what_mlx_cannot_do_is_refused(settings, said):
    """With the setting's name, before anything is read."""
    with pytest.raises(SettingError, match=said):
        HybridPromptCache(tiny.build("llama"), **settings)


@each_start
def test_rows_that_are_split_keep_all_of_their_arrays(start):
    """At each position, also the start: both parts together are the whole, array by array."""
    with opened(wide("llama"), Quantized(4, start)) as cache:
        ready = cache.prefill(PROMPT, max_tokens=8)
        layout = cache.engine.layout
        block = take_rows(layout, ready.prompt_cache, 100, 200)
        for position in (101, START - 1, START, START + 1, 199):
            parts = block.split(position)
            for leaf, arrays in enumerate(block.layers):
                for which, whole in enumerate(arrays):
                    held = [_rows_of(which, start, part.start, part.end) for part in parts]
                    assert [part.layers[leaf][which].shape[2] for part in parts] == held
                    pieces = [part.layers[leaf][which] for part in parts]
                    assert mx.array_equal(mx.concatenate(pieces, axis=2), whole)
            assert sum(part.nbytes for part in parts) == block.nbytes
        ready.release()


def _rows_of(which, start, first, last):
    """How many rows of `[first, last)` one of a layer's arrays has: of two that are full, or six."""
    if start and which < 2:
        return min(last, start) - min(first, start)
    return max(last, start) - max(first, start)


def test_tokens_can_be_taken_back_across_the_start():
    """mlx-lm trims caches of drafts: before the start rows are full again."""
    model, quantized = wide("llama"), Quantized(4, START)
    with opened(model, quantized) as cache:
        ready = cache.prefill(PROMPT[: START + 20], max_tokens=64)
        for each in ready.prompt_cache:
            assert each.is_trimmable()
            assert each.trim(40) == 40
        at = START + 19 - 40
        hot = np.array(model(mx.array([PROMPT[at:200]]), cache=ready.prompt_cache)[0])
        assert oracle.distance(hot, quantized.cold(model, PROMPT[:200])[at:]) == 0.0
        ready.release()


def test_full_rows_are_kept_without_the_room_behind_them():
    """Up to 300, in a buffer that had grown to 512, of which 300 are held from the next token on."""
    gc.collect()
    before = mx.get_active_memory()
    cache = QuantizingCache(Precision(8, 64, 300))
    for count in (256, 44, 1):
        cache.update_and_fetch(*(mx.zeros((1, 2, count, 64)) for _ in range(2)))
        mx.eval(cache.state)
    assert [rows.shape[2] for rows in cache.full()] == [300, 300]
    assert mx.get_active_memory() - before < cache.nbytes + 65_536


def test_rows_of_no_elements_are_not_quantized():
    """Some layers have no values; 64 elements are one group."""
    assert [Precision(8, 64).fits(dim) for dim in (0, 32, 64)] == [False, False, True]
