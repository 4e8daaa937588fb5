"""Reading a prefix ahead: what is left of it is what is stored."""

from bundled import load, text_tokens

from mlx_hybridcache import HybridPromptCache


def test_a_warmed_prefix_is_stored_and_nothing_else_is_held():
    """700 tokens: the one item says that 699 are there, a lookup says the same, no bytes run."""
    model, tokenizer = load()
    prompt = list(text_tokens(2_000)[:700])
    with HybridPromptCache(model, tokenizer, memory_budget="200MB") as cache:
        warming = cache.warm(prompt)
        (found,) = warming
        assert found == cache.lookup(prompt)
        assert found.restored_tokens == 699
        assert warming.report is not None
        assert (warming.report.restored_tokens, warming.report.replayed_tokens) == (0, 700)
        assert cache.stats().running_bytes == 0
        ready = cache.prefill(prompt)
        assert (ready.report.restored_tokens, ready.report.replayed_tokens) == (699, 1)


def test_a_warm_that_is_left_keeps_what_it_has_read():
    """Of 3,000 tokens in slices of 256 one is read when it is cancelled: that one stays, or two."""
    model, tokenizer = load()
    prompt = list(text_tokens(4_000)[:3_000])
    with HybridPromptCache(model, tokenizer, memory_budget="200MB", prefill_step_size=256) as cache:
        warming = None

        def leave(read, total):
            if read >= 256:
                warming.cancel()

        warming = cache.warm(prompt, prompt_progress_callback=leave)
        assert list(warming) == []
        assert 256 <= cache.lookup(prompt).restored_tokens < 1_500
        assert cache.stats().running_bytes == 0
