"""The public surface, as a program sees it: replies, reports, threads, cancellation, bad input."""

import asyncio
import gc
import logging
import threading

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from bundled import chat, load, text, text_tokens
from mlx_lm import stream_generate
from mlx_lm.models.cache import KVCache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_hybridcache import (
    BudgetError,
    CacheMismatchError,
    ClosedError,
    HybridCacheError,
    HybridPromptCache,
    NotStoredError,
    PromptError,
    Reason,
)
from mlx_hybridcache.worker.turns import PAUSE

SMALL = {"prefill_step_size": 64, "checkpoint_every": 64, "checkpoint_min_step": 16}


@pytest.fixture
def cache():
    model, tokenizer = load()
    with HybridPromptCache(model, tokenizer, memory_budget="200MB", **SMALL) as cache:
        yield cache


def plain(prompt, max_tokens=12, **options):
    """The reply without the library."""
    model, tokenizer = load()
    return list(stream_generate(model, tokenizer, prompt, max_tokens, **options))


def same(hot, cold):
    """Tokens, text, finish reasons and every bit of the log-probabilities agree."""
    assert [r.token for r in hot] == [r.token for r in cold]
    assert [r.text for r in hot] == [r.text for r in cold]
    assert [r.finish_reason for r in hot] == [r.finish_reason for r in cold]
    assert [r.generation_tokens for r in hot] == [r.generation_tokens for r in cold]
    assert [r.prompt_tokens for r in hot] == [r.prompt_tokens for r in cold]
    for a, b in zip(hot, cold, strict=True):
        assert mx.array_equal(a.logprobs, b.logprobs)


# Replies


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 300])
def test_a_reply_is_the_same_cold_and_hot_and_without_the_library(cache, length):
    """A prompt of one token has nothing to restore and is served like all others."""
    prompt = list(text_tokens(length))
    expected = plain(prompt)
    for _ in range(2):
        same(list(cache.stream_generate(prompt, 12)), expected)


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


# Threads


def test_a_generator_may_be_advanced_from_changing_threads(cache):
    """Every token of one reply is taken on a thread of its own."""
    prompt, taken = list(text_tokens(100)), []
    generation = cache.stream_generate(prompt, 10)
    for _ in range(10):
        thread = threading.Thread(target=lambda: taken.append(next(generation)))
        thread.start()
        thread.join()
    same(taken, plain(prompt, 10))


def test_two_open_generators_and_an_abandoned_one_block_nobody(cache):
    """Replies interleave; a third, taken once and dropped, gives its memory back."""
    a, b = list(text_tokens(100)), list(text_tokens(120, 300))
    abandoned = cache.stream_generate(list(text_tokens(90, 600)), 5000)
    next(abandoned)
    one, two = cache.stream_generate(a, 8), cache.stream_generate(b, 8)
    pairs = list(zip(one, two, strict=True))
    same([x for x, _ in pairs], plain(a, 8))
    same([y for _, y in pairs], plain(b, 8))
    assert cache.stats().running_bytes > 0
    del abandoned
    gc.collect()
    assert cache.stats().running_bytes == 0


@pytest.mark.parametrize("family", ["qwen3_next", "llama_llama3", "llama_yarn"])
def test_a_model_built_on_one_thread_is_served_from_others(family):
    """Scaled RoPE keeps lazy arrays that only the building thread may evaluate."""
    _, tokenizer = load()
    model = tiny.fresh(family)
    prompt, replies = tiny.random_tokens(100, 3), []
    with HybridPromptCache(model, tokenizer, memory_budget="100MB", **SMALL) as cache:

        def ask():
            replies.append([r.token for r in cache.stream_generate(prompt, 6)])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = [r.token for r in stream_generate(model, tokenizer, prompt, 6)]
    assert replies == [expected] * 4


def test_a_cache_may_be_built_and_closed_on_another_thread():
    """The model too; nothing is left behind."""
    _, tokenizer = load()
    lengths = []

    def work():
        model = tiny.fresh("llama_yarn")
        with HybridPromptCache(model, tokenizer, memory_budget="50MB", **SMALL) as cache:
            lengths.append(len(list(cache.stream_generate(tiny.random_tokens(80, 1), 5))))
        mx.clear_streams()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert lengths == [5]


# Cancellation


def test_a_cancelled_prefill_leaves_its_checkpoints(cache):
    """Cancelled in the slice that ends at 256: nothing more is read, and the retry restores all of that."""
    prompt = list(text_tokens(600))
    crossed, cancelled, places = threading.Event(), threading.Event(), []

    def on_progress(read, total):
        places.append(read)
        if read >= 256:
            crossed.set()
            cancelled.wait(60)

    generation = cache.stream_generate(prompt, 5, prompt_progress_callback=on_progress)
    assert crossed.wait(60)
    generation.cancel()
    cancelled.set()
    generation.close()
    assert places == [0, 64, 128, 192, 256]
    assert generation.report is None
    assert cache.stats().running_bytes == 0
    assert cache.lookup(prompt).restored_tokens == 256
    same(list(cache.stream_generate(prompt, 5)), plain(prompt, 5))


def test_a_closed_reply_leaves_what_was_said(cache):
    """After three tokens the state behind them is stored for whoever continues."""
    prompt = list(text_tokens(100))
    generation = cache.stream_generate(prompt, 500)
    said = [next(generation).token for _ in range(3)]
    generation.close()
    report = cache.lookup([*prompt, *said, 7])
    assert report.restored_tokens >= 99
    assert report.matched_tokens == 103
    assert list(generation) == []


def test_a_failing_callback_ends_its_request_only(cache):
    """The error reaches the reader; what was stored and the next request are untouched."""
    prompt = list(text_tokens(300))

    def failing(read, total):
        if read >= 128:
            raise RuntimeError("callback broke")

    with pytest.raises(RuntimeError, match="callback broke"):
        list(cache.stream_generate(prompt, 5, prompt_progress_callback=failing))
    assert cache.stats().running_bytes == 0
    same(list(cache.stream_generate(prompt, 5)), plain(prompt, 5))


# Namespaces and pins


def test_pinned_prefixes_survive_what_evicts_everything_else():
    """Ten later conversations press a 4 MB store; the pinned one stays exact."""
    model, tokenizer = load()
    with HybridPromptCache(model, tokenizer, memory_budget="4MB", **SMALL) as cache:
        pinned = list(text_tokens(300))
        cache.prefill(pinned, max_tokens=16).release()
        assert cache.pin(pinned) == 299
        for i in range(1, 12):
            cache.prefill(list(text_tokens(300, 400 * i)), max_tokens=16).release()
        assert cache.stats().evictions > 0
        assert cache.lookup(pinned).restored_tokens == 299
        assert cache.unpin(pinned) == 299


def test_what_is_not_stored_cannot_be_pinned(cache):
    """The message says to prefill it first."""
    with pytest.raises(HybridCacheError, match="prefill"):
        cache.pin(list(text_tokens(50)))


def test_clearing_forgets_everything(cache):
    """No rows, no snapshots, no match; the next request is served."""
    prompt = list(text_tokens(200))
    cache.prefill(prompt).release()
    cache.clear()
    stats = cache.stats()
    assert (stats.held_bytes, stats.nodes) == (0, 0)
    assert cache.lookup(prompt).reason is Reason.COLD
    same(list(cache.stream_generate(prompt, 3)), plain(prompt, 3))


# Bad input


@pytest.mark.parametrize("prompt", ["", [], [10**6], [-1], ["a"], [3072]])
def test_a_prompt_that_cannot_be_read_is_refused_before_any_work(cache, prompt):
    """Nothing is stored and nothing is running afterwards."""
    for call in (cache.stream_generate, cache.prefill, cache.restore, cache.lookup, cache.pin):
        with pytest.raises(PromptError):
            call(prompt)
    assert cache.stats().held_bytes == 0


def test_zero_tokens_of_reply_are_refused_at_the_call(cache):
    """As mlx-lm does, but before the stream begins."""
    with pytest.raises(ValueError, match="max_tokens"):
        cache.stream_generate([1, 2], 0)


def test_text_needs_a_tokenizer():
    """Token ids do not."""
    with HybridPromptCache(load()[0], memory_budget="50MB") as cache:
        with pytest.raises(PromptError, match="tokenizer"):
            cache.prefill("text")
        with pytest.raises(HybridCacheError, match="tokenizer"):
            cache.stream_generate([1, 2, 3])
        assert cache.prefill([1, 2, 3]).position == 2


@pytest.mark.parametrize("settings", [{"memory_budget": "12 parsecs"}, {"prefill_step_size": 0}])
def test_settings_that_make_no_sense_are_refused(settings):
    """By name, at construction."""
    with pytest.raises(ValueError, match=r"parsecs|prefill_step_size"):
        HybridPromptCache(load()[0], **settings)


def test_a_budget_below_one_checkpoint_is_refused():
    """It says what one needs."""
    with pytest.raises(BudgetError, match="need"):
        HybridPromptCache(load()[0], memory_budget="10KB")


def test_a_closed_cache_says_so():
    """Every method, after close; closing twice is no error."""
    model, tokenizer = load()
    cache = HybridPromptCache(model, tokenizer, memory_budget="50MB")
    cache.close()
    cache.close()
    for call in (cache.stats, lambda: cache.prefill([1, 2]), lambda: cache.stream_generate([1, 2])):
        with pytest.raises(ClosedError):
            call()


def test_boundaries_declared_by_the_caller_are_restored(cache):
    """A prompt that shares 150 tokens up to a declared boundary resumes exactly there."""
    prompt = list(text_tokens(300))
    cache.prefill(prompt, boundaries=[150]).release()
    assert cache.lookup([*prompt[:150], 9, 9, 9]).restored_tokens == 150


def test_the_reply_of_a_thinking_model_is_not_stored_where_history_strips_it():
    """The template drops past reasoning, so the state behind it can never be resumed."""
    model, tokenizer = load()
    with HybridPromptCache(model, tokenizer, memory_budget="200MB", **SMALL) as cache:
        prompt = chat(("user", "Say yes."))
        thought = tokenizer.encode("<think>\nHm.\n</think>\n\nYes.", add_special_tokens=False)
        script = iter([*thought, tokenizer.eos_token_id, 0, 0])
        list(
            cache.stream_generate(
                prompt, len(thought) + 1, sampler=lambda logprobs: mx.array([next(script)])
            )
        )
        stored = [tokens for tokens in cache.checkpoints() if len(tokens) > len(prompt)]
        assert stored == []


# Salts, seeds, event loops


def test_salts_share_nothing_and_tell_nothing(cache):
    """A prompt known under one salt is cold under another, and the report does not say it is known."""
    prompt = list(text_tokens(300))
    list(cache.stream_generate(prompt, 2, cache_salt="alice"))
    for other in ("bob", None):
        generation = cache.stream_generate(prompt, 2, cache_salt=other)
        list(generation)
        assert generation.report.reason is Reason.COLD
        assert generation.report.matched_tokens == 0
    assert cache.lookup(prompt, cache_salt="alice").restored_tokens == 299
    assert cache.lookup(prompt, cache_salt="eve").reason is Reason.COLD
    assert cache.pin(prompt, cache_salt="alice") == cache.unpin(prompt, cache_salt="alice")
    with pytest.raises(NotStoredError):
        cache.pin(prompt, cache_salt="eve")


def test_a_request_may_decline_the_cache(cache):
    """It is read whole, says so, and leaves nothing behind."""
    prompt = list(text_tokens(200))
    list(cache.stream_generate(prompt, 2))
    before = cache.checkpoints()
    generation = cache.stream_generate(prompt, 5, use_cache=False)
    same(list(generation), plain(prompt, 5))
    assert generation.report.reason is Reason.DISABLED
    assert generation.report.detail == "use_cache=False"
    assert cache.checkpoints() == before


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_seed_gives_the_same_reply_beside_other_requests(cache, use_cache):
    """Two seeded requests taking turns on one thread draw what each would draw alone."""
    prompt = list(text_tokens(80))

    def seeded(seed):
        sampler = make_sampler(1.0)
        return cache.stream_generate(prompt, 10, sampler=sampler, seed=seed, use_cache=use_cache)

    alone = [[r.token for r in seeded(seed)] for seed in (1, 2)]
    assert alone[0] != alone[1]
    both = [seeded(1), seeded(2)]
    together = [[], []]
    for _ in range(10):
        for replies, generation in zip(together, both, strict=True):
            replies.append(next(generation).token)
    assert together == alone


def test_an_event_loop_reads_replies_side_by_side(cache):
    """`async for` gives what `for` gives, several at once on one loop, errors included."""

    async def read(prompt):
        return [response async for response in cache.stream_generate(prompt, 12)]

    async def both():
        return await asyncio.gather(read(list(text_tokens(70))), read(list(text_tokens(90))))

    def fails(logits):
        raise RuntimeError("sampler")

    async def failing():
        async for _ in cache.stream_generate([1, 2, 3], 4, sampler=fails):
            pass

    for hot, length in zip(asyncio.run(both()), (70, 90), strict=True):
        same(hot, plain(list(text_tokens(length))))
    with pytest.raises(RuntimeError, match="sampler"):
        asyncio.run(failing())


def test_a_cancelled_reader_on_a_loop_leaves_the_checkpoints(cache):
    """Cancelled after two tokens, the loop goes on and the prompt is stored."""
    prompt = list(text_tokens(200))

    async def read_two():
        generation = cache.stream_generate(prompt, 500)
        count = 0
        async for _ in generation:
            count += 1
            if count == 2:
                generation.cancel()
        return count

    assert 2 <= asyncio.run(read_two()) < 100
    assert cache.lookup(prompt).restored_tokens == 199


def test_what_comes_through_ends_the_request_where_it_ends(cache):
    """A view that stops after three tokens leaves the reply's end stored at exactly those three."""
    prompt = list(text_tokens(100))

    def three(steps):
        taken = 0
        for step in steps:
            if step is PAUSE:
                yield step
                continue
            taken += 1
            yield step.token
            if taken == 3:
                return

    tokens = list(cache.stream_generate(prompt, 50, through=three))
    assert tokens == [r.token for r in plain(prompt, 4)][:3]
    assert [*prompt, *tokens] in cache.checkpoints()
    assert not any(len(stored) > 103 for stored in cache.checkpoints())


def test_a_divergence_names_what_was_asked_and_what_is_stored(cache):
    """Position 150: the 24 tokens before are common, what follows differs."""
    stored, asked = list(text_tokens(200)), list(text_tokens(150)) + list(text_tokens(50, 500))
    list(cache.stream_generate(stored, 1))
    generation = cache.stream_generate(asked, 1)
    list(generation)
    assert generation.divergence.position == generation.report.diverged_at == 150
    assert list(generation.divergence.before) == stored[126:150]
    assert list(generation.divergence.asked) == asked[150:174]
    assert list(generation.divergence.stored) == stored[150:174]


def test_figures_are_published_without_waiting_for_the_worker(cache):
    """After a request and after clearing, `summary` is what `stats` says."""
    list(cache.stream_generate(list(text_tokens(100)), 2))
    assert cache.summary == cache.stats()
    assert cache.summary.checkpoints > 0
    cache.clear()
    assert cache.summary.checkpoints == 0
