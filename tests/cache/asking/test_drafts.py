"""Draft models without the cache: only where mlx-lm can take back what the model refuses of a draft."""

import oracle
import pytest
import tiny
from long import in_turns

from mlx_hybridcache import HybridPromptCache, SettingError

GOES_BACK = ("llama", "qwen3_moe", "deepseek_v3", "llama4")
CANNOT = ("gemma3_text", "gpt_oss", "recurrent_gemma", "qwen3_next", "mamba2", "falcon_h1", "jamba")


def new_cache(name, **settings):
    return HybridPromptCache(
        tiny.build(name), oracle.word_tokenizer(), memory_budget="100MB", **settings
    )


@pytest.mark.parametrize(("name", "use_cache"), in_turns(GOES_BACK, [True, False]))
def test_a_drafted_reply_is_the_greedy_one(name, use_cache):
    """Three drafted tokens a step by another model, to 120 tokens past a window of 32."""
    prompt, options = oracle.prompt(50, seed=3), {"sampler": oracle.never_ending, "seed": 0}
    with new_cache(name) as cache:
        drafted = cache.stream_generate(
            prompt,
            120,
            draft_model=tiny.build("qwen3"),
            num_draft_tokens=3,
            use_cache=use_cache,
            **options,
        )
        found = [response.token for response in drafted]
        assert found == [
            response.token for response in cache.stream_generate(prompt, 120, **options)
        ]


@pytest.mark.parametrize("name", CANNOT)
def test_without_the_cache_one_is_refused_beside_layers_that_cannot_go_back(name):
    """A full window keeps what was refused: Gemma 3 wrote another token from the third on, with no error."""
    prompt = oracle.prompt(50, seed=3)
    with new_cache(name) as cache:
        with pytest.raises(SettingError, match="sliding-window layers cannot"):
            cache.stream_generate(prompt, 9, draft_model=tiny.build("qwen3"), use_cache=False)
        assert list(cache.stream_generate(prompt, 1)), "the next request is served"


def test_no_tokens_at_once_are_no_drafts():
    """`num_draft_tokens=0`, as in mlx-lm."""
    with new_cache("qwen3_next") as cache:
        reply = cache.stream_generate(
            oracle.prompt(50, seed=3), 9, draft_model=tiny.build("qwen3"), num_draft_tokens=0
        )
        assert list(reply)
        assert (reply.report.drafted_tokens, reply.report.draft_forwards) == (0, 0)
