"""Limits on what is stored, as a program sees them: conversations, checkpoints of a path, pins."""

import oracle
import pytest
import tiny
from bundled import chat, load, text_tokens
from long import forms
from mlx_lm import stream_generate

from mlx_hybridcache import HybridPromptCache, Reason

SMALL = {"prefill_step_size": 64, "checkpoint_every": 64, "checkpoint_min_step": 16}


def new_cache(model=None, **limits):
    bundled, tokenizer = load()
    model = bundled if model is None else model
    return HybridPromptCache(model, tokenizer, memory_budget="200MB", **SMALL, **limits)


def ask(cache, prompt, max_tokens=6):
    """A reply through the cache, held against the one without it: its tokens, and its report."""
    cold = list(stream_generate(cache.engine.model, load()[1], prompt, max_tokens))
    generation = cache.stream_generate(prompt, max_tokens)
    for one, other in zip(generation, cold, strict=True):
        assert one.token == other.token
        assert oracle.agree(one.logprobs, other.logprobs)
    return [response.token for response in cold], generation.report


def most_on_a_path(cache):
    """The most checkpoints that lie on the way to any one of them, itself included."""
    stored = [tuple(tokens) for tokens in cache.checkpoints()]
    return max(sum(one == other[: len(one)] for one in stored) for other in stored)


@pytest.mark.parametrize("name", ["max_conversations", "max_checkpoints"])
def test_a_limit_below_one_is_refused(name):
    """By name, at construction."""
    with pytest.raises(ValueError, match=f"{name} is 0"):
        new_cache(**{name: 0})


@pytest.mark.parametrize("count", forms(6, 12))
@pytest.mark.parametrize("family", [None, "qwen3"])
def test_of_many_conversations_the_last_three_are_kept(family, count):
    """Two turns each, of a hybrid and of attention alone: after each turn three are stored at most,
    the last three are there in full, the others are gone, and every reply is the cold one.
    """
    model = None if family is None else tiny.build(family)
    with new_cache(model, max_conversations=3) as cache:
        prompts = []
        for i in range(count):
            first = (
                chat(("system", f"You are number {i}."), ("user", "Say something."))
                if family is None
                else tiny.random_tokens(150, seed=i)
            )
            said, _ = ask(cache, first)
            prompts.append([*first, *said, 5, 6, 7])
            _, report = ask(cache, prompts[-1])
            assert report.restored_tokens >= len(first) - 1
            assert cache.stats().conversations == min(i + 1, 3)
        assert cache.stats().evictions >= count - 3
        found = [cache.lookup(prompt) for prompt in prompts]
        assert [report.restored_tokens for report in found[-3:]] == [
            len(p) - 1 for p in prompts[-3:]
        ]
        assert {report.reason for report in found[-3:]} == {Reason.EXACT}
        if family == "qwen3":  # rows restore the one token or two that random prompts share
            assert max(report.restored_tokens for report in found[:-3]) <= 2
        else:
            assert {report.reason for report in found[:-3]} == {Reason.EVICTED}
        ask(cache, prompts[0])


@pytest.mark.parametrize("others", forms(5, 10))
def test_a_conversation_in_use_outlives_the_idle_ones(others):
    """One is asked again between others, three are kept: it restores in full to the end."""
    with new_cache(max_conversations=3) as cache:
        kept = list(text_tokens(200))
        ask(cache, kept)
        for i in range(1, others + 1):
            ask(cache, list(text_tokens(100, 300 * i)))
            _, report = ask(cache, kept)
            assert report.restored_tokens == 199
        assert cache.stats().conversations == 3


@pytest.mark.parametrize("turns", forms(3, 8))
def test_a_long_conversation_keeps_two_checkpoints_on_every_path(turns):
    """A prompt of 600 tokens, further turns and a second reply to each: two at most on each path, the
    end of the path among them, so that the next turn begins there; every reply is the cold one.
    """
    with new_cache(max_checkpoints=2) as cache:
        history, end = list(text_tokens(600)), 0
        for turn in range(turns):
            said, report = ask(cache, history)
            assert report.restored_tokens == end
            assert most_on_a_path(cache) <= 2
            end = len(history) + len(said)
            ask(cache, [*history, 9, 9, 9])
            assert most_on_a_path(cache) <= 2
            history = [*history, *said, *text_tokens(40, 1000 + 50 * turn)]
        assert cache.stats().conversations > turns
        assert cache.stats().evictions > 2 * turns


def test_one_checkpoint_on_a_path_is_its_end():
    """A prompt of 300 tokens leaves one checkpoint, at its end less one; a longer one moves it."""
    with new_cache(max_checkpoints=1) as cache:
        for length in (300, 500):
            cache.prefill(list(text_tokens(length))).release()
            assert [len(tokens) for tokens in cache.checkpoints()] == [length - 1]
        ask(cache, list(text_tokens(500)))


@pytest.mark.parametrize("others", forms(4, 10))
def test_a_pinned_conversation_outlives_the_limit(others):
    """Two are kept, one is pinned: others go by beside it, and `stats` counts the pin."""
    with new_cache(max_conversations=2) as cache:
        pinned = list(text_tokens(200))
        ask(cache, pinned)
        assert cache.pin(pinned) == 199
        for i in range(1, others + 1):
            ask(cache, list(text_tokens(100, 300 * i)))
            assert cache.stats().conversations == 2
        assert (cache.stats().pinned, cache.lookup(pinned).restored_tokens) == (1, 199)
        cache.unpin(pinned)
        for i in range(1, 3):
            ask(cache, list(text_tokens(100, 300 * i)))
        assert (cache.stats().pinned, cache.lookup(pinned).reason) == (0, Reason.EVICTED)


def test_pins_that_fill_a_path_refuse_what_follows():
    """Two allowed and pinned, at 99 and 199: a longer prompt is answered, and its report counts
    every checkpoint that was refused.
    """
    with new_cache(max_checkpoints=2) as cache:
        for length in (100, 200):
            prompt = list(text_tokens(length))
            cache.prefill(prompt).release()
            assert cache.pin(prompt) == length - 1
        _, report = ask(cache, list(text_tokens(400)))
        assert report.restored_tokens == 199
        assert (report.checkpoints_taken, report.checkpoints_refused > 2) == (0, True)
        assert sorted(map(len, cache.checkpoints())) == [99, 199]
        assert cache.stats().refusals >= report.checkpoints_refused
