"""`lifetimes`: what restores a place is kept for a time, in memory and on disk, as long as anything else may go."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny
from directories.restarts import LENGTH, assert_as_cold, files, forget_memory, opened, write
from long import mostly_long

from mlx_hybridcache import ArgumentError, HybridPromptCache, PromptError

HEAD = 100


def tell(cache: HybridPromptCache, now: list[float]) -> None:
    """Both tiers go by this clock."""
    tiers = cache.engine.tiers
    stores = [tiers.memory, *([tiers.disk.catalogue.store] if tiers.disk.summary else [])]
    for each in stores:
        each.seconds = lambda: now[0]


def read(cache: HybridPromptCache, tokens: list[int], lifetimes: Mapping[int, float] = {}) -> Any:
    """The report of a prompt that is read, with its head as a boundary."""
    ready = cache.prefill(tokens, max_tokens=8, boundaries=[HEAD], lifetimes=lifetimes)
    ready.release()
    return ready.report


def crowd(cache: HybridPromptCache) -> None:
    """As many other prompts as push everything out."""
    for seed in range(100, 112):
        read(cache, oracle.prompt(LENGTH, seed=seed))
        cache.flush(30)


@pytest.mark.parametrize(
    "family", mostly_long(["qwen3_next", "gemma3_text", "llama"], ["qwen3_next"])
)
def test_what_restores_a_place_outlives_a_crowd_and_its_time(family: str) -> None:
    """A head of 100 of 300 tokens with 300 s: 12 others push the rest out, not it; 300 s later, it too."""
    now, tokens = [0.0], oracle.prompt(LENGTH, seed=1)
    model = tiny.build(family)
    with oracle.new_cache(model) as probe:
        read(probe, tokens)
        budget = probe.stats().held_bytes * 5
    with oracle.new_cache(model, memory_budget=budget) as cache:
        tell(cache, now)
        assert read(cache, tokens, {HEAD: 300}).soft_pins == 1
        crowd(cache)
        assert cache.lookup(tokens).restored_tokens >= HEAD
        assert_as_cold(cache, tokens)
        assert read(cache, tokens, {HEAD: 300}).restored_tokens >= HEAD
        now[0] = 300.0
        assert cache.stats().soft_pinned == 0
        crowd(cache)
        assert cache.lookup(tokens).restored_tokens < HEAD


def test_the_end_of_a_prompt_may_be_kept_and_is_where_it_is_resumed() -> None:
    """All of it is named: the checkpoint one token before; a place without its own keeps the one before it."""
    tokens = oracle.prompt(LENGTH, seed=2)
    with oracle.new_cache(tiny.build("qwen3_next")) as cache:
        assert read(cache, tokens, {LENGTH: 300, LENGTH - 1: 3600}).soft_pins == 1
        assert read(cache, tokens, {LENGTH - 1: 300, HEAD: 300, HEAD + 5: 300}).soft_pins == 2
        assert cache.stats().soft_pinned == 2
        assert read(cache, tokens).soft_pins == 0


def test_files_are_kept_for_their_time_too_and_a_restart_forgets_it(tmp_path: Path) -> None:
    """A disk budget for four prompts: of the kept one its head's checkpoint stays, until another run began."""
    now, tokens = [0.0], oracle.prompt(LENGTH, seed=3)
    write(tmp_path / "probe", tokens)
    budget = 4 * sum(files(tmp_path / "probe").values())
    with opened(tmp_path / "own", disk_budget=budget) as cache:
        tell(cache, now)
        read(cache, tokens, {HEAD: 300})
        assert cache.flush(30)
        crowd(cache)
        forget_memory(cache)
        found = cache.lookup(tokens)
        assert (found.restored_tokens >= HEAD, found.tier) == (True, "disk")
        assert_as_cold(cache, tokens)
        assert cache.flush(30)
    with opened(tmp_path / "own", disk_budget=budget) as cache:
        tell(cache, now)
        crowd(cache)
        forget_memory(cache)
        assert cache.lookup(tokens).restored_tokens < HEAD


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ([100], ArgumentError),
        ({100: "5m"}, ArgumentError),
        ({100: 0}, ArgumentError),
        ({100: True}, ArgumentError),
        ({100: math.nan}, ArgumentError),
        ({100: math.inf}, ArgumentError),
        ({"100": 300}, ArgumentError),
        ({301: 300}, PromptError),
    ],
)
def test_what_is_no_time_to_live_is_refused(given: Any, error: type[Exception]) -> None:
    """Before anything is read, by name."""
    with oracle.new_cache(tiny.build("qwen3_next")) as cache:
        with pytest.raises(error, match="lifetimes"):
            cache.prefill(oracle.prompt(LENGTH, seed=4), lifetimes=given)
        assert cache.prefill([1, 2, 3], lifetimes={3: 10**400, 0: 1.0}).report.soft_pins == 1
