"""Whose buffers are retained, and when they go."""

import gc
from dataclasses import replace
from typing import Any

import mlx.core as mx
import oracle
import pytest
import tiny
from conversations import (
    PROMPT,
    answer,
    assert_same,
    new_cache,
    plainly,
    taken_over,
    tokens_of,
    without_retaining,
)
from odd_models import quantizing
from odd_models.wide import wide_model

from mlx_hybridcache import BudgetError
from mlx_hybridcache.caches.kinds.rows import RowBlock
from mlx_hybridcache.caches.retaining.buffers import Lineage


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen3_next", {"store_kv": 8}),
        ("qwen3", {"kv_bits": 8}),
        ("gemma3_text", {"swa_full": True}),
        ("mamba2", {}),
    ],
)
def test_what_is_not_stored_as_it_runs_is_not_retained(name, settings):
    """A smaller store, quantized rows, windows stored whole, states alone: as without."""
    model = quantizing.wide(name) if "kv_bits" in settings else tiny.build(name)
    with oracle.new_cache(model, tokenizer=oracle.word_tokenizer(), **settings) as cache:
        for _ in range(2):
            answer(cache, PROMPT)
        stats = cache.stats()
        assert (stats.retained_bytes, stats.taken_over) == (0, 0)


def test_exact_mode_takes_over_what_it_would_restore():
    """Noise by slices of 64: every turn of a conversation has the bits of a cold run."""
    tokens = oracle.prompt(400, seed=14)
    said = []
    for retains in (True, False):
        cache = oracle.new_cache(
            tiny.NoisyChunks(tiny.build("qwen3")), tokenizer=oracle.word_tokenizer(), exact=True
        )
        with cache:
            if not retains:
                without_retaining(cache)
            asked, seen = tokens, []
            for turn in range(4):
                reply = answer(cache, asked)
                seen.append((reply, cache.last_report.restored_tokens))
                asked = [*asked, *tokens_of(reply), *oracle.prompt(20, seed=turn)]
            assert (taken_over(cache) > 0) is retains
            said.append(seen)
    for (ours, restored), (theirs, as_restored) in zip(*said, strict=True):
        assert restored == as_restored
        assert_same(ours, theirs)


def test_drafts_that_are_taken_back_leave_right_buffers():
    """A client leaves in the middle of drafted tokens: the next turn begins behind those that it took."""
    with new_cache() as cache:
        first = tokens_of(answer(cache, PROMPT, 60))
        how = {"draft_from_cache": True, "num_draft_tokens": 6}
        stream = cache.stream_generate(PROMPT, 60, sampler=oracle.never_ending, **how)
        said = [next(stream).token for _ in range(9)]
        stream.close()
        assert said == first[:9]
        longer = [*PROMPT, *said, *oracle.prompt(20, seed=15)]
        assert_same(answer(cache, longer), plainly(longer))
        assert taken_over(cache) == 2


def test_buffers_that_are_too_short_for_a_reply_are_not_taken_over():
    """768 rows, and a reply of 300 tokens to 750: it has what any request would have had, and others no less."""
    with new_cache() as cache:
        reply = answer(cache, PROMPT)
        longer = [*PROMPT, *tokens_of(reply), *oracle.prompt(42, seed=16)]
        stream = cache.stream_generate(longer, 300, sampler=oracle.never_ending)
        begun = [next(stream), next(stream)]
        assert cache.stats().running_bytes == cache.engine.layout.running_bytes(1280)
        assert cache.stats().retained_bytes == 0
        assert_same([*begun, *stream], plainly(longer, 300))
        assert taken_over(cache) == 0


def test_retained_buffers_go_first_where_the_system_lacks_memory(monkeypatch):
    """As many bytes are missing as are retained: nothing that is stored goes. Twice as many: some of it does."""
    with new_cache() as cache:
        answer(cache, PROMPT)
        before = cache.stats()
        relief = cache.engine.relief
        for times, goes in ((1, False), (2, True)):
            missing = times * before.retained_bytes
            monkeypatch.setattr(
                relief.pressure,
                "excess",
                lambda held, coming=0, missing=missing: min(held, missing),
            )
            cache.worker.call(relief.relieve)
            monkeypatch.undo()
            stats = cache.stats()
            assert stats.retained_bytes == 0
            assert (stats.held_bytes < before.held_bytes - before.retained_bytes) is goes
            answer(cache, PROMPT)


@pytest.mark.parametrize("how", ["clear", "drop", "shrink", "claim"])
def test_retained_buffers_go_with_what_is_forgotten_and_for_whoever_needs_room(how):
    """Clearing, dropping, shrinking and a claim on all that is free: none is left, and no checkpoint went for it."""
    with new_cache() as cache:
        answer(cache, PROMPT)
        store, before = cache.engine.tiers.memory, cache.stats()
        assert before.retained_bytes > 0
        if how == "clear":
            cache.clear()
        elif how == "drop":
            cache.drop(PROMPT)
        elif how == "shrink":
            cache.worker.call(lambda: store.shrink(0))
        else:
            free = before.budget_bytes - before.held_bytes + before.retained_bytes
            cache.worker.call(lambda: store.claim(free).release())
        stats = cache.stats()
        assert (stats.retained_bytes, stats.evictions) == (0, 0)
        assert len(cache.engine.tiers.pool) == 0


def test_no_more_than_four_conversations_are_retained_and_the_newest_stay():
    """Five that end one after another: the first one's buffers went, the last one's serve."""
    with new_cache() as cache:
        prompts = [oracle.prompt(100, seed=20 + i) for i in range(5)]
        for prompt in prompts:
            answer(cache, prompt)
        assert len(cache.engine.tiers.pool) == 4
        answer(cache, prompts[0])
        assert taken_over(cache) == 0
        answer(cache, prompts[4])
        assert taken_over(cache) == 1


def test_a_request_that_cannot_be_granted_beside_its_own_buffers_is_refused_as_ever():
    """A reply whose room is more than the budget: refused before anything is taken, and the conversation goes on."""
    with new_cache() as probe:
        budget = 3 * probe.engine.layout.running_bytes(1024)
    with new_cache(memory_budget=budget) as cache:
        reply = tokens_of(answer(cache, PROMPT))
        with pytest.raises(BudgetError):
            answer(cache, [*PROMPT, *reply, 5], 8000)
        assert cache.stats().running_bytes == 0
        longer = [*PROMPT, *reply, 5, 6]
        assert_same(answer(cache, longer), plainly(longer))
        assert cache.last_report.restored_tokens >= 700


@pytest.mark.parametrize(("share", "most"), [(1.9, 300), (2.1, 300), (2.3, 700), (2.6, 700)])
def test_room_for_a_longer_reply_costs_nothing_that_is_stored(share, most):
    """A turn with room for 300 tokens beside two conversations, under 1.9 times 1,024 rows: its rows move into fresh
    buffers, which fit, and nothing goes so that it can take over those of the turn before.
    """
    with new_cache("qwen3") as probe:
        budget = int(share * probe.engine.layout.running_bytes(1024))
    with new_cache("qwen3", memory_budget=budget) as cache:
        answer(cache, oracle.prompt(450, seed=2), 4)
        longer = [*PROMPT, *tokens_of(answer(cache, PROMPT, 4)), 5]
        stream = cache.stream_generate(longer, most, sampler=oracle.never_ending)
        next(stream)
        assert cache.stats().evictions == 0
        stream.close()
        assert cache.last_report.restored_tokens >= 700


def test_a_record_of_a_failure_to_retain_holds_no_buffer(monkeypatch, caplog):
    """MLX has no memory for it, and a handler keeps the warning: MLX holds what is counted, 2 MB of buffers less."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[malloc] Unable to allocate 1 bytes.")

    with oracle.new_cache(wide_model(6), tokenizer=oracle.word_tokenizer()) as cache:
        gc.collect()
        mx.clear_cache()
        baseline = mx.get_active_memory()
        monkeypatch.setattr("mlx_hybridcache.caches.live.Retained", fail)
        answer(cache, PROMPT)
        assert "could not be retained: [malloc]" in caplog.text
        gc.collect()
        used = cache.engine.tiers.memory.budget.used_bytes
        off = cache.worker.call(mx.get_active_memory) - baseline - used
        assert abs(off) < cache.engine.layout.row_bytes * 70


def test_rows_of_a_long_history_are_known_by_where_they_lie():
    """Copied of three turns' rows, then its own: whose a stretch is, and whose bits a stored block has up to where."""
    lineage = Lineage(((0, 10, -1), (10, 30, -2), (30, 31, -3)))
    own = lineage.number
    stretches = [(0, 10), (3, 9), (10, 30), (29, 30), (30, 31), (9, 11), (25, 31), (31, 40)]
    assert [lineage.of(a, b) for a, b in stretches] == [-1, -1, -2, -2, -3, own, own, own]
    assert Lineage().of(0, 5) not in (own, -1, -2, -3)
    first, second, third = (
        RowBlock(a, b, (), lineage=-n) for n, (a, b) in enumerate([(0, 31), (10, 30), (30, 31)], 1)
    )
    assert [lineage.has(first, up_to) for up_to in (9, 10, 11, 31)] == [True, True, False, False]
    assert [lineage.has(second, up_to) for up_to in (12, 30)] == [True, True]
    assert lineage.has(third, 31)
    assert not lineage.has(replace(second, lineage=-1), 30)
    assert lineage.has(replace(second, lineage=own), 30)
