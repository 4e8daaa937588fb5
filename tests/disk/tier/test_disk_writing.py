"""What is written behind requests: all of it in time, nothing twice, and nothing on the worker thread."""

import functools
import gc
import sys
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import oracle
import pytest
from directories.restarts import (
    LENGTH,
    assert_as_cold,
    each_family,
    files,
    forget_memory,
    held_up,
    model_of,
    opened,
    until_idle,
    write,
)
from long import forms
from oracle import STEP

from mlx_hybridcache.disk.index import Index


def test_flush_writes_what_waits_and_says_when_it_did_not(tmp_path: Path) -> None:
    """While the disk thread is held up nothing is written: `flush(0)` says False, and later True."""
    with opened(tmp_path) as cache:
        assert cache.flush(0)
        with held_up(cache):
            for seed in range(3):
                oracle.read(cache, oracle.prompt(LENGTH, seed=20 + seed))
            stats = cache.disk_stats()
            assert stats.queued_bytes > 0
            assert not cache.flush(0)
            assert not cache.flush(0.05)
            assert files(tmp_path) == {}
        assert cache.flush(30)
        stats = cache.disk_stats()
        assert (stats.queued_bytes, stats.unwritten) == (0, 0)
        assert sum(files(tmp_path).values()) == stats.held_bytes == stats.written_bytes


@pytest.mark.parametrize("prompts", forms(16, 40))
def test_the_queue_is_bounded_and_what_waits_in_it_counts(prompts: int, tmp_path: Path) -> None:
    """A budget of 2 MB and a disk that stands still: at most a sixteenth and a segment is held, what the
    store let go of meanwhile counts until it is given back, and the budget holds.
    """
    budget = 2_000_000
    with opened(tmp_path, memory_budget=budget) as cache:
        lingering = 0
        with held_up(cache):
            for seed in range(prompts):
                oracle.read(cache, oracle.prompt(LENGTH, seed=30 + seed))
                stats = cache.stats()
                assert stats.held_bytes <= budget
                lingering = max(lingering, stats.lingering_bytes)
                assert cache.disk_stats().queued_bytes <= budget // 16 + 40_000
        assert lingering > 0
        assert cache.flush(30)
        assert cache.stats().lingering_bytes == 0


def test_closing_writes_what_there_is_time_for(tmp_path: Path) -> None:
    """Closed with 20 s to write: all is found again. With none: nothing more than was under way."""
    tokens = oracle.prompt(LENGTH, seed=40)
    for name, seconds in (("now", 0.0), ("later", 20.0)):
        cache = oracle.new_cache(model_of("qwen3_next"), cache_dir=tmp_path / name)
        cache.engine.tiers.disk.write_behind._rest_until = float("inf") if seconds == 0 else 0.0
        oracle.read(cache, tokens)
        cache.close(seconds)
    with opened(tmp_path / "now") as cache:
        assert cache.lookup(tokens).restored_tokens == 0
    with opened(tmp_path / "later") as cache:
        assert cache.lookup(tokens).restored_tokens == LENGTH - 1


@pytest.mark.parametrize("prompts", forms(16, 40))
def test_what_was_let_go_before_it_was_written_is_let_go_of(prompts: int, tmp_path: Path) -> None:
    """Many prompts through 2 MB while the disk stands still: what it never got is not held for it."""
    with opened(tmp_path, memory_budget=2_000_000) as cache, held_up(cache):
        oracle.read(cache, oracle.prompt(LENGTH, seed=60))
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory() - cache.stats().held_bytes
        for seed in range(61, 61 + prompts):
            oracle.read(cache, oracle.prompt(LENGTH, seed=seed))
        held = mx.get_active_memory() - before - cache.stats().held_bytes
        assert held < 200_000


def test_what_a_request_used_is_what_the_index_notes(tmp_path: Path) -> None:
    """A prompt that ends at a checkpoint resumes from the one before, 199: that one is the newest now."""
    base = oracle.prompt(LENGTH, seed=88)
    with opened(tmp_path) as cache:
        oracle.read(cache, base[:200])
        oracle.read(cache, base)
        assert cache.flush(30)
        forget_memory(cache)
        ready = cache.restore(base[: 4 * STEP])
        ready.release()
        assert (ready.position, ready.report.tier) == (199, "disk")
        until_idle(cache)
        index = Index.read_only(tmp_path / "index.sqlite")
        states = [entry for entry in index.load() if entry.segment.kind == "state"]
        index.close()
        assert max(states, key=lambda entry: entry.used).segment.end == 199


@each_family
def test_nothing_is_written_twice(name: str, tmp_path: Path) -> None:
    """A prompt read again, from memory, from files, and in a later run: not a byte more is written."""
    tokens = oracle.prompt(LENGTH, seed=93)
    write(tmp_path, tokens, name=name)
    before = files(tmp_path)
    with opened(tmp_path, name) as cache:
        for again in range(3):
            if again == 1:
                forget_memory(cache)
            oracle.read(cache, tokens)
            assert cache.flush(30)
            assert cache.disk_stats().written_bytes == 0
    assert files(tmp_path) == before


def test_no_row_is_written_twice_however_dense_the_checkpoints_are(tmp_path: Path) -> None:
    """A prompt of 300 tokens with checkpoints at 16, 32, 64, ...: its files of rows adjoin."""
    write(tmp_path, oracle.prompt(LENGTH, seed=94))
    with opened(tmp_path) as cache:
        rows = sorted(
            (one.start, one.end)
            for one in cache.engine.tiers.disk.catalogue.segments()
            if one.kind == "rows"
        )
        assert rows[0][0] == 0
        assert [a for a, _ in rows[1:]] == [b for _, b in rows[:-1]]


def test_a_file_of_which_only_a_part_is_needed_is_not_written_over(tmp_path: Path) -> None:
    """A run of 64 rows, branched from at 32, loses its lower half: when that is read again the file
    serves both once more.
    """
    base = oracle.prompt(LENGTH, seed=95)
    with opened(tmp_path, "llama") as cache:
        oracle.read(cache, base)
        oracle.read(cache, [*base[:160], *oracle.prompt(20, seed=96)])
        assert cache.flush(30)
        store = cache.engine.tiers.disk.catalogue.store
        lower = next(node for node in store.nodes() if node.start == 160 and node.end > 180)
        cache.worker.call(store.forget, lower, rows=True)
        forget_memory(cache)
        oracle.read(cache, base)
        assert cache.flush(30)
        until_idle(cache)
        for tokens in (base, [*base[:160], *oracle.prompt(20, seed=96)]):
            forget_memory(cache)
            assert cache.lookup(tokens).restored_tokens == len(tokens) - 1
            assert_as_cold(cache, tokens)
        assert cache.disk_stats().rejected == 0


FILE_EVENTS = ("open", "os.", "sqlite3.", "shutil.", "pathlib.", "tempfile.", "fcntl.")

_watched: dict[int, list[str]] = {}
"""Thread -> what it has done to files. A hook stays for the life of the process; this ends its work."""


@functools.cache
def watch_files() -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _watched and event.startswith(FILE_EVENTS):
            _watched.get(threading.get_ident(), []).append(f"{event} {arguments}")

    sys.addaudithook(hook)


@pytest.mark.parametrize("requests", forms(18, 40))
def test_no_file_is_touched_on_the_worker_thread(requests: int, tmp_path: Path) -> None:
    """Requests with writes, evictions in both tiers, promotions, a damaged file, pins and a
    `clear`: the disk thread opens files all the time, the worker not once.
    """
    watch_files()
    prompts = [oracle.prompt(LENGTH, seed=200 + seed % 7) for seed in range(requests)]
    write(tmp_path, *prompts[:7])
    how = {"memory_budget": 1_000_000, "disk_budget": 900_000, "tokenizer": oracle.word_tokenizer()}
    with opened(tmp_path, **how) as cache:
        list(cache.stream_generate(prompts[0], 4))  # whatever is imported late is imported now
        worker, disk = cache.worker._thread.ident, cache.engine.tiers.disk.thread.ident
        _watched.update({worker: [], disk: []})
        try:
            tiers = set()
            for at, tokens in enumerate(prompts):
                if at == requests // 2:
                    forget_memory(cache)
                    for path in tmp_path.rglob("*.state.safetensors"):
                        path.write_bytes(path.read_bytes()[:-1])
                list(cache.stream_generate(tokens, 4))
                tiers.add(cache.last_report.tier)
                cache.pin(tokens)
                cache.unpin(tokens)
                cache.lookup(tokens)
            cache.flush(30)
            stats = cache.disk_stats()
            cache.clear()
            until_idle(cache)
        finally:
            seen = dict(_watched)
            _watched.clear()
    assert tiers >= {"disk"}
    assert stats.written_bytes > 0 < stats.rejected
    assert cache.engine.tiers.memory.evictions > 0
    assert {"open", "os.remove", "os.rename"} <= {each.split()[0] for each in seen[disk]}
    assert seen[worker] == []
