"""Whoever waits for a cache that is closed gets its result or hears of it."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from oracle import word_tokenizer
from worker_acts import Outcome, Setting, begun, ends, outcome

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.errors import ClosedError


@pytest.fixture
def prompt() -> list[int]:
    return tiny.random_tokens(300, seed=15)


@pytest.mark.parametrize("seed", range(8))
def test_every_caller_of_a_cache_that_is_closed_hears_of_it(
    seed: int, prompt: list[int], tmp_path: Path
) -> None:
    """Prefills, replies and figures beside two closes: their results, or ClosedError; no ValueError."""
    draw = random.Random(seed)
    cache = HybridPromptCache(
        tiny.build("qwen3_next"),
        memory_budget="100MB",
        prefill_step_size=16,
        checkpoint_min_step=1,
        cache_dir=tmp_path / "cache",
    )
    acts: list[Callable[[Setting], Any]] = [
        lambda _: cache.prefill(prompt).release(),
        lambda _: cache.restore(prompt).release(),
        lambda _: cache.lookup(prompt),
        lambda _: cache.stats(),
        lambda _: cache.flush(),
        lambda _: cache.clear(),
    ]
    doing = [*acts, *draw.choices(acts, k=2)]
    draw.shuffle(doing)
    barrier = threading.Barrier(len(doing) + 2)
    found: list[Outcome] = []

    def run(act: Callable[[Setting], Any]) -> None:
        barrier.wait()
        found.append(outcome(act, None))  # type: ignore[arg-type]

    def close_it() -> None:
        barrier.wait()
        cache.close()
        assert not cache.is_alive
        assert cache.engine.tiers.disk is not None
        assert not cache.engine.tiers.disk.thread.directory.is_writer

    threads = [begun(lambda act=act: run(act)) for act in doing]  # type: ignore[misc]
    threads += [begun(close_it) for _ in range(2)]
    for thread in threads:
        ends(thread, thread)
    assert len(found) == len(doing)
    assert {kind for kind, _ in found} <= {"result", "closed"}, found


def test_a_prefill_that_a_close_cuts_short_says_so(prompt: list[int]) -> None:
    """The cache is closed between two slices of the prompt: ClosedError, not a tuple that lacks its item."""
    cache = HybridPromptCache(
        tiny.build("qwen3_next"), memory_budget="100MB", prefill_step_size=16, checkpoint_min_step=1
    )
    closers: list[threading.Thread] = []

    def on_progress(read: int, total: int) -> None:
        if 0 < read < total and not closers:
            closers.append(begun(cache.worker.close))
            while cache.worker._stop.alive:
                time.sleep(0.001)

    with pytest.raises(ClosedError):
        cache.prefill(prompt, prompt_progress_callback=on_progress)
    ends(closers[0], "close")
    cache.close()


@pytest.mark.parametrize("written", [1, 5])
def test_a_reply_that_a_close_cuts_short_does_not_look_complete(
    prompt: list[int], written: int
) -> None:
    cache = HybridPromptCache(tiny.build("qwen3_next"), word_tokenizer(), memory_budget="100MB")
    reply = cache.stream_generate(prompt, 200)
    for _ in range(written):
        next(reply)
    cache.close()
    with pytest.raises(ClosedError, match="This cache was closed"):
        list(reply)


def test_a_reply_may_be_closed_behind_its_cache(prompt: list[int]) -> None:
    """Whoever stops it needs no rest of it."""
    cache = HybridPromptCache(tiny.build("qwen3_next"), word_tokenizer(), memory_budget="100MB")
    replies = [cache.stream_generate(prompt, 200) for _ in range(2)]
    for reply in replies:
        next(reply)
    cache.close()
    replies[0].close()
    asyncio.run(replies[1].aclose())
