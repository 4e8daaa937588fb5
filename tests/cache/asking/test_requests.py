"""Pins, salts, seeds, boundaries, bad input: what a caller may ask for, and what is refused."""

import mlx.core as mx
import pytest
from bundled import chat, load, text_tokens
from mlx_lm.sample_utils import make_sampler
from plain_replies import SMALL, plain, same

from mlx_hybridcache import (
    BudgetError,
    ClosedError,
    HybridCacheError,
    HybridPromptCache,
    NotStoredError,
    PromptError,
    Reason,
)

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
    """The message says to prefill or warm it first."""
    with pytest.raises(HybridCacheError, match="prefill or warm"):
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
