"""The public surface, as a program sees it: replies, reports, caches for frameworks."""

import logging

import mlx.core as mx
import mlx.nn as nn
import oracle
import pytest
import tiny
from bundled import load, text, text_tokens
from mlx_lm import stream_generate
from mlx_lm.models.cache import KVCache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from plain_replies import SMALL, plain, same

from mlx_hybridcache import (
    CacheMismatchError,
    HybridPromptCache,
    Reason,
)

# Replies


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 300])
def test_a_reply_is_the_same_cold_and_hot_and_without_the_library(cache, length):
    """A prompt of one token has nothing to restore and is served like all others."""
    prompt = list(text_tokens(length))
    expected = plain(prompt)
    for _ in range(2):
        same(list(cache.stream_generate(prompt, 12)), expected)


def test_nothing_is_read_of_a_reply_of_one_token(cache):
    """A forward for each token of the prompt's end, none for the reply; the next turn goes on behind the prompt, as always.

    Where somebody sees tokens as they are drawn, and in a reply of two, the last one is read as it was.
    """
    prompt = list(text_tokens(300))
    expected = plain(prompt, 1)
    for lengths_of, restored in (([300], 0), ([1], 299)):
        with oracle.forwards(cache.engine.model) as lengths:
            replies = list(cache.stream_generate(prompt, 1))
        same(replies, expected)
        assert sum(lengths) == sum(lengths_of)
        assert cache.last_report.restored_tokens == restored
    turn = [*prompt, replies[0].token, *text_tokens(40, 700)]
    same(list(cache.stream_generate(turn, 8)), plain(turn, 8))
    assert cache.last_report.restored_tokens == 299
    seen = []

    def watch(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    for count, options in ((1, {"logits_processors": [watch]}), (2, {})):
        with oracle.forwards(cache.engine.model) as lengths:
            list(cache.stream_generate(prompt, count, **options))
        assert lengths == [1] * (1 + count)
    assert [len(each) for each in seen] == [300, 301]


def test_text_prompts_are_tokenized_as_mlx_lm_does(cache):
    """The same text gives the same prompt tokens and reply."""
    prompt = text(100)
    same(list(cache.stream_generate(prompt, 8)), plain(prompt, 8))


def test_samplers_draw_what_they_would_draw_without_the_library(cache):
    """Seeded on the calling thread, hot or cold; unseeded again, another reply."""
    prompt, sampler = list(text_tokens(200)), make_sampler(temp=1.0)
    mx.random.seed(5)
    expected = plain(prompt, 12, sampler=sampler)
    for _ in range(2):
        mx.random.seed(5)
        same(list(cache.stream_generate(prompt, 12, sampler=sampler)), expected)
    again = [r.token for r in cache.stream_generate(prompt, 12, sampler=sampler)]
    assert again != [r.token for r in expected]


def test_two_sampled_replies_under_way_do_not_draw_from_each_other(cache):
    """Interleaved token by token, both equal their own seeded reply."""
    sampler = make_sampler(temp=1.0)
    prompts = [list(text_tokens(100)), list(text_tokens(100, 500))]
    expected, running = [], []
    for seed, prompt in enumerate(prompts):
        mx.random.seed(seed)
        expected.append([r.token for r in plain(prompt, 10, sampler=sampler)])
        mx.random.seed(seed)
        running.append(cache.stream_generate(prompt, 10, sampler=sampler))
    drawn = list(zip(*running, strict=True))
    assert [[r.token for r in column] for column in zip(*drawn, strict=True)] == expected


def test_logits_processors_see_the_whole_prompt_when_it_was_restored(cache):
    """A repetition penalty over the last 200 tokens gives the same reply hot and cold."""
    prompt = list(text_tokens(300))
    processors = make_logits_processors(repetition_penalty=1.5, repetition_context_size=200)
    expected = plain(prompt, logits_processors=processors)
    for _ in range(2):
        same(list(cache.stream_generate(prompt, 12, logits_processors=processors)), expected)
    assert [r.token for r in expected] != [r.token for r in plain(prompt)]


def test_progress_is_called_from_the_restored_position_to_the_whole_prompt(cache):
    """Cold from 0 by slices of 64, hot from what was restored, each place once."""
    prompt, seen = list(text_tokens(200)), []
    for places in ([0, 64, 128, 192, 199, 200], [199, 200]):
        seen.clear()
        list(
            cache.stream_generate(
                prompt, 4, prompt_progress_callback=lambda read, total: seen.append((read, total))
            )
        )
        assert seen == [(place, 200) for place in places]


def test_a_prompt_that_is_a_stored_one_less_its_last_tokens(cache):
    """One, two and seventy tokens shorter: never an empty batch, always the cold reply."""
    prompt = list(text_tokens(300))
    list(cache.stream_generate(prompt, 4))
    for cut in (1, 2, 70):
        shorter = prompt[:-cut]
        same(list(cache.stream_generate(shorter, 6)), plain(shorter, 6))
        assert cache.last_report.replayed_tokens >= 1


# Reports


def test_reports_say_what_happened_and_why(cache):
    """Cold, exact, prefix, branch: counts add up to the prompt."""
    prompt, other = list(text_tokens(300)), list(text_tokens(100, 700))
    asked = {
        Reason.COLD: prompt,
        Reason.EXACT: prompt,
        Reason.PREFIX: [*prompt, *(r.token for r in plain(prompt, 3)), *other],
        Reason.BRANCH: prompt[:200] + other,
    }
    for reason, tokens in asked.items():
        generation = cache.stream_generate(tokens, 3)
        list(generation)
        report = generation.report
        assert report.reason is reason
        assert report.restored_tokens + report.replayed_tokens == len(tokens)
        assert report == cache.last_report
        assert report.forwards >= 1
        assert report.reason.sentence.endswith(".")
    assert report.diverged_at == report.matched_tokens == 200
    assert report.restored_tokens == 192


def test_a_lookup_tells_what_would_be_restored_and_changes_nothing(cache):
    """Before and after two lookups the store is the same; the request then finds what was told."""
    prompt = list(text_tokens(300))
    assert cache.lookup(prompt).reason is Reason.COLD
    cache.prefill(prompt).release()
    before = cache.stats()
    told = cache.lookup(prompt[:250])
    assert cache.lookup(prompt[:250]) == told
    assert cache.stats() == before
    list(generation := cache.stream_generate(prompt[:250], 2))
    assert generation.report.restored_tokens == told.restored_tokens > 0


def test_evicted_beginnings_are_reported_as_such():
    """A budget of a few conversations forgets the first of twelve, and says so."""
    model, tokenizer = load()
    with HybridPromptCache(model, tokenizer, memory_budget="4MB", **SMALL) as cache:
        prompts = [list(text_tokens(300, 400 * i)) for i in range(12)]
        for prompt in prompts:
            cache.prefill(prompt, max_tokens=16).release()
        assert cache.stats().evictions > 0
        reasons = {cache.lookup(prompt).reason for prompt in prompts}
        assert Reason.EVICTED in reasons
        assert cache.lookup(prompts[-1]).reason is Reason.EXACT


def test_options_that_the_cache_cannot_serve_are_served_without_it_and_said(cache):
    """Quantized KV: mlx-lm's own reply, nothing stored, reason `disabled` with the option's name."""
    prompt = list(text_tokens(200))
    quantized = {"kv_bits": 8, "quantized_kv_start": 0}
    generation = cache.stream_generate(prompt, 6, **quantized)
    expected = plain(prompt, 6, prefill_step_size=64, **quantized)
    same(list(generation), expected)
    assert generation.report.reason is Reason.DISABLED
    assert generation.report.detail == "kv_bits"
    assert cache.stats().tokens == 0


class StrangeCache(KVCache):
    """A cache class that is in no table."""


class Strange(nn.Module):
    """A model whose caches are of that class."""

    def __init__(self, model):
        super().__init__()
        self.inner = model
        self.layers = model.layers

    def __call__(self, inputs, cache=None):
        return self.inner(inputs, cache=cache)

    def make_cache(self):
        return [StrangeCache() for _ in self.inner.layers]


def test_an_unknown_cache_class_is_served_cold_and_named(caplog):
    """Said in the log at the start and in every report; the reply is mlx-lm's own."""
    model, (_, tokenizer) = Strange(tiny.build("qwen3")), load()
    prompt = tiny.random_tokens(50, 1)
    with caplog.at_level(logging.WARNING):
        cache = HybridPromptCache(model, tokenizer, memory_budget="10MB")
    assert "StrangeCache" in caplog.text
    with cache:
        for _ in range(2):
            generation = cache.stream_generate(prompt, 4)
            same(list(generation), list(stream_generate(model, tokenizer, prompt, 4)))
            assert generation.report.reason is Reason.UNSUPPORTED_LAYER
            assert generation.report.detail == "StrangeCache"
        ready = cache.prefill(prompt)
        assert (ready.position, ready.rest) == (0, prompt)
        with pytest.raises(CacheMismatchError, match="StrangeCache"):
            cache.save(prompt, ready.prompt_cache)


# For frameworks that run the model themselves


def test_prefilled_caches_stand_before_the_last_token(cache):
    """Feeding the rest gives the cold logits; the position and the report say so."""
    model, _ = load()
    prompt = list(text_tokens(300))
    for _ in range(2):
        ready = cache.prefill(prompt)
        assert (ready.position, ready.rest) == (299, prompt[-1:])
        logits = model(mx.array([ready.rest]), cache=ready.prompt_cache)[0, -1]
        assert mx.array_equal(logits, tiny.cold_logits(model, prompt))
        ready.release()
    assert ready.report.reason is Reason.EXACT


def test_restoring_reads_nothing(cache):
    """The rest is everything behind the restored position."""
    prompt = list(text_tokens(300))
    cache.prefill(prompt).release()
    ready = cache.restore(prompt[:100])
    assert ready.position == 64
    assert ready.rest == prompt[64:100]
    ready.release()


def test_saved_caches_are_restored(cache):
    """A framework's own decoding, saved, serves the next turn."""
    model, _ = load()
    prompt = list(text_tokens(150))
    ready = cache.prefill(prompt)
    more = list(text_tokens(30, 900))
    model(mx.array([ready.rest + more]), cache=ready.prompt_cache)
    cache.save(prompt + more, ready.prompt_cache)
    ready.release()
    report = cache.lookup([*prompt, *more, 5])
    assert report.restored_tokens == 180


def test_a_cache_that_does_not_stand_where_it_claims_is_refused(cache):
    """One token more, one less, none, another model's: nothing is stored."""
    prompt = list(text_tokens(100))
    ready = cache.prefill(prompt)
    before = cache.stats()
    for tokens in (prompt, prompt[:-2]):
        with pytest.raises(CacheMismatchError, match="stands at 99 tokens"):
            cache.save(tokens, ready.prompt_cache)
    with pytest.raises(CacheMismatchError, match="has read nothing"):
        cache.save(prompt, load()[0].make_cache())
    with pytest.raises(CacheMismatchError, match="expected 4 plain caches"):
        cache.save(prompt, [KVCache()])
    assert cache.stats() == before


def test_a_request_never_changes_what_is_stored(cache):
    """Caches handed out are written over; the next restore has the same bits as before."""
    model, _ = load()
    prompt = list(text_tokens(200))
    ready = cache.prefill(prompt)
    for each in ready.prompt_cache:
        for array in tiny_arrays(each):
            array[...] = mx.zeros_like(array)
    mx.eval([each.state for each in ready.prompt_cache])
    again = cache.prefill(prompt)
    logits = model(mx.array([again.rest]), cache=again.prompt_cache)[0, -1]
    assert mx.array_equal(logits, tiny.cold_logits(model, prompt))


def tiny_arrays(cache):
    state = cache.state
    if isinstance(cache, KVCache):
        return state[:2]
    return [array for array in state[0] if array is not None]
