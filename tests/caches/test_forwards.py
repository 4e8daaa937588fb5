"""Forwards, counted: what a prefill may cost, measured at the model's own `__call__`."""

import math
from collections.abc import Sequence

import oracle
import pytest
import tiny
from long import mostly_long

from mlx_hybridcache import HybridPromptCache

STEP = 128
HOOKED = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
PAUSED = ("mamba2", "jamba", "recurrent_gemma", "llama4")
ROWS_ONLY = ("qwen3", "llama", "deepseek_v3")
SEES_INTERIOR = ("gemma3_text", "gpt_oss")

# How often a turn opens in a prompt of n tokens.
TURNS = {
    "none": lambda n: [],
    "few": lambda n: [n // 9, n // 4, n // 2, n - 40],
    "thousands": lambda n: range(0, n, 2),
}


def each(names: Sequence[str], *more: tuple[str, int], length: int = 1025) -> pytest.MarkDecorator:
    """Prompts of a length, and some more, with every amount of turns; always each with thousands, and the first
    with any.
    """
    prompts = [*((name, length) for name in names), *more]
    every = [(*prompt, amount) for prompt in prompts for amount in TURNS]
    always = [one for one in every if one[2] == "thousands" or one[:2] == prompts[0]]
    return pytest.mark.parametrize(("name", "length", "amount"), mostly_long(every, always))


def new_cache(name: str, *, paused: bool = False, step: int = STEP) -> HybridPromptCache:
    return oracle.new_cache(
        tiny.build(name),
        tokenizer=oracle.word_tokenizer(),
        paused=paused,
        prefill_step_size=step,
        checkpoint_every=step,
        checkpoint_min_step=step // 4,
    )


def forwards(cache: HybridPromptCache, tokens: list[int]) -> tuple[int, int]:
    """The model's own count for reading all of `tokens`, the last one too, and what was replayed."""
    with oracle.forwards(cache.engine.model) as lengths:
        (piece,) = cache.stream_generate(tokens, max_tokens=1)
    assert piece.finish_reason == "length"
    report = cache.last_report
    assert report is not None
    assert sum(lengths) == report.replayed_tokens  # of a reply of one token nothing is read
    assert report.forwards == len(lengths), "the report's own count must be the real one"
    return report.forwards, report.replayed_tokens


def most(replayed: int, extra: int) -> int:
    return math.ceil(replayed / STEP) + extra


def cold_then_hot(
    name: str, amount: str, length: int, *, cold: int, hot: int, paused: bool = False
) -> None:
    """Assert the bounds, `ceil(read / step)` and so many more, for one prompt and what follows it."""
    tokens = oracle.prompt(length, seed=1, openers=TURNS[amount](length))
    own = oracle.prompt(length // 2, seed=2, openers=TURNS[amount](length // 2))
    with new_cache(name, paused=paused) as cache:
        count, replayed = forwards(cache, tokens)
        assert replayed == length
        assert count <= most(length, cold)
        followers = [
            tokens,  # a repeat
            [*tokens, *own],  # the next turn
            [*tokens[: length - 30], *own],  # a changed ending
            [*tokens[: length // 3], *own],  # a branch
            [*tokens[: length // 3], *own[:-20], *tokens[:40]],  # the second of that family
        ]
        for follower in followers:
            count, replayed = forwards(cache, follower)
            assert replayed < len(follower)
            assert count <= most(replayed, hot)


@each(HOOKED, ("qwen3_next", 1025), length=300)
def test_a_hooked_model_takes_at_most_two_forwards_more_than_slices(
    name: str, length: int, amount: str
) -> None:
    """300 and 1,025 tokens in steps of 128, cold and hot: at most ceil(read / 128) + 2 forwards."""
    cold_then_hot(name, amount, length, cold=2, hot=2)


@each([*PAUSED, *HOOKED[:1]])
def test_a_model_without_hook_takes_at_most_eight_more_cold_and_five_hot(
    name: str, length: int, amount: str
) -> None:
    """1,025 tokens in steps of 128: ceil(read / 128) + 8 cold, + 5 hot, however many turns."""
    cold_then_hot(name, amount, length, cold=8, hot=5, paused=True)


@each([*ROWS_ONLY, *SEES_INTERIOR])
def test_models_that_see_inside_a_slice_never_pause(name: str, length: int, amount: str) -> None:
    """Rows, and windows that are read off afterwards, need slices and the last token only."""
    cold_then_hot(name, amount, length, cold=1, hot=2)


@each(ROWS_ONLY)
def test_rows_alone_are_read_in_whole_slices(name: str, length: int, amount: str) -> None:
    """1,025 tokens: eight slices of 128 and nothing else, whatever turns there are."""
    tokens = oracle.prompt(length, seed=3, openers=TURNS[amount](length))
    with new_cache(name) as cache, oracle.forwards(cache.engine.model) as lengths:
        oracle.read(cache, tokens)
    assert lengths == [STEP] * 8


def test_thousands_of_turns_cost_a_hooked_model_nothing() -> None:
    """4,097 tokens, 2,049 of them turn openers, in steps of 512: nine forwards, as without turns."""
    for openers in ([], range(0, 4097, 2)):
        tokens = oracle.prompt(4097, seed=4, openers=openers)
        with new_cache("qwen3_next", step=512) as cache:
            with oracle.forwards(cache.engine.model) as lengths:
                oracle.read(cache, tokens)
            assert lengths == [512] * 8


@pytest.mark.parametrize("name", ["qwen3_next", "jamba", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_prompts_take_a_forward_a_token(name: str, length: int) -> None:
    """One token takes one forward, two take two: the last one is always read alone."""
    with new_cache(name) as cache:
        tokens = oracle.prompt(length, seed=5)
        assert forwards(cache, tokens) == (length, length)
        assert forwards(cache, tokens) == (1, 1)


def test_an_exact_repeat_takes_one_forward() -> None:
    """300 tokens again: 299 restored, one replayed, in one forward."""
    with new_cache("qwen3_next") as cache:
        tokens = oracle.prompt(300, seed=6)
        forwards(cache, tokens)
        assert forwards(cache, tokens) == (1, 1)
