"""A request's buffers stay for the next turn, which goes on in them without copying a row."""

import gc
import itertools
from typing import Any

import mlx.core as mx
import oracle
import pytest
import tiny
from conversations import (
    PROMPT,
    REPLY,
    answer,
    assert_same,
    copied_rows,
    new_cache,
    plainly,
    taken_over,
    tokens_of,
    without_retaining,
)
from long import mostly_long
from odd_models.wide import wide_model
from state_machine import bounds

from mlx_hybridcache.caches.live import LiveCaches


@pytest.mark.parametrize(
    "name", mostly_long(["qwen3_next", "qwen3", "jamba"], ["qwen3_next", "qwen3"])
)
def test_a_repeat_and_the_next_turns_copy_no_row(name):
    """800 tokens, the same again, then three turns of 48 more: after the first, nothing is copied to be resumed."""
    tokens = oracle.prompt(800, seed=1)
    with new_cache(name) as cache, copied_rows() as copied:
        for turn in range(5):
            reply = answer(cache, tokens)
            assert cache.last_report.restored_tokens >= (len(tokens) - 70 if turn else 0)
            assert_same(reply, plainly(tokens, name=name))
            if turn:
                tokens = [*tokens, *tokens_of(reply), *oracle.prompt(40, seed=turn)]
        assert copied == [0]
        assert taken_over(cache) == 4


def test_rows_that_another_reply_left_are_copied_alone():
    """Two replies to one prompt: the turn behind the first copies that one's rows over the second's, which are in
    the buffers, and no others.
    """
    with new_cache() as cache:
        reply = answer(cache, PROMPT)
        other = list(
            cache.stream_generate(
                PROMPT, REPLY, sampler=lambda logprobs: (logprobs.argmax(-1) + 1) % 100
            )
        )
        assert tokens_of(other)[0] != tokens_of(reply)[0]
        longer = [*PROMPT, *tokens_of(reply), *oracle.prompt(20, seed=2)]
        with copied_rows() as copied:
            assert_same(answer(cache, longer), plainly(longer))
        assert copied == []
        assert cache.last_report.restored_tokens >= 707
        assert taken_over(cache) == 2


def test_bytes_are_bounded_at_every_moment_and_buffers_are_written_where_they_lie():
    """A conversation of 3,900 tokens under a budget for three times its rows: what MLX holds is what is counted, and
    a turn in retained buffers holds no second copy of them.
    """
    tokens = oracle.prompt(3900, seed=3)
    with oracle.new_cache(wide_model(4), tokenizer=oracle.word_tokenizer()) as probe:
        rows = probe.engine.layout.row_bytes * 4096
        budget = 3 * rows + 12 * probe.engine.layout.snapshot_bytes
    with oracle.new_cache(
        wide_model(4),
        tokenizer=oracle.word_tokenizer(),
        memory_budget=budget,
        prefill_step_size=512,
        checkpoint_every=2048,
    ) as cache:
        gc.collect()
        mx.clear_cache()
        baseline = mx.get_active_memory()
        store = cache.engine.tiers.memory
        watched = bounds.WatchedBudget.of(store.budget)
        for turn in range(5):
            with bounds.peak_of_mlx() as peak:
                reply = answer(cache, tokens)
            if turn:
                assert taken_over(cache) == turn
                assert peak[0] < rows, "a buffer that is held twice is copied when it is written"
            tokens = [*tokens, *tokens_of(reply), *oracle.prompt(20, seed=turn)]
            assert store.budget.retained_bytes >= rows
            off = cache.worker.call(mx.get_active_memory) - baseline - store.budget.used_bytes
            assert abs(off) <= budget / 100
        assert watched.over == []
        assert cache.stats().running_bytes == 0


@pytest.mark.parametrize("share", mostly_long([1.3, 2.0, 3.0, 5.0], [1.3, 3.0]))
def test_nothing_that_is_stored_goes_for_retained_buffers(share):
    """Turns of three conversations under budgets for so many of them: the same is stored, evicted and refused as
    without retaining, and the replies are the same.
    """
    seen = []
    for retains in (True, False):
        with new_cache() as probe:
            budget = int(share * probe.engine.layout.running_bytes(1024))
        with new_cache(memory_budget=budget) as cache:
            watched = bounds.WatchedBudget.of(cache.engine.tiers.memory.budget)
            if not retains:
                without_retaining(cache)
            chats = [oracle.prompt(520, seed=seed) for seed in range(3)]
            said: list[Any] = []
            for turn, which in enumerate([0, 0, 1, 0, 0, 2, 2, 1, 1, 0]):
                reply = answer(cache, chats[which])
                said.append((tokens_of(reply), cache.last_report.restored_tokens))
                chats[which] += [*tokens_of(reply), *oracle.prompt(25, seed=turn)]
            assert watched.over == []
            stats = cache.stats()
            seen.append((said, sorted(cache.checkpoints()), stats.evictions, stats.refusals))
            assert retains or not stats.taken_over
            assert share < 2 or not retains or stats.taken_over
    assert seen[0] == seen[1]


def test_nothing_is_retained_behind_an_error():
    """A sampler raises at the third token: what was read is stored, no buffer stays."""
    left = [3]

    def failing(logprobs: mx.array) -> mx.array:
        left[0] -= 1
        if left[0] == 0:
            raise ZeroDivisionError
        return oracle.never_ending(logprobs)

    with new_cache() as cache:
        with pytest.raises(ZeroDivisionError):
            list(cache.stream_generate(PROMPT, REPLY, sampler=failing))
        stats = cache.stats()
        assert (stats.retained_bytes, stats.running_bytes, len(cache.engine.tiers.pool)) == (
            0,
            0,
            0,
        )
        assert_same(answer(cache, PROMPT), plainly(PROMPT))
        assert cache.last_report.restored_tokens == 699
        assert taken_over(cache) == 0


@pytest.mark.parametrize("where", ["copies", "arrays", "evaluation"])
def test_a_failure_while_retaining_lets_go(where, monkeypatch):
    """MLX has no memory for it: the request was answered, all of its rows are stored, and no bytes are lost."""
    with new_cache() as cache:
        kind = type(next(k for k in cache.engine.layout.kinds if k.row_bytes))

        def fail(*_: Any, **__: Any) -> Any:
            raise RuntimeError("[malloc] Unable to allocate 1 bytes.")

        if where == "copies":
            calls = itertools.count()
            copies = LiveCaches.copies
            stream = cache.stream_generate(PROMPT, REPLY, sampler=oracle.never_ending)
            next(stream), next(stream)  # all of the prompt is the store's
            cache.stats()
            monkeypatch.setattr(
                LiveCaches, "copies", lambda self, r: fail() if not next(calls) else copies(self, r)
            )
            reply = tokens_of(list(stream))
        else:
            if where == "arrays":
                monkeypatch.setattr(kind, "take_arrays", fail)
            else:
                monkeypatch.setattr("mlx_hybridcache.caches.live.Retained", fail)
            reply = tokens_of(answer(cache, PROMPT))[2:]
        monkeypatch.undo()
        stats = cache.stats()
        assert (stats.retained_bytes, stats.running_bytes) == (0, 0)
        assert tokens_of(plainly(PROMPT))[2:] == reply
        longer = [*PROMPT, *tokens_of(plainly(PROMPT)), 5, 6]
        assert_same(answer(cache, longer), plainly(longer))
        assert cache.last_report.restored_tokens >= 700


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3"])
def test_rows_that_were_read_anew_are_not_those_in_the_buffers(name):
    """All that was stored is let go of, and read again in other slices: the buffers of before are of no use."""
    with oracle.new_cache(
        tiny.NoisyChunks(tiny.build(name)), tokenizer=oracle.word_tokenizer(), prefill_step_size=512
    ) as cache:
        answer(cache, PROMPT)
        tiers = cache.engine.tiers
        kept = tiers.pool._retained[0]
        cache.worker.call(tiers.memory.clear)
        assert tiers.pool._retained == [kept], "they are still there"
        list(cache.warm([*PROMPT[:300], 1]))
        list(cache.warm(PROMPT))  # in slices of 300 and 399
        first = answer(cache, PROMPT)
        assert taken_over(cache) == 0
        with oracle.new_cache(
            tiny.NoisyChunks(tiny.build(name)),
            tokenizer=oracle.word_tokenizer(),
            prefill_step_size=512,
        ) as other:
            list(other.warm([*PROMPT[:300], 1]))
            list(other.warm(PROMPT))
            assert_same(first, answer(without_retaining(other), PROMPT))


def test_rows_that_came_from_a_file_are_not_those_in_the_buffers(tmp_path):
    """Memory forgets, files do not: what is restored from them is copied, and its own buffers serve the turn behind."""
    with new_cache(cache_dir=tmp_path) as cache:
        reply = answer(cache, PROMPT)
        assert cache.flush(30)
        tiers = cache.engine.tiers
        cache.worker.call(tiers.memory.clear)
        assert len(tiers.pool) == 1
        assert_same(answer(cache, PROMPT), reply)
        assert cache.last_report.tier == "disk"
        assert taken_over(cache) == 0
        longer = [*PROMPT, *tokens_of(reply), 5, 6]
        assert_same(answer(cache, longer), plainly(longer))
        assert taken_over(cache) == 1
        assert cache.flush(30)


def test_nothing_is_held_behind_close_with_a_request_under_way():
    """Closed while a reply is written, and another's buffers are retained: MLX holds what it held before."""
    model = wide_model(6)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    cache = oracle.new_cache(model, tokenizer=oracle.word_tokenizer())
    answer(cache, PROMPT)
    stream = cache.stream_generate(oracle.prompt(300, seed=5), 500, sampler=oracle.never_ending)
    next(stream), next(stream)
    tiers = cache.engine.tiers
    cache.close()
    assert (len(tiers.pool), tiers.memory.budget.used_bytes) == (0, 0)
    del stream, cache, tiers
    gc.collect()
    mx.clear_cache()
    assert mx.get_active_memory() - before <= 100_000


def test_of_two_requests_at_once_one_takes_the_buffers():
    """Two turns of one conversation, both under way: one goes on in its buffers, the other copies."""
    with new_cache() as cache:
        reply = tokens_of(answer(cache, PROMPT))
        turns = [[*PROMPT, *reply, *oracle.prompt(20, seed=seed)] for seed in (6, 7)]
        with copied_rows() as copied:
            streams = [cache.stream_generate(t, 40, sampler=oracle.never_ending) for t in turns]
            begun = [[next(stream), next(stream)] for stream in streams]
            replies = [[*some, *stream] for some, stream in zip(begun, streams, strict=True)]
        for tokens, each in zip(turns, replies, strict=True):
            assert_same(each, plainly(tokens, 40))
        assert taken_over(cache) == 1
        assert len(copied) == 1
        assert cache.stats().running_bytes == 0


@pytest.mark.parametrize("at", [704, 900])
def test_a_request_that_leaves_midway_harms_nothing_of_what_it_took_over(at):
    """Cancelled when 704 of 1,100 tokens are read, or later: the conversation and its other branch go on rightly."""
    with new_cache() as cache:
        reply = answer(cache, PROMPT, 300)  # so that there is room
        history = [*PROMPT, *tokens_of(reply)]
        stream: Any = None

        def stop(read: int, total: int) -> None:
            if read >= at:
                stream.cancel()

        branch = [*history[:720], *oracle.prompt(200, seed=8)]
        stream = cache.stream_generate(branch, REPLY, prompt_progress_callback=stop)
        list(stream)
        stats = cache.stats()
        assert stats.running_bytes == 0
        for tokens in (branch, [*history, 5, 6], PROMPT):
            assert_same(answer(cache, tokens), plainly(tokens))
            assert cache.last_report.restored_tokens >= len(tokens) - 250


def test_a_reply_that_its_client_leaves_is_a_turn_like_any_other():
    """Closed after two of 300 tokens, as a server does at a stop word: the next turn takes its buffers over."""
    with new_cache() as cache:
        stream = cache.stream_generate(PROMPT, 300, sampler=oracle.never_ending)
        said = [next(stream).token, next(stream).token]
        stream.close()
        longer = [*PROMPT, *said, *oracle.prompt(20, seed=9)]
        assert_same(answer(cache, longer), plainly(longer))
        assert taken_over(cache) == 1


def test_another_salt_takes_nothing_over():
    """The same prompt under another salt is read from its first token on."""
    with new_cache() as cache:
        answer(cache, PROMPT, cache_salt="one")
        answer(cache, PROMPT, cache_salt="two")
        assert cache.last_report.restored_tokens == 0
        assert taken_over(cache) == 0
        assert_same(answer(cache, PROMPT, cache_salt="one"), plainly(PROMPT))
        assert taken_over(cache) == 1


def test_replies_of_a_batch_leave_no_buffers_and_go_on_rightly():
    """Two replies that were decoded together, then the next turn of each."""
    with new_cache() as cache:
        prompts = [PROMPT, oracle.prompt(690, seed=10)]
        with oracle.batch_sizes(cache.engine.model) as sizes:
            streams = [cache.stream_generate(p, 30, sampler=oracle.never_ending) for p in prompts]
            replies = [list(stream) for stream in streams]
        assert max(sizes) == 2
        for prompt, reply in zip(prompts, replies, strict=True):
            longer = [*prompt, *tokens_of(reply), *oracle.prompt(20, seed=11)]
            assert_same(answer(cache, longer), plainly(longer))


def test_another_request_reads_from_taken_over_buffers_while_they_run():
    """A branch begins behind rows that only a request in taken-over buffers holds."""
    with new_cache() as cache:
        reply = answer(cache, PROMPT, 250)
        longer = [*PROMPT, *tokens_of(reply), *oracle.prompt(50, seed=12)]
        other = [*longer[:-20], *oracle.prompt(30, seed=13)]
        started: list[Any] = []

        def begin(read: int, total: int) -> None:
            if read >= total - 1 and not started:
                started.append(cache.stream_generate(other, REPLY, sampler=oracle.never_ending))

        assert_same(answer(cache, longer, prompt_progress_callback=begin), plainly(longer))
        assert_same(list(started[0]), plainly(other))
        assert taken_over(cache) >= 1
        assert_same(answer(cache, [*other, 5]), plainly([*other, 5]))
