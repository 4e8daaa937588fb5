"""Requests on several threads and event loops; cancelled, closed and failing ones."""

import asyncio
import gc
import threading

import mlx.core as mx
import pytest
import tiny
from bundled import load, text_tokens
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler
from odd_models import heads
from plain_replies import SMALL, plain, same

from mlx_hybridcache import (
    HybridPromptCache,
)
from mlx_hybridcache.worker.turns import PAUSE

# Threads


def test_a_generator_may_be_advanced_from_changing_threads(cache):
    """Every token of one reply is taken on a thread of its own."""
    prompt, taken = list(text_tokens(100)), []
    generation = cache.stream_generate(prompt, 10)
    for _ in range(10):
        thread = threading.Thread(target=lambda: taken.append(next(generation)))
        thread.start()
        thread.join()
    same(taken, plain(prompt, 10))


def test_two_open_generators_and_an_abandoned_one_block_nobody(cache):
    """Replies interleave; a third, taken once and dropped, gives its memory back."""
    a, b = list(text_tokens(100)), list(text_tokens(120, 300))
    abandoned = cache.stream_generate(list(text_tokens(90, 600)), 5000)
    next(abandoned)
    one, two = cache.stream_generate(a, 8), cache.stream_generate(b, 8)
    pairs = list(zip(one, two, strict=True))
    same([x for x, _ in pairs], plain(a, 8))
    same([y for _, y in pairs], plain(b, 8))
    assert cache.stats().running_bytes > 0
    del abandoned
    gc.collect()
    assert cache.stats().running_bytes == 0


@pytest.mark.parametrize("family", ["qwen3_next", "llama_llama3", "llama_yarn"])
def test_a_model_built_on_one_thread_is_served_from_others(family):
    """Scaled RoPE keeps lazy arrays that only the building thread may evaluate."""
    _, tokenizer = load()
    model = tiny.fresh(family)
    prompt, replies = tiny.random_tokens(100, 3), []
    with HybridPromptCache(model, tokenizer, memory_budget="100MB", **SMALL) as cache:

        def ask():
            replies.append([r.token for r in cache.stream_generate(prompt, 6)])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = [r.token for r in stream_generate(model, tokenizer, prompt, 6)]
    assert replies == [expected] * 4


def test_a_cache_may_be_built_and_closed_on_another_thread():
    """The model too; nothing is left behind."""
    _, tokenizer = load()
    lengths = []

    def work():
        model = tiny.fresh("llama_yarn")
        with HybridPromptCache(model, tokenizer, memory_budget="50MB", **SMALL) as cache:
            lengths.append(len(list(cache.stream_generate(tiny.random_tokens(80, 1), 5))))
        mx.clear_streams()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert lengths == [5]


# What ended threads leave behind


def streams_made():
    """Of MLX, in this process so far, with the one that asking takes: their names count them."""
    return int(str(mx.new_thread_unsafe_stream(mx.cpu)).rpartition(" ")[2].rstrip(")"))


def test_threads_that_build_a_cache_and_end_leave_no_stream_of_mlx(tmp_path):
    """Two each, and the process aborted at exit ("terminate called without an active exception"); a head's weights one."""
    model, tokenizer = load()
    heads.write(tmp_path, model, heads.fresh_layers(model))

    def build():
        with HybridPromptCache(model, tokenizer, memory_budget="50MB", **SMALL) as cache:
            cache.learn_mtp(tmp_path)
            assert len(list(cache.stream_generate("A lamp", 3))) == 3

    build()
    before = streams_made()
    for _ in range(6):
        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
    assert streams_made() - before == 1


@pytest.mark.parametrize("use_cache", [True, False])
def test_caches_that_were_closed_leave_no_stream_of_mlx(use_cache):
    """Each is a thread on the CPU, which wakes for every evaluation: one for each cache that ever was slows the rest.
    mlx-lm's own path makes one for each thread that it is called on, unless it is given another.
    """

    def use():
        with HybridPromptCache(*load(), memory_budget="50MB") as cache:
            reply = cache.stream_generate(list(text_tokens(100)), 3, use_cache=use_cache)
            assert len(list(reply)) == 3

    use()
    before = streams_made()
    for _ in range(6):
        use()
    assert streams_made() - before == 1


def test_threads_that_ask_and_end_leave_no_stream_of_mlx(cache):
    """Sampling without a seed begins where their own random state stands, and moves it on."""
    replies = []

    def ask():
        mx.random.seed(7)
        asked = [
            list(cache.stream_generate("A lamp", 8, sampler=make_sampler(2.0))) for _ in range(2)
        ]
        replies.append([[response.token for response in reply] for reply in asked])

    before = streams_made()
    for _ in range(6):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert streams_made() - before == 1
    (one, two), *others = replies
    assert one != two
    assert others == [[one, two]] * 5


# Cancellation


def test_a_cancelled_prefill_leaves_its_checkpoints(cache):
    """Cancelled in the slice that ends at 256: nothing more is read, and the retry restores all of that."""
    prompt = list(text_tokens(600))
    crossed, cancelled, places = threading.Event(), threading.Event(), []

    def on_progress(read, total):
        places.append(read)
        if read >= 256:
            crossed.set()
            cancelled.wait(60)

    generation = cache.stream_generate(prompt, 5, prompt_progress_callback=on_progress)
    assert crossed.wait(60)
    generation.cancel()
    cancelled.set()
    generation.close()
    assert places == [0, 64, 128, 192, 256]
    assert generation.report is None
    assert cache.stats().running_bytes == 0
    assert cache.lookup(prompt).restored_tokens == 256
    same(list(cache.stream_generate(prompt, 5)), plain(prompt, 5))


def test_a_closed_reply_leaves_what_was_said(cache):
    """After three tokens the state behind them is stored for whoever continues."""
    prompt = list(text_tokens(100))
    generation = cache.stream_generate(prompt, 500)
    said = [next(generation).token for _ in range(3)]
    generation.close()
    report = cache.lookup([*prompt, *said, 7])
    assert report.restored_tokens >= 99
    assert report.matched_tokens == 103
    assert list(generation) == []


def test_a_failing_callback_ends_its_request_only(cache):
    """The error reaches the reader; what was stored and the next request are untouched."""
    prompt = list(text_tokens(300))

    def failing(read, total):
        if read >= 128:
            raise RuntimeError("callback broke")

    with pytest.raises(RuntimeError, match="callback broke"):
        list(cache.stream_generate(prompt, 5, prompt_progress_callback=failing))
    assert cache.stats().running_bytes == 0
    same(list(cache.stream_generate(prompt, 5)), plain(prompt, 5))


# Event loops


def test_an_event_loop_reads_replies_side_by_side(cache):
    """`async for` gives what `for` gives, several at once on one loop, errors included."""

    async def read(prompt):
        return [response async for response in cache.stream_generate(prompt, 12)]

    async def both():
        return await asyncio.gather(read(list(text_tokens(70))), read(list(text_tokens(90))))

    def fails(logits):
        raise RuntimeError("sampler")

    async def failing():
        async for _ in cache.stream_generate([1, 2, 3], 4, sampler=fails):
            pass

    for hot, length in zip(asyncio.run(both()), (70, 90), strict=True):
        same(hot, plain(list(text_tokens(length))))
    with pytest.raises(RuntimeError, match="sampler"):
        asyncio.run(failing())


def test_a_cancelled_reader_on_a_loop_leaves_the_checkpoints(cache):
    """Cancelled after two tokens, the loop goes on and the prompt is stored."""
    prompt = list(text_tokens(200))

    async def read_two():
        generation = cache.stream_generate(prompt, 500)
        count = 0
        async for _ in generation:
            count += 1
            if count == 2:
                generation.cancel()
        return count

    assert 2 <= asyncio.run(read_two()) < 100
    assert cache.lookup(prompt).restored_tokens == 199


def test_what_comes_through_ends_the_request_where_it_ends(cache):
    """A view that stops after three tokens leaves the reply's end stored at exactly those three."""
    prompt = list(text_tokens(100))

    def three(steps):
        taken = 0
        for step in steps:
            if step is PAUSE:
                yield step
                continue
            taken += 1
            yield step.token
            if taken == 3:
                return

    tokens = list(cache.stream_generate(prompt, 50, through=three))
    assert tokens == [r.token for r in plain(prompt, 4)][:3]
    assert [*prompt, *tokens] in cache.checkpoints()
    assert not any(len(stored) > 103 for stored in cache.checkpoints())
