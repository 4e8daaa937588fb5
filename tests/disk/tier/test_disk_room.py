"""Requests that fit once the disk thread lets go of something: they wait for it, and lose nothing."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import mlx.core as mx
import oracle
import pytest
import tiny
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
from mlx_hybridcache.caches import room
from mlx_hybridcache.caches.room import ROW_STEP, request_rows

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


class Replied(Thread):
    """A reply of so many tokens at most, read in a thread of its own."""

    def __init__(self, cache: HybridPromptCache, prompt: list[int], most: int, **how: Any):
        super().__init__()
        self.stream = cache.stream_generate(
            prompt, most, sampler=oracle.never_ending, seed=0, **how
        )
        self.prompt, self.model = prompt, cache.engine.model
        self.tokens: list[int] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            for each in self.stream:
                self.tokens.append(each.token)
        except Exception as error:
            self.error = error

    @property
    def report(self) -> CacheReport:
        """What was found for it."""
        assert self.stream.report is not None
        return self.stream.report

    def ended(self) -> None:
        """It is over, and was what it should be."""
        self.join(60)
        assert not self.is_alive()
        assert self.error is None
        caches = tiny.cold_caches(self.model, self.prompt[:-1], oracle.STEP)
        feed = self.prompt[-1:]
        for token in self.tokens:
            logits = self.model(mx.array([feed]), cache=caches)[:, -1]
            assert token == oracle.never_ending(logits).item()
            feed = [token]


def waits(cache: HybridPromptCache) -> bool:
    """Whether a request waits for the disk thread, which holds something then."""
    for _ in range(200):
        if cache.worker.call(lambda: len(cache.engine.tiers.disk._waiting)):
            return cache.stats().lingering_bytes + cache.disk_stats().queued_bytes > 0
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


@pytest.mark.parametrize("more", [300_000, 400_000])
def test_what_is_being_written_of_it_is_not_given_up(more: int, tmp_path: Path) -> None:
    """Its rows may move into the request's caches only once the disk thread does not hold them any more."""
    with tight(tmp_path, more) as cache:
        with held_up(cache):
            assert [*cache.stream_generate(LONG, 1)]
            found = cache.lookup(LONG)
            asked = Replied(cache, LONG, 4)
            assert waits(cache)
        asked.ended()
        assert asked.report.restored_tokens == found.restored_tokens > 500


def test_nothing_goes_for_what_has_no_room_before_that(tmp_path: Path) -> None:
    """The last checkpoint of a prompt is not let go of for the next one, where what is being written is in the way."""
    with tight(tmp_path, 800_000) as cache, held_up(cache):
        oracle.read(cache, LONG)
        assert cache.lookup([*LONG, *oracle.TAIL]).restored_tokens > 2800


def test_nothing_more_is_written_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a request would wait for all that is due, file after file."""
    with tight(tmp_path) as cache:
        disk = cache.engine.tiers.disk
        write, waiting = disk.thread.write, list[int]()

        def noted(*args: Any, **how: Any) -> None:
            waiting.append(asked is not None and asked.is_alive() and not asked.tokens)
            write(*args, **how)

        asked = None
        with held_up(cache):
            for seed in range(4):
                oracle.read(cache, oracle.prompt(LENGTH, seed=seed))
            assert cache.disk_stats().unwritten > 4
            asked = Replied(cache, LONG, 4)
            assert waits(cache)
            monkeypatch.setattr(disk.thread, "write", noted)
        asked.ended()
        assert cache.flush(30)
        assert not any(waiting)


@contextmanager
def growing(directory: Path, **how: Any) -> Iterator[tuple[HybridPromptCache, Replied]]:
    """A reply that has to grow while what is being written is in its way, with its cache."""
    with opened(directory, tokenizer=oracle.word_tokenizer()) as cache:
        layout, budget = cache.engine.layout, cache.engine.tiers.memory.budget
        tokens = LONG[: ROW_STEP - 16]
        with held_up(cache):
            oracle.read(cache, OTHER)
            forget_memory(cache)
            need = layout.running_bytes(2 * ROW_STEP) + layout.largest_buffer_bytes(ROW_STEP)
            budget.limit(need + budget.in_flight_bytes // 2)
            yield cache, (reply := Replied(cache, tokens, 40, **how))
        reply.ended()
        assert len(reply.tokens) == 40
        assert cache.flush(30)
        assert cache.stats().running_bytes == cache.stats().lingering_bytes == 0


@pytest.mark.parametrize("how", ["max_tokens", "best_effort", "use_cache"])
def test_a_reply_that_grows_waits_too(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than end in its middle: with an error, or with `length` where it gets what fits."""
    monkeypatch.setattr(room, "REPLY_ROOM", 16)
    monkeypatch.setattr(room, "FIRST_ROOM", 16)
    options = {
        "max_tokens": {},
        "best_effort": {"best_effort": True},
        "use_cache": {"use_cache": False},
    }
    with growing(tmp_path, **options[how]) as (cache, reply):
        assert waits(cache)
        assert 10 < len(reply.tokens) < 20


def test_a_request_without_the_cache_waits_too(tmp_path: Path) -> None:
    """Its bytes are claimed like those of others."""
    with tight(tmp_path) as cache:
        with held_up(cache):
            oracle.read(cache, OTHER)
            asked = Replied(cache, LONG, 4, use_cache=False)
            assert waits(cache)
        asked.ended()


def test_drafts_do_not_wait(tmp_path: Path) -> None:
    """A reply goes on without its draft model where that has no room: the disk is slower than the reply."""
    draft = tiny.fresh("qwen3")
    with opened(tmp_path, tokenizer=oracle.word_tokenizer()) as cache:
        cache.learn_draft(draft)
        layout, budget = cache.engine.layout, cache.engine.tiers.memory.budget
        tokens = LONG[:1000]
        with held_up(cache):
            oracle.read(cache, OTHER)
            forget_memory(cache)
            (own,) = cache.engine.drafting._known
            rows = request_rows(len(tokens), 8)
            need = layout.running_bytes(rows) + own.layout.running_bytes(rows)
            budget.limit(need + budget.in_flight_bytes // 2)
            asked = Replied(cache, tokens, 8, draft_model=draft)
            asked.ended()
        assert asked.report.draft_forwards == 0


def test_what_would_not_fit_then_either_is_refused_at_once(tmp_path: Path) -> None:
    """A pin takes the room."""
    with tight(tmp_path) as cache, held_up(cache):
        oracle.read(cache, OTHER)
        cache.pin(OTHER)
        with pytest.raises(BudgetError, match="pins"):
            cache.prefill(LONG, max_tokens=4)
