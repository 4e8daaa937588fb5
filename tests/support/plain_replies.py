"""Replies with and without the library, on the bundled model."""

import mlx.core as mx
from bundled import load
from mlx_lm import stream_generate

SMALL = {"prefill_step_size": 64, "checkpoint_every": 64, "checkpoint_min_step": 16}


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
