"""A running request's rows are held once: the store leaves its own in the request's caches meanwhile."""

import gc
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import pytest
import tiny
from long import forms, mostly_long
from odd_models.wide import wide_model
from state_machine import bounds

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.caches import checkpoint as checkpoints
from mlx_hybridcache.caches.room import rounded
from mlx_hybridcache.store.lazy_rows import has_lazy_rows

REPLY = 8

LAYERS = 4
"""Two are attention: an array of rows is a quarter of all rows."""

Reply = list[tuple[int, np.ndarray[Any, Any]]]
PLAIN: dict[tuple[int, tuple[int, ...]], Reply] = {}


def roomy(model: Any = None, **settings: Any) -> HybridPromptCache:
    return oracle.new_cache(
        wide_model(LAYERS) if model is None else model,
        tokenizer=oracle.word_tokenizer(),
        **{"memory_budget": "1GB", **settings},
    )


def budget_for(tokens: int, checkpoints_beside: float) -> int:
    """Bytes for one running request and so many checkpoints, rows counted once."""
    with roomy() as probe:
        layout = probe.engine.layout
        capacity = rounded(tokens + REPLY)
        return layout.running_bytes(capacity) + int(checkpoints_beside * layout.snapshot_bytes)


@contextmanager
def tight(budget: int, model: Any = None) -> Iterator[HybridPromptCache]:
    """A cache of `budget` bytes that never holds more, and MLX not more than it says."""
    with roomy(model, memory_budget=budget) as cache:
        gc.collect()
        mx.clear_cache()
        baseline = mx.get_active_memory()
        store = cache.engine.tiers.memory
        watched = bounds.WatchedBudget.of(store.budget)
        yield cache
        cache.stats()
        assert store.budget.running_bytes == 0
        assert watched.over == []
        assert cache.engine.tiers._materializer._sources == []
        assert not any(has_lazy_rows([node]) for node in store.nodes())
        mx.clear_cache()
        off = cache.worker.call(mx.get_active_memory) - baseline - store.budget.used_bytes
        assert abs(off) <= budget / 100


def answer(cache: HybridPromptCache, tokens: Sequence[int], **options: Any) -> list[Any]:
    return list(cache.stream_generate(list(tokens), REPLY, sampler=oracle.never_ending, **options))


def plainly(model: nn.Module, tokens: tuple[int, ...]) -> Reply:
    """Plain mlx-lm's reply, asked for once."""
    if (id(model), tokens) not in PLAIN:
        with roomy(model) as other:
            plain = answer(other, tokens, use_cache=False)
            PLAIN[id(model), tokens] = [(each.token, np.array(each.logprobs)) for each in plain]
    return PLAIN[id(model), tokens]


def assert_as_plain(cache: HybridPromptCache, tokens: Sequence[int], reply: list[Any]) -> None:
    """The reply has the tokens and the logits that plain mlx-lm gives."""
    plain = plainly(cache.engine.model, tuple(tokens))
    assert [each.token for each in reply] == [token for token, _ in plain]
    for ours, (_, theirs) in zip(reply, plain, strict=True):
        assert oracle.agree(ours.logprobs, mx.array(theirs))


def assert_all_points_as_plain(cache: HybridPromptCache, every: int = 1) -> None:
    """A reply behind each stored checkpoint, or behind each so many of them, is plain mlx-lm's."""
    points = cache.checkpoints()
    assert points
    for tokens in points[::every]:
        asked = [*tokens, *oracle.TAIL]
        assert_as_plain(cache, asked, answer(cache, asked))


@pytest.mark.parametrize("every", forms(4, 1))
def test_a_conversation_goes_on_where_its_rows_fit_once_only(every):
    """900 tokens and their reply, then 30 more: where rows fit 1.4 times, all of the first is restored."""
    tokens = oracle.prompt(900, seed=1)
    with tight(budget_for(990, 1.5)) as cache:
        history = [*tokens, *(each.token for each in answer(cache, tokens))]
        stats = cache.stats()
        assert stats.rows_bytes > cache.engine.tiers.memory.budget.limit_bytes / 2
        longer = [*history, *oracle.prompt(30, seed=2)]
        reply = answer(cache, longer)
        assert cache.last_report.restored_tokens >= 899
        assert_as_plain(cache, longer, reply)
        assert_all_points_as_plain(cache, every)


def test_a_checkpoint_goes_rather_than_that_all_is_read_again():
    """Room for the running request alone, not for the checkpoint it begins at: it gets that one's bytes."""
    tokens = oracle.prompt(700, seed=3)
    with tight(budget_for(990, 0.8)) as cache:
        history = [*tokens, *(each.token for each in answer(cache, tokens))]
        longer = [*history, *oracle.prompt(250, seed=4)]
        reply = answer(cache, longer)
        assert cache.last_report.restored_tokens >= 700 - 64
        assert cache.stats().evictions > 0
        assert_as_plain(cache, longer, reply)


def test_a_pinned_checkpoint_does_not_go_for_a_request():
    """The same prompt, its checkpoint pinned: the request is served, and the pin stays."""
    tokens = oracle.prompt(300, seed=5)
    with roomy() as probe:
        answer(probe, tokens)
        weight = 2 * probe.engine.layout.snapshot_bytes + 400 * probe.engine.layout.row_bytes
    with tight(2 * weight) as cache:
        answer(cache, tokens)
        position = cache.pin(tokens)
        longest = (
            cache.engine.tiers.memory.budget.limit_bytes - weight
        ) // cache.engine.layout.row_bytes
        for seed in range(3):
            answer(cache, [*tokens, *oracle.prompt(longest // 2, seed=seed)])
        assert cache.lookup([*tokens, 1]).restored_tokens >= position
        assert cache.stats().pinned == 1


@pytest.mark.parametrize(
    "name",
    mostly_long(
        ["qwen3_next", "qwen3", "deepseek_v3", "gemma3_text", "jamba"], ["qwen3_next", "qwen3"]
    ),
)
def test_a_follower_restores_from_the_caches_of_its_leader(name):
    """A budget without room for copies: the second of two prompts begins in the first one's caches."""
    model = tiny.build(name)
    shared = oracle.prompt(500, seed=6)
    first, second = ([*shared, *oracle.prompt(60, seed=seed)] for seed in (7, 8))
    with roomy(model) as probe:
        layout = probe.engine.layout
        need = 2 * layout.running_bytes(rounded(560 + REPLY)) + 4 * layout.snapshot_bytes
    with roomy(model, memory_budget=need + need // 20) as cache:
        started: list[Any] = []
        lazy: list[bool] = []

        def begin(read: int, total: int) -> None:
            if not started:
                started.append(cache.stream_generate(second, REPLY, sampler=oracle.never_ending))
            lazy.append(any(has_lazy_rows([node]) for node in cache.engine.tiers.memory.nodes()))

        replies = [answer(cache, first, prompt_progress_callback=begin), list(started[0])]
        assert started[0].report.restored_tokens >= 500 - 64
        assert any(lazy) is layout.shares_rows
        for tokens, reply in zip((first, second), replies, strict=True):
            assert_as_plain(cache, tokens, reply)
        assert cache.stats().running_bytes == 0
        assert not any(has_lazy_rows([node]) for node in cache.engine.tiers.memory.nodes())


@pytest.mark.parametrize("at", mostly_long([64, 320, 640], [320]))
def test_a_reading_that_is_cancelled_leaves_all_that_it_read(at):
    """Left after `at` of 700 tokens, where the budget holds its rows once: the next one begins there."""
    tokens = oracle.prompt(700, seed=9)
    with tight(budget_for(700, 2.5)) as cache:
        stream: Any = None

        def stop(read: int, total: int) -> None:
            if read >= at:
                stream.cancel()

        stream = cache.stream_generate(tokens, REPLY, prompt_progress_callback=stop)
        list(stream)
        reply = answer(cache, tokens)
        assert at <= cache.last_report.restored_tokens <= at + 64
        assert_as_plain(cache, tokens, reply)


def test_a_reply_that_is_left_gives_its_rows_to_the_store():
    """Two tokens were taken: the prompt's end restores, and nothing runs."""
    tokens = oracle.prompt(700, seed=10)
    with tight(budget_for(700, 1.5)) as cache:
        stream = cache.stream_generate(tokens, 50, sampler=oracle.never_ending)
        next(stream), next(stream)
        stream.close()
        reply = answer(cache, tokens)
        assert cache.last_report.restored_tokens >= 700 - 64
        assert_as_plain(cache, tokens, reply)


def test_replies_at_once_are_right_where_no_batch_has_room():
    """Four prompts under one budget that holds the rows of each once."""
    prompts = [oracle.prompt(400, seed=seed) for seed in range(20, 24)]
    with tight(4 * budget_for(400, 1.5)) as cache:
        streams = [
            cache.stream_generate(tokens, REPLY, sampler=oracle.never_ending) for tokens in prompts
        ]
        for tokens, stream in zip(prompts, streams, strict=True):
            assert_as_plain(cache, tokens, list(stream))
        for tokens in prompts:
            assert_as_plain(cache, tokens, answer(cache, tokens))


def test_a_restore_that_fails_half_way_lets_go_with_one_line(monkeypatch, caplog):
    """MLX has no memory while rows move out of the store: they are gone, said once, and the reply is right."""
    tokens = oracle.prompt(700, seed=11)
    original, calls = checkpoints.restore, []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(options["is_spent"])
        if len(calls) == 2:
            raise RuntimeError("[malloc] Unable to allocate 1 bytes.")
        return original(*args, **options)

    with tight(budget_for(760, 1.5)) as cache:
        monkeypatch.setattr(checkpoints, "restore", failing)
        answer(cache, tokens)
        with caplog.at_level(logging.WARNING):
            reply = answer(cache, [*tokens, *oracle.prompt(20, seed=12)])
        assert calls == [False, True, False], "the second one moved what it restored"
        assert [r.message for r in caplog.records if "Let go of" in r.message]
        assert_as_plain(cache, [*tokens, *oracle.prompt(20, seed=12)], reply)


def test_rows_move_in_pieces_that_are_cheap_to_cut():
    """3,000 tokens move to the store in pieces of at most 2,048: another branch splits one of them."""
    tokens = oracle.prompt(3000, seed=13)
    model = tiny.build("qwen3")
    with roomy(model, prefill_step_size=8192) as cache:
        need = cache.engine.layout.running_bytes(rounded(3000 + REPLY))
    with roomy(model, prefill_step_size=8192, memory_budget=int(need * 1.8)) as cache:
        answer(cache, tokens)
        lengths = [r.end - r.start for node in cache.engine.tiers.memory.nodes() for r in node.rows]
        assert sum(lengths) >= 3000
        assert max(lengths) <= 2048
        branch = [*tokens[:1500], *oracle.prompt(50, seed=14)]
        assert_as_plain(cache, branch, answer(cache, branch))
        assert cache.last_report.restored_tokens == 1500


def test_a_request_leaves_as_long_a_prefix_as_fits_with_what_restores_it():
    """Where its rows do not all fit: no row stays without a checkpoint, and more memory leaves more."""
    tokens, left = oracle.prompt(1000, seed=17), []
    model = tiny.build("qwen3_next")  # an array of rows is half of all rows
    with roomy(model) as cache:
        row_bytes = cache.engine.layout.row_bytes
        need = cache.engine.layout.running_bytes(rounded(1000 + REPLY))
    for part in (1.25, 1.3, 1.35, 1.4, 1.45):
        with roomy(model, memory_budget=int(need * part)) as cache:
            assert_as_plain(cache, tokens, answer(cache, tokens))
            left.append(cache.lookup([*tokens, *oracle.TAIL]).restored_tokens)
            assert cache.stats().rows_bytes == left[-1] * row_bytes
    assert 0 < left[0] < left[-1]
    assert left == sorted(left)


def test_a_roomy_store_owns_what_was_read_before_the_reply_ends():
    """Then files can be written and batches formed meanwhile: nothing is lazy behind a slice, nor behind the
    first token.
    """
    tokens, lazy = oracle.prompt(500, seed=15), []

    def look(read: int, total: int) -> None:
        lazy.append(any(has_lazy_rows([node]) for node in cache.engine.tiers.memory.nodes()))

    with roomy() as cache:
        stream = cache.stream_generate(
            tokens, REPLY, sampler=oracle.never_ending, prompt_progress_callback=look
        )
        next(stream), next(stream)
        assert len(lazy) > 2
        assert not any(lazy)
        cache.stats()
        nodes = list(cache.engine.tiers.memory.nodes())
        assert sum(node.rows_nbytes for node in nodes) >= 499 * cache.engine.layout.row_bytes
        assert not any(has_lazy_rows([node]) for node in nodes)
        list(stream)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3"])
def test_what_parts_ways_with_a_running_request_keeps_its_own_rows(name):
    """Two prompts part ways at 300; the first one's rows were cleared while it runs, and then room is short:
    what is stored of the second is still the second's.
    """
    model = tiny.build(name)
    shared = oracle.prompt(300, seed=6)
    first, second = ([*shared, *oracle.prompt(60, seed=seed)] for seed in (7, 8))
    with roomy(model) as cache:
        running = cache.stream_generate(first, 500, sampler=oracle.never_ending)
        begun = [next(running)]
        cache.clear()
        list(
            cache.warm(second)
        )  # a reply would share a batch with the first, whose caches then leave it anew
        cache.worker.call(lambda: cache.engine.tiers.memory.shrink(0))
        asked = [*second, *oracle.TAIL]
        assert_as_plain(cache, asked, answer(cache, asked))
        assert_as_plain(cache, first, [*begun, *itertools.islice(running, REPLY - 1)])
        running.cancel()
        list(running)
        if cache.checkpoints():
            assert_all_points_as_plain(cache)


@pytest.mark.parametrize("requests", forms(8, 30))
def test_long_random_use_under_a_small_budget_stays_right(requests):
    """Requests on three families of prompts, some left half way: every reply and every point agrees."""
    chance = np.random.default_rng(16)
    families = [oracle.prompt(400, seed=30 + i, openers=range(100, 400, 75)) for i in range(3)]
    with tight(budget_for(400, 3)) as cache:
        for _ in range(requests):
            family = families[chance.integers(3)]
            tokens = family[: chance.choice([65, 130, 200, 270, 399])]
            if chance.random() < 0.5:
                tokens = [*tokens[:-10], *oracle.prompt(40, seed=int(chance.integers(4)))]
            stream = cache.stream_generate(tokens, REPLY, sampler=oracle.never_ending)
            if chance.random() < 0.2:
                stream.cancel()
                list(stream)
                continue
            assert_as_plain(cache, tokens, list(stream))
        assert_all_points_as_plain(cache)
