"""Windows of which every row is stored restore anywhere."""

import mlx.core as mx
import pytest
import tiny

from mlx_hybridcache import BudgetError, HybridPromptCache

SMALL = {"prefill_step_size": 64, "checkpoint_every": 64, "checkpoint_min_step": 16}
PROMPT = tiny.random_tokens(300, 4)


def logits_after(model, cache, prompt):
    ready = cache.restore(prompt)
    try:
        for token in ready.rest[:-1]:
            model(mx.array([[token]]), cache=ready.prompt_cache)
        out = model(mx.array([ready.rest[-1:]]), cache=ready.prompt_cache)[0, -1]
        mx.eval(out)
        return ready.position, out
    finally:
        ready.release()


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss"])
def test_every_position_restores_exactly(family):
    """Inside a slice, at its edges, in and beyond the window: one token is replayed, same bits."""
    model = tiny.build(family)
    with HybridPromptCache(model, memory_budget="50MB", swa_full=True, **SMALL) as cache:
        cache.prefill(PROMPT).release()
        for length in (2, 17, 32, 33, 34, 63, 64, 65, 66, 100, 128, 129, 191, 250, 299):
            asked = [*PROMPT[: length - 1], (PROMPT[length - 1] + 1) % tiny.VOCAB]
            position, logits = logits_after(model, cache, asked)
            assert position == length - 1
            assert mx.array_equal(logits, tiny.cold_logits(model, asked)), length


def test_without_it_windows_restore_at_checkpoints_only():
    """The same prompt, changed at 100: restored at 64."""
    model = tiny.build("gemma3_text")
    with HybridPromptCache(model, memory_budget="50MB", **SMALL) as cache:
        cache.prefill(PROMPT).release()
        assert cache.lookup([*PROMPT[:100], 1, 2]).restored_tokens == 64


def test_windows_beside_recurrent_layers_go_on_restoring_at_checkpoints():
    """RecurrentGemma: the recurrent state decides where; the bits are the cold run's."""
    model = tiny.build("recurrent_gemma")
    with HybridPromptCache(model, memory_budget="50MB", swa_full=True, **SMALL) as cache:
        cache.prefill(PROMPT).release()
        paths = cache.checkpoints()
        assert len(paths) >= 3
        for path in paths:
            asked = [*path, 3]
            position, logits = logits_after(model, cache, asked)
            assert position == len(path)
            assert mx.array_equal(logits, tiny.cold_logits(model, asked))


def test_rows_that_have_left_the_window_are_not_stored_wrongly():
    """100 tokens decoded behind the prompt, the window is 32: nothing is stored behind the prompt."""
    model = tiny.build("gemma3_text")
    with HybridPromptCache(model, memory_budget="50MB", swa_full=True, **SMALL) as cache:
        ready = cache.prefill(PROMPT)
        more = tiny.random_tokens(100, 5)
        for token in [*ready.rest, *more]:
            model(mx.array([[token]]), cache=ready.prompt_cache)
        ready.release()
        with pytest.raises(BudgetError, match="left a sliding window"):
            cache.save(PROMPT + more, ready.prompt_cache)
        assert cache.lookup(PROMPT + more).matched_tokens == 299
