"""Exact mode: on models whose bits depend on the chunks a prompt is read in, hot still equals cold."""

from collections.abc import Callable
from functools import cache as once
from functools import partial

import mlx.nn as nn
import oracle
import pytest
import tiny
from long import mostly_long
from oracle import OPENER, STEP

from mlx_hybridcache import CacheMismatchError, HybridPromptCache

CHUNK = 128
"""The prefill step here; the tail cut, 64 tokens before a prompt's end, needs more than 64."""


@once
def noisy(name: str) -> nn.Module:
    """The one noisy model of its family."""
    return tiny.NoisyChunks(tiny.build(name))


SENSITIVE: dict[str, Callable[[], nn.Module]] = {
    "mamba2": partial(tiny.build, "mamba2"),
    "granitemoehybrid": partial(tiny.build, "granitemoehybrid"),
    **{
        f"noisy_{name}": partial(noisy, name)
        for name in ("qwen3_next", "jamba", "gemma3_text", "qwen3", "recurrent_gemma", "llama4")
    },
}
"""Sensitive by nature, and by noise: hooked, paused, windows, rows alone, a chunked window."""

each_model = pytest.mark.parametrize("name", list(SENSITIVE))


def new_cache(name: str, *, exact: bool = True) -> HybridPromptCache:
    return oracle.new_cache(
        SENSITIVE[name](),
        tokenizer=oracle.word_tokenizer(),
        exact=exact,
        prefill_step_size=CHUNK,
        checkpoint_every=CHUNK,
    )


def hot_against_cold(
    name: str, before: list[list[int]], tokens: list[int], *, exact: bool = True
) -> float:
    """How far the reply's logits are off when `before` was read first; something was restored."""
    with new_cache(name, exact=exact) as cold:
        expected = oracle.reply_logits(cold, tokens)
        assert cold.last_report is not None
        assert cold.last_report.restored_tokens == 0
    with new_cache(name, exact=exact) as hot:
        for each in before:
            for _ in hot.stream_generate(each, max_tokens=3):
                pass
        found = oracle.reply_logits(hot, tokens)
        assert hot.last_report is not None
        assert hot.last_report.restored_tokens > 0
    return oracle.distance(expected, found)


def scenarios() -> dict[str, tuple[list[list[int]], list[int]]]:
    """What was read before, and the prompt that is compared, by name."""
    base = oracle.prompt(400, seed=1, openers=[150, 300])
    tail_then_turn = oracle.prompt(400, seed=2, openers=[385])  # tail cut at 336, turn cut at 386
    with_turn = oracle.prompt(360, seed=3, openers=[299])
    without_turn = [*with_turn[:299], 8, *with_turn[300:]]
    other = oracle.prompt(300, seed=4)
    return {
        "a repeat": ([base], base),
        "a branch inside a slice": ([base], [*base[:310], *oracle.prompt(60, seed=5)]),
        "a longer prompt": ([base[:300]], base),
        "a shorter prompt": ([base], base[:290]),
        "a tail cut before a turn cut": (
            [tail_then_turn],
            [*tail_then_turn[:390], *oracle.prompt(150, seed=6)],
        ),
        "a prefix with a turn at the cut, then without": ([with_turn], without_turn),
        "a prefix without a turn at the cut, then with": ([without_turn], with_turn),
        "interleaved prompts": ([base, other, other[:200], base], other),
    }


EACH = [(name, what) for name in SENSITIVE for what in scenarios()]
BRANCHED = "a branch inside a slice"


@pytest.mark.parametrize(
    ("name", "what"),
    mostly_long(EACH, [one for one in EACH if one[0] == "noisy_qwen3_next" or one[1] == BRANCHED]),
)
def test_exact_mode_is_bit_equal_hot_and_cold(name: str, what: str) -> None:
    """Six tokens' logits after 290 to 540 tokens read in steps of 128: no bit differs."""
    before, tokens = scenarios()[what]
    assert hot_against_cold(name, before, tokens) == 0.0


@each_model
def test_the_default_mode_is_not_bit_equal_there(name: str) -> None:
    """The same branch inside a slice, without exact mode, does differ: these tests can fail."""
    before, tokens = scenarios()["a branch inside a slice"]
    assert hot_against_cold(name, before, tokens, exact=False) > 0.0


@pytest.mark.parametrize("name", ["noisy_qwen3_next", "noisy_qwen3", "granitemoehybrid"])
def test_decoded_rows_never_serve_a_later_checkpoint(name: str) -> None:
    """100 tokens and a reply of 60 as a prompt of 310, twice: no bit differs.

    The decoded rows of 100 to 160 lie under the checkpoints at 128 and 256.
    """
    opening = oracle.prompt(100, seed=7)
    with new_cache(name) as hot:
        pieces = hot.stream_generate(opening, max_tokens=60, sampler=oracle.never_ending)
        reply = [piece.token for piece in pieces]
        assert len(reply) == 60
        conversation = [*opening, *reply, *oracle.prompt(150, seed=8)]
        first = oracle.reply_logits(hot, conversation)
        second = oracle.reply_logits(hot, conversation)
        assert hot.last_report is not None
        assert hot.last_report.restored_tokens == 2 * CHUNK
    with new_cache(name) as cold:
        expected = oracle.reply_logits(cold, conversation)
    assert oracle.distance(first, expected) == 0.0
    assert oracle.distance(second, expected) == 0.0


@pytest.mark.parametrize("name", ["noisy_qwen3_next"])
def test_prompts_read_in_turns_stay_exact(name: str) -> None:
    """Three prompts of 300 tokens, 140 of them shared, advanced slice by slice in turns."""
    shared = oracle.prompt(140, seed=9)
    prompts = [[*shared, *oracle.prompt(160, seed=seed)] for seed in (10, 11, 12)]
    with new_cache(name) as hot:
        for each in [hot.stream_generate(prompt, max_tokens=3) for prompt in prompts]:
            assert len(list(each)) == 3
        for prompt in prompts:
            found = oracle.reply_logits(hot, prompt)
            with new_cache(name) as cold:
                assert oracle.distance(found, oracle.reply_logits(cold, prompt)) == 0.0


@each_model
def test_exact_mode_reads_in_the_grids_own_slices(name: str) -> None:
    """A cold prompt of 400 and a hot one: every slice but the last has 128 tokens, turns or not."""
    model, tokens = SENSITIVE[name](), oracle.prompt(400, seed=13, openers=range(0, 400, 7))
    with new_cache(name) as cache:
        with oracle.forwards(model) as cold:
            oracle.read(cache, tokens)
        with oracle.forwards(model) as hot:
            oracle.read(cache, [*tokens[:300], OPENER, *oracle.prompt(99, seed=14)])
    assert cold == [CHUNK, CHUNK, CHUNK, 15]
    assert hot == [CHUNK, 15]


def test_an_exact_store_refuses_states_that_it_did_not_read_itself() -> None:
    """A framework's own caches after 40 tokens cannot be saved: nobody knows how they were read."""
    model, tokens = tiny.build("qwen3_next"), oracle.prompt(STEP, seed=15)
    with new_cache("noisy_qwen3_next") as cache:
        with pytest.raises(CacheMismatchError, match="exact"):
            cache.save(tokens, tiny.cold_caches(model, tokens))
        assert cache.stats().nodes == 0
