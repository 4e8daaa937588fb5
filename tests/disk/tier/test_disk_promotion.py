"""From files into the caches of a request: the bytes that it holds for that, and when it gives them back."""

import gc
import threading
import time
from pathlib import Path

import mlx.core as mx
import oracle
import pytest
from directories.restarts import LENGTH, assert_as_cold, greedy, held_up, opened, until_idle, write
from long import mostly_long
from state_machine.cases import hybrid

from mlx_hybridcache import HybridPromptCache


def test_a_damaged_file_leaves_no_buffer_behind(tmp_path: Path) -> None:
    """2,000 tokens whose state is damaged: once the reply is over MLX holds what is reported, although
    Python's collector has not run.
    """
    tokens = oracle.prompt(2000, seed=59)
    write(tmp_path, tokens, name="qwen3_next")
    for path in tmp_path.rglob("*.state.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    with opened(tmp_path) as cache:
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        gc.disable()
        try:
            oracle.read(cache, tokens)
            held = mx.get_active_memory() - before - cache.stats().held_bytes
        finally:
            gc.enable()
        assert cache.disk_stats().rejected > 0
        assert held < 100_000


def assert_what_lingers_is_held(cache: HybridPromptCache, tokens: list[int]) -> None:
    """While files are to be read for a client that is gone."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    with held_up(cache):
        stream = cache.stream_generate(tokens, 4)
        while not stream._request.job.asleep:
            time.sleep(0.001)
        stream.close()
        lingering = cache.stats().lingering_bytes
        held = mx.get_active_memory() - before
    assert lingering > 0
    assert abs(held - lingering) < 10_000


def test_buffers_that_a_cancelled_promotion_no_longer_holds_do_not_linger(tmp_path: Path) -> None:
    """Memory has all rows and files the state: only that is read when the client goes."""
    tokens = oracle.prompt(LENGTH, seed=83)
    write(tmp_path, tokens)
    with opened(tmp_path, tokenizer=oracle.word_tokenizer()) as cache:
        oracle.read(cache, [*tokens, 1])
        store = cache.engine.tiers.memory

        def forget_states() -> None:
            for node in store.nodes():
                if node.end < LENGTH:
                    store.forget(node, rows=False)

        cache.worker.call(forget_states)
        assert cache.lookup(tokens).tier == "disk"
        assert_what_lingers_is_held(cache, tokens)


def test_of_quantized_rows_those_in_full_that_memory_has_do_not_linger(tmp_path: Path) -> None:
    """Which have buffers of their own: files are read into those of the quantized ones behind them."""
    tokens = oracle.prompt(LENGTH, seed=83)
    how = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 100, "cache_dir": tmp_path}
    with oracle.new_cache(hybrid(), **how) as cache:
        oracle.read(cache, tokens)
        assert cache.flush(30)
    with oracle.new_cache(hybrid(), **how, tokenizer=oracle.word_tokenizer()) as cache:
        oracle.read(cache, tokens[:160])
        assert cache.lookup(tokens).tier == "disk"
        assert_what_lingers_is_held(cache, tokens)


@pytest.mark.parametrize("late", [False, True])
def test_a_promotion_that_is_cancelled_gives_its_bytes_back(late: bool, tmp_path: Path) -> None:
    """The stream is closed before the files are read, or just after: nothing runs or is in flight then."""
    tokens = oracle.prompt(LENGTH, seed=97)
    write(tmp_path, tokens)
    with opened(tmp_path, tokenizer=oracle.word_tokenizer()) as cache:
        if late:
            worker_waits, go_on = threading.Event(), threading.Event()

            def wait() -> None:
                worker_waits.set()
                assert go_on.wait(60)

            with held_up(cache):
                stream = cache.stream_generate(tokens, 4)
                cache.stats()  # one turn later the read has been asked for
                cache.worker.post(wait)
                assert worker_waits.wait(60)
            done = threading.Event()
            cache.engine.tiers.disk.thread.change(lambda directory: done.set())
            assert done.wait(60)  # the outcome is posted, the worker has not seen it
            stream.cancel()
            go_on.set()
            stream.close()
        else:
            with held_up(cache):
                stream = cache.stream_generate(tokens, 4)
                while not stream._request.job.asleep:
                    time.sleep(0.001)
                stream.close()
                assert cache.stats().lingering_bytes > 0
                assert cache.stats().running_bytes == 0
        until_idle(cache)
        stats = cache.stats()
        assert (stats.running_bytes, stats.lingering_bytes) == (0, 0)
        assert_as_cold(cache, tokens)
        assert cache.last_report.tier == "disk"


def test_a_promotion_that_does_not_fit_falls_back_without_error(tmp_path: Path) -> None:
    """The smallest budget that serves: what files hold beyond it is computed instead, with cold's bits."""
    tokens = oracle.prompt(240, seed=98)
    write(tmp_path, tokens)
    with opened(tmp_path) as cache:
        layout = cache.engine.layout
    smallest = layout.running_bytes(256) + layout.snapshot_bytes + 256 * layout.row_bytes
    with opened(tmp_path, memory_budget=smallest) as cache:
        held = cache.restore(oracle.prompt(20, seed=99), max_tokens=8)
        held.release()
        assert_as_cold(cache, tokens)
        assert cache.stats().held_bytes <= smallest
    with opened(tmp_path, "llama") as cache:
        row_bytes = cache.engine.layout.row_bytes
    write(tmp_path, tokens, name="llama")
    with opened(tmp_path, "llama", memory_budget=512 * row_bytes) as cache:
        assert_as_cold(cache, tokens)
        assert cache.stats().held_bytes <= 512 * row_bytes


@pytest.mark.parametrize(
    "name",
    mostly_long(["llama", "llama-bf16", "qwen3_5-bf16", "gemma3_text"], ["llama", "gemma3_text"]),
)
def test_the_first_token_behind_a_promotion_copies_no_buffer(name: str, tmp_path: Path) -> None:
    """2,000 tokens came from files into buffers for 2,300: decoding takes as much more memory as it
    does behind a cold prefill, not a buffer more.
    """
    tokens = oracle.prompt(2000, seed=300)
    how = {"prefill_step_size": 512, "checkpoint_every": 512}

    def decoding_adds(cache: HybridPromptCache) -> int:
        ready = cache.prefill(tokens, max_tokens=100)
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        greedy(cache.engine.model, ready.prompt_cache, ready.rest, count=3)
        added = mx.get_peak_memory() - before
        ready.release()
        return added

    with opened(tmp_path, name, **how) as cache:
        control = decoding_adds(cache)
        layer = max(kind.row_bytes for kind in cache.engine.layout.kinds) * len(tokens)
        assert cache.flush(30)
    with opened(tmp_path, name, **how) as cache:
        added = decoding_adds(cache)
        assert cache.last_report.tier == "disk"
        assert added < control + layer // 4
