"""Requests that fit once the disk thread lets go of something: they wait for it, and lose nothing."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import oracle
import pytest
from directories.restarts import (
    LENGTH,
    cold,
    forget_memory,
    greedy,
    held_up,
    opened,
    until_idle,
)

from mlx_hybridcache import BudgetError, CacheReport, HybridPromptCache
from mlx_hybridcache.caches.room import request_rows

LONG, OTHER = oracle.prompt(3000, seed=77), oracle.prompt(LENGTH, seed=78)


@contextmanager
def tight(directory: Path, more: int = 0) -> Iterator[HybridPromptCache]:
    """A cache with room for `LONG` by itself and `more` bytes."""
    with opened(directory) as cache:
        need = cache.engine.layout.running_bytes(request_rows(len(LONG), 4))
    with opened(directory, memory_budget=need + more, tokenizer=oracle.word_tokenizer()) as cache:
        yield cache


class Asked(Thread):
    """A request for `LONG` in a thread of its own: the report on it, and what comes behind the prompt."""

    def __init__(self, cache: HybridPromptCache):
        super().__init__()
        self.cache = cache
        self.start()

    def run(self) -> None:
        ready = self.cache.prefill(LONG, max_tokens=4)
        self.report = ready.report
        self.logits = greedy(self.cache.engine.model, ready.prompt_cache, ready.rest)
        ready.release()

    def ended(self) -> CacheReport:
        """Its report, once it has the right reply."""
        self.join(60)
        assert not self.is_alive()
        assert oracle.distance(self.logits, cold(self.cache.engine.model, LONG)) == 0
        return self.report


def waits(cache: HybridPromptCache) -> bool:
    """Whether a request waits for the disk thread, of which something is held for it then."""
    for _ in range(200):
        if cache.worker.call(lambda: len(cache.engine.tiers.disk._waiting)):
            return cache.stats().lingering_bytes > 0
        time.sleep(0.005)
    return False


def test_a_request_waits_for_what_is_being_written(tmp_path: Path) -> None:
    """It is told nothing of it: the reply comes as soon as there is room."""
    with tight(tmp_path) as cache:
        with held_up(cache):
            oracle.read(cache, OTHER)
            asked = Asked(cache)
            assert waits(cache)
        assert asked.ended().reason == "cold"
        assert cache.flush(30)
        assert cache.stats().lingering_bytes == 0


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_what_is_stored_of_it_is_restored_then(tier: str, tmp_path: Path) -> None:
    """Rather than read again because there is no room for it at this moment."""
    with tight(tmp_path, 40_000) as cache:
        oracle.read(cache, LONG)
        assert cache.flush(30)
        with held_up(cache):
            if tier == "disk":
                forget_memory(cache)
            oracle.read(cache, OTHER)
            found = cache.lookup(LONG)
            asked = Asked(cache)
            assert waits(cache)
        report = asked.ended()
        assert report.tier == found.tier == tier
        assert report.restored_tokens == found.restored_tokens > 0


def test_who_goes_away_meanwhile_leaves_nothing(tmp_path: Path) -> None:
    """The next one has its reply."""
    with tight(tmp_path) as cache:
        with held_up(cache):
            oracle.read(cache, OTHER)
            stream = cache.stream_generate(LONG, 4)
            assert waits(cache)
            stream.close()
            assert cache.worker.call(lambda: cache.engine.tiers.disk._waiting) == []
            assert cache.stats().running_bytes == 0
            asked = Asked(cache)
            assert waits(cache)
        asked.ended()


def test_a_request_waits_for_a_read_that_nobody_wants_any_more(tmp_path: Path) -> None:
    """The buffers of a promotion that was cancelled are the disk thread's until it has read into them."""
    with tight(tmp_path, 40_000) as cache:
        oracle.read(cache, OTHER)
        assert cache.flush(30)
        forget_memory(cache)
        with held_up(cache):
            stream = cache.stream_generate(OTHER, 4)
            while not stream._request.job.asleep:
                time.sleep(0.001)
            stream.close()
            assert cache.disk_stats().queued_bytes == 0
            asked = Asked(cache)
            assert waits(cache)
        asked.ended()
        until_idle(cache)
        assert cache.stats().lingering_bytes == 0


def test_what_would_not_fit_then_either_is_refused_at_once(tmp_path: Path) -> None:
    """A pin takes the room."""
    with tight(tmp_path) as cache, held_up(cache):
        oracle.read(cache, OTHER)
        cache.pin(OTHER)
        with pytest.raises(BudgetError, match="pins"):
            cache.prefill(LONG, max_tokens=4)
