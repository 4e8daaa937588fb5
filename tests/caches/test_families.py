"""Families with traits of their own: each through cold, repeat, branch, restart and the proof."""

import functools

import mlx.core as mx
import numpy as np
import pytest
import tiny
from long import mostly_long
from odd_models import families

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.verify import verify

STEP = 64
SETTINGS = {
    "prefill_step_size": STEP,
    "checkpoint_every": STEP,
    "checkpoint_min_step": 16,
    "memory_budget": "1GB",
}

PROMPT = tiny.random_tokens(200, seed=3)
BRANCH = [*PROMPT[:150], *tiny.random_tokens(60, seed=5)]
NAMES = sorted(families.TRAITS)


@functools.cache
def cold(name, prompt):
    """The logits of a cold run, read once."""
    return tiny.cold_logits(families.build(name), list(prompt), STEP)


def answers_as_cold(cache, name, prompt, *, least=0):
    """Read `prompt` through the cache; its logits are a cold run's, and `least` tokens were restored."""
    ready = cache.prefill(prompt)
    found = tiny.next_logits(cache.engine.model, list(ready.prompt_cache), prompt[-1])
    ready.release()
    assert ready.report.restored_tokens >= least, ready.report
    assert mx.array_equal(found, cold(name, tuple(prompt))).item(), ready.report
    return ready.report


@pytest.mark.parametrize("name", mostly_long(NAMES, [name for name in NAMES if name != "kimi_k3"]))
def test_a_family_is_served_as_cold_and_from_files_after_a_restart(name, tmp_path):
    """Its prompt, the same again and another ending; then by the next process, which rejects no file."""
    model = families.build(name)
    with HybridPromptCache(model, cache_dir=tmp_path, **SETTINGS) as cache:
        answers_as_cold(cache, name, PROMPT)
        answers_as_cold(cache, name, PROMPT, least=len(PROMPT) - 1)
        answers_as_cold(cache, name, BRANCH, least=128)
    with HybridPromptCache(model, cache_dir=tmp_path, **SETTINGS) as cache:
        assert answers_as_cold(cache, name, PROMPT, least=len(PROMPT) - 1).tier == "disk"
        answers_as_cold(cache, name, BRANCH, least=128)
        assert cache.disk_stats().rejected == 0


@pytest.mark.parametrize("name", mostly_long(NAMES, ["gemma3n", "longcat_flash_ngram"]))
def test_the_proof_runs_on_every_family(name):
    """It reads on its own thread and on the worker's in turn."""
    verdict = verify(families.build(name), [PROMPT[:100], BRANCH[:100]], step=STEP)
    assert verdict.holds
    assert verdict.worst == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_says_how_many_bytes_a_checkpoint_weighs_at_most(name):
    """The n-gram context of LongCat weighs 8 bytes behind the first token and 24 from the third on."""
    model = families.build(name)
    with HybridPromptCache(model, **SETTINGS) as cache:
        cache.prefill(PROMPT).release()
        stats = cache.stats()
        assert stats.snapshot_bytes <= stats.checkpoints * cache.engine.layout.snapshot_bytes


@pytest.mark.parametrize("name", ["gemma3n", "kimi_k3"])
def test_another_thread_can_use_a_model_whose_forward_left_new_arrays(name):
    """Made here, run by the worker to read a prompt, and then by the caller again."""
    model = tiny.made(families.BUILDERS[name])
    with HybridPromptCache(model, **SETTINGS) as cache:
        cache.prefill(PROMPT).release()
        found = tiny.cold_logits(model, PROMPT[:20])
    assert np.isfinite(np.array(found)).all()
