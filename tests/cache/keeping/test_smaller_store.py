"""A smaller store end to end: what comes back is the same from everywhere, and weighs what is said."""

import mlx.core as mx
import numpy as np
import oracle
import pytest
import tiny
from long import in_turns
from mlx_lm.models.cache import make_prompt_cache

from mlx_hybridcache import HybridPromptCache, SettingError
from mlx_hybridcache.caches.layout import leaves
from mlx_hybridcache.caches.live import LiveCaches

SMALL = {"store_kv": 8, "store_state": "int8"}
KINDS = [SMALL, {"store_kv": 4}, {"store_state": "int8"}]
PROMPT = tiny.random_tokens(300, seed=3)
HYBRID = "qwen3_next"


def opened(model, **settings):
    return HybridPromptCache(model, **{**oracle.SETTINGS, **settings})


def held(caches):
    """The bytes of all that live caches hold, buffers up to their position."""
    found = []
    for cache in leaves(caches):
        state = cache.state
        arrays = state[0] if isinstance(state[0], list) else state
        found += [np.array(x.astype(mx.float32)) for x in arrays if isinstance(x, mx.array)]
    return found


def restored(cache, prompt=PROMPT):
    with cache.restore(prompt) as ready:
        return ready.report.restored_tokens, held(ready.prompt_cache)


def same(one, other):
    return one[0] == other[0] and all(map(np.array_equal, one[1], other[1]))


def stored(cache):
    """Every stored array, by where it is stored."""
    found = {}
    for node in cache.engine.tiers.memory.nodes():
        for rows in node.rows:
            for leaf, arrays in enumerate(rows.layers):
                for which, x in enumerate(arrays):
                    for index in range(x.shape[2]):
                        found["rows", rows.start + index, leaf, which] = x[:, :, index]
        for leaf, snapshot in enumerate(node.checkpoint.snapshots if node.checkpoint else ()):
            for which, x in enumerate(snapshot.arrays if snapshot else ()):
                found["state", node.end, leaf, which] = x
    return {key: np.array(x.astype(mx.float32)) for key, x in found.items()}


@pytest.mark.parametrize(
    ("family", "settings"), in_turns([HYBRID, "llama", "gemma3_text"], KINDS), ids=str
)
def test_a_restore_is_the_same_from_memory_disk_and_after_a_restart(family, settings, tmp_path):
    """And in a second restore, which comes out of what the first one left."""
    model = tiny.fresh(family)
    with opened(model, cache_dir=tmp_path, **settings) as cache:
        cache.prefill(PROMPT).release()
        first = restored(cache)
        assert first[0] > 200
        assert same(restored(cache), first)
        cache.flush()
    with opened(model, cache_dir=tmp_path, **settings) as cache:
        assert same(restored(cache), first)
        assert cache.disk_stats().read_bytes > 0
        assert same(restored(cache), first)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_restore_from_a_running_request_is_the_same_as_behind_it(settings, monkeypatch):
    """While a reply is written its rows lie in its own caches, in full; who resumes there gets them rounded."""
    monkeypatch.setattr(LiveCaches, "materialize", lambda self: None)
    model, tokenizer = tiny.fresh(HYBRID), oracle.word_tokenizer()
    with HybridPromptCache(model, tokenizer, **{**oracle.SETTINGS, **settings}) as cache:
        running = cache.stream_generate(PROMPT, max_tokens=60)
        next(running)
        assert cache.stats().rows_bytes == 0
        during = restored(cache)
        list(running)
        assert cache.stats().rows_bytes > 0
        assert same(restored(cache), during)


def test_what_was_restored_is_stored_again_to_the_same_bytes():
    """Rows and states, out of the caches of a request that resumed, into an empty store; turn after turn."""
    model = tiny.fresh(HYBRID)
    with opened(model, **SMALL) as cache, opened(model, **SMALL) as other:
        cache.prefill(PROMPT).release()
        before = stored(cache)
        for here, there in ((cache, other), (other, cache)):
            with here.restore(PROMPT) as ready:
                end = ready.report.restored_tokens
                there.clear()
                there.save(PROMPT[:end], ready.prompt_cache)
            after = stored(there)
            assert len(after) > 2 * end
            assert all(np.array_equal(before[key], x) for key, x in after.items())


def test_the_budget_counts_small_bytes():
    """Each token and each checkpoint weighs what the layout says, which is less, and a miss weighs the same."""
    model = tiny.fresh(HYBRID)
    with opened(model, **SMALL) as cache:
        layout = cache.engine.layout
        cache.prefill(PROMPT).release()
        stats = cache.stats()
        assert stats.rows_bytes == stats.tokens * layout.stored_row_bytes
        assert stats.snapshot_bytes == stats.checkpoints * layout.stored_snapshot_bytes
        assert stats.running_bytes == 0
        assert layout.stored_row_bytes < 0.5 * layout.row_bytes
        assert layout.stored_snapshot_bytes < 0.8 * layout.snapshot_bytes
        held_bytes = sum(rows.nbytes for n in cache.engine.tiers.memory.nodes() for rows in n.rows)
        assert stats.rows_bytes == held_bytes


def test_what_becomes_full_is_claimed(monkeypatch):
    """A restore holds its caches and, for a moment, one layer's rows more, which the budget knows of."""
    model, claims = tiny.fresh(HYBRID), []
    with opened(model, **SMALL) as cache:
        cache.prefill(PROMPT).release()
        layout = cache.engine.layout
        claim_for = LiveCaches.claim_for
        monkeypatch.setattr(
            LiveCaches,
            "claim_for",
            lambda self, nbytes, found: (claims.append(nbytes), claim_for(self, nbytes, found))[1],
        )
        with cache.restore(PROMPT, max_tokens=1) as ready:
            end = ready.report.restored_tokens
            running = cache.stats().running_bytes
        layer = max(kind.row_bytes for kind in layout.kinds)
        assert claims[0] >= running + end * layer


@pytest.mark.parametrize("budget", ["190kB", "260kB", "400kB"])
def test_a_tight_budget_is_kept(budget):
    """Turns that restore, evict and store again: the budget asserts after each change that it is not exceeded."""
    model, tokenizer = tiny.fresh(HYBRID), oracle.word_tokenizer()
    settings = {**oracle.SETTINGS, **SMALL, "memory_budget": budget}
    with HybridPromptCache(model, tokenizer, **settings) as cache:
        for turn in range(6):
            prompt = tiny.random_tokens(60 + 20 * (turn // 2), seed=turn % 2)
            list(cache.stream_generate(prompt, max_tokens=4))
        assert cache.stats().held_bytes <= cache.stats().budget_bytes
        assert cache.stats().running_bytes == 0


def test_replies_together_are_those_alone():
    """Two that resume in a smaller store and are written in one batch."""
    model, tokenizer = tiny.fresh(HYBRID), oracle.word_tokenizer()
    prompts = [PROMPT, [*PROMPT[:200], *tiny.random_tokens(90, seed=9)]]
    with HybridPromptCache(model, tokenizer, **{**oracle.SETTINGS, **SMALL}) as cache:
        for prompt in prompts:
            cache.prefill(prompt).release()
        alone = [[r.token for r in cache.stream_generate(p, max_tokens=12)] for p in prompts]
        streams = [cache.stream_generate(p, max_tokens=12) for p in prompts]
        together = [[], []]
        for _ in range(12):
            for tokens, stream in zip(together, streams, strict=True):
                tokens += [r.token for r in [next(stream, None)] if r is not None]
        assert together == alone


def test_small_and_full_are_never_mixed(tmp_path):
    """In one cache directory: each finds its own only."""
    model, digests = tiny.fresh(HYBRID), set()
    every = [{}, SMALL, {"store_kv": 8}, {"store_kv": 4}, {"store_state": "int8"}]
    for settings in every:
        with opened(model, cache_dir=tmp_path, **settings) as cache:
            digests.add(cache.info.settings)
            assert cache.lookup(PROMPT).restored_tokens == 0
            cache.prefill(PROMPT).release()
            cache.flush()
    assert len(digests) == len(every)


def test_what_it_costs_is_measured():
    """More with fewer bits; without a smaller store there is nothing to measure."""
    model = tiny.fresh(HYBRID)
    found = {}
    for bits in (None, 8, 4):
        with opened(model, store_kv=bits) as cache:
            found[bits] = cache.info.store_error
    assert found[None] is None
    assert 0 < found[8].mean_kl < found[4].mean_kl
    assert found[8].compared == 32
    assert found[8].max_kl >= found[8].mean_kl
    assert "KL" in found[8].sentence


def test_a_model_without_anything_to_make_small_says_so(caplog):
    """Attention only has no state."""
    with opened(tiny.fresh("llama"), store_state="int8") as cache:
        assert cache.info.stored_row_bytes == cache.info.row_bytes
    assert "no effect" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"store_kv": 6},
        {"store_kv": True},
        {"store_state": "int4"},
        {"store_state": 8},
        {**SMALL, "exact": True},
        {"store_kv": 8, "kv_bits": 4},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(settings):
    """Other widths, and exactness beside rounding."""
    with pytest.raises(SettingError, match="store"):
        opened(tiny.fresh("llama"), **settings)


def test_without_it_nothing_changes():
    """The digest of a plain cache is the one that it always had: no store setting is part of it."""
    model = tiny.fresh("llama")
    with opened(model) as cache, opened(model, store_kv=None, store_state=None) as other:
        assert cache.info.settings == other.info.settings
        assert cache.engine.layout.stored_row_bytes == cache.engine.layout.row_bytes
    assert make_prompt_cache(model)
