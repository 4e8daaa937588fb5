"""Models whose results depend on the slices that a prompt is read in, beyond some length of it.

Cold means mlx-lm's own: slices of the step from the beginning, and the last token alone.
"""

import mlx.core as mx
import numpy as np
import oracle
import pytest
import tiny
from mlx_lm import stream_generate
from odd_models import families

from mlx_hybridcache import CacheMismatchError, HybridPromptCache, NotStoredError, Reason
from mlx_hybridcache.caches.layout import Layout
from mlx_hybridcache.verify import probe, verify

STEP = 64
SETTINGS = {
    "prefill_step_size": STEP,
    "checkpoint_every": STEP,
    "checkpoint_min_step": 16,
    "memory_budget": "1GB",
}
TEXT = oracle.prompt(420, seed=7, openers=[60, 130])
BRANCH = [*TEXT[:230], *tiny.random_tokens(80, seed=9)]

each_family = pytest.mark.parametrize("name", sorted(families.LIMITS))


def served(cache, model, prompt):
    """Read `prompt` through the cache, and hold its logits against a cold run's, bit for bit."""
    ready = cache.prefill(prompt)
    found = tiny.next_logits(model, list(ready.prompt_cache), prompt[-1])
    ready.release()
    cold = tiny.cold_logits(model, prompt, STEP)
    assert np.array_equal(np.array(found), np.array(cold)), (
        ready.report,
        float(np.abs(np.array(found) - np.array(cold)).max()),
    )
    return ready.report


@each_family
def test_a_model_is_asked_how_far_slices_do_not_matter(name):
    """InternLM 2 trained on 128 tokens: 128. PLaMo 3 with a window of 32: 32, and cold runs differ behind it."""
    model = families.build(name)
    limit = families.LIMITS[name]
    assert Layout.of(model, STEP).slicing_limit == limit
    assert probe(model, TEXT[:limit], 16) == 0.0 or not tiny.device_is_split_invariant()
    assert probe(model, TEXT[: limit + 60], 16) > 1e-3


@pytest.mark.parametrize("name", ["llama_llama3", "llama_yarn", "gemma3_text", "gpt_oss", "llama4"])
def test_most_models_do_not_mind_slices(name):
    """Llama 3's and YaRN's frequencies are fixed, Gemma 3's mask shows what its cache keeps."""
    assert Layout.of(tiny.build(name), STEP).slicing_limit is None


@each_family
def test_a_conversation_that_grows_beyond_the_limit_is_served_as_cold(name):
    """From 31 tokens to 340 by steps that are no slices, then another ending, then all of it again."""
    model = families.build(name)
    with HybridPromptCache(model, **SETTINGS) as cache:
        for length in (31, 33, 99, 101, 127, 129, 150, 230, 300, 340):
            served(cache, model, TEXT[:length])
        assert served(cache, model, BRANCH).restored_tokens == 192
        assert served(cache, model, TEXT[:341]).restored_tokens == 320


@each_family
def test_up_to_the_limit_everything_is_shared(name):
    """The next prompt resumes where the last one ended, which is nowhere on the grid."""
    model, limit = families.build(name), families.LIMITS[name]
    with HybridPromptCache(model, **SETTINGS) as cache:
        served(cache, model, TEXT[: limit - 5])
        report = served(cache, model, TEXT[:limit])
        assert (report.restored_tokens, report.detail) == (limit - 6, "")


@each_family
def test_a_report_says_what_is_not_shared_and_why(name):
    """What was stored up to the limit belongs to another namespace for the prompt that goes beyond."""
    model, limit = families.build(name), families.LIMITS[name]
    with HybridPromptCache(model, **SETTINGS) as cache:
        served(cache, model, TEXT[:limit])
        report = served(cache, model, TEXT[: limit + 30])
        assert report.reason is Reason.NAMESPACE
        assert f"beyond {limit} tokens" in report.detail
        assert cache.lookup(TEXT[: limit + 30]).detail == report.detail


@each_family
def test_replies_that_pass_the_limit_leave_nothing_that_a_cold_run_does_not(name):
    """A reply that begins 6 tokens before the limit; then the next turn, with it as history."""
    model, limit, tokenizer = (
        families.build(name),
        families.LIMITS[name],
        oracle.word_tokenizer(),
    )
    prompt = TEXT[: limit - 6]
    with HybridPromptCache(model, tokenizer, **SETTINGS) as cache:
        for most in (3, 20):
            made = [r.token for r in cache.stream_generate(prompt, most)]
            plain = stream_generate(model, tokenizer, prompt, most, prefill_step_size=STEP)
            assert made == [r.token for r in plain]
            history = [*prompt, *made]
            served(cache, model, history)
            served(cache, model, [*history, *TEXT[:70]])


@each_family
def test_the_end_of_a_reply_that_passed_the_limit_is_not_stored(name):
    """No prompt that long would look for it: what it was decoded to depends on more than its tokens."""
    model, limit = families.build(name), families.LIMITS[name]
    with HybridPromptCache(model, oracle.word_tokenizer(), **SETTINGS) as cache:
        for most, stored in ((2, limit - 4), (20, limit - 4)):
            list(cache.stream_generate(TEXT[: limit - 6], most))
            assert cache.stats().tokens <= stored


@each_family
def test_a_restart_finds_what_the_grid_stored(name, tmp_path):
    """320 of 341 tokens from files, and a longer prompt goes on from there."""
    model = families.build(name)
    with HybridPromptCache(model, cache_dir=tmp_path, **SETTINGS) as cache:
        served(cache, model, TEXT[:340])
    with HybridPromptCache(model, cache_dir=tmp_path, **SETTINGS) as cache:
        report = served(cache, model, TEXT[:360])
        assert (report.tier, report.restored_tokens) == ("disk", 320)
        served(cache, model, BRANCH)
        assert cache.disk_stats().rejected == 0


@each_family
def test_states_that_were_read_elsewhere_are_refused_beyond_the_limit(name):
    """Nobody can tell in which slices somebody else read them."""
    model, limit = families.build(name), families.LIMITS[name]
    with HybridPromptCache(model, **SETTINGS) as cache:
        cache.save(TEXT[:limit], tiny.cold_caches(model, TEXT[:limit], 17))
        served(cache, model, TEXT[:limit])
        with pytest.raises(CacheMismatchError, match=f"Beyond {limit} tokens"):
            cache.save(TEXT[:200], tiny.cold_caches(model, TEXT[:200], 17))


@each_family
def test_what_is_dropped_is_gone_on_both_sides_of_the_limit(name):
    """A conversation was read below the limit and beyond it; a branch of it stays."""
    model, limit = families.build(name), families.LIMITS[name]
    with HybridPromptCache(model, **SETTINGS) as cache:
        cache.prefill(TEXT[:limit]).release()
        cache.prefill(TEXT[:300]).release()
        cache.prefill(BRANCH).release()
        assert cache.drop(TEXT[:300]) == 230
        assert cache.lookup(TEXT[:limit]).restored_tokens == 0
        assert served(cache, model, BRANCH).restored_tokens == 256
        assert served(cache, model, TEXT[:300]).restored_tokens <= 192
        with pytest.raises(NotStoredError):
            cache.drop(TEXT[100:200])


@each_family
def test_pins_hold_beyond_the_limit_too(name):
    """Pinned at the deepest that is stored, and unpinned again."""
    model = families.build(name)
    with HybridPromptCache(model, **SETTINGS) as cache:
        cache.prefill(TEXT[:20]).release()
        cache.prefill(TEXT[:300]).release()
        assert cache.pin(TEXT[:300]) == 256
        assert cache.stats().pinned == 1
        cache.unpin(TEXT[:300])
        assert cache.stats().pinned == 0


@each_family
def test_the_proof_measures_the_device_where_slices_do_not_matter(name):
    """Else it would allow four times what cold runs differ by, 17 in a logit, and hold for anything."""
    verdict = verify(families.build(name), [TEXT[:150], BRANCH[:200]], step=STEP)
    assert verdict.holds
    assert verdict.allowed == 0.0 or not tiny.device_is_split_invariant()
    assert any(point.restored > families.LIMITS[name] for point in verdict.points)


def test_a_prompt_beyond_the_limit_is_read_whole_slices_at_a_time_while_others_wait():
    """Two long prompts at once: neither is cut shorter for the other's sake."""
    model = families.build("internlm2")
    prompts = [TEXT[:340], oracle.prompt(340, seed=8)]
    with HybridPromptCache(model, oracle.word_tokenizer(), **SETTINGS) as cache:
        replies = [cache.stream_generate(prompt, 4) for prompt in prompts]
        first = [next(reply) for reply in replies]
        for reply, response, prompt in zip(replies, first, prompts, strict=True):
            assert reply.report.forwards == 7
            cold = tiny.cold_logits(model, prompt, STEP)
            assert mx.array_equal(response.logprobs, cold - mx.logsumexp(cold)).item()
            reply.close()
