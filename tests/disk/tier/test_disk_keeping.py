"""What is pinned, cleared or dropped, also while it is being written."""

import gc
import threading
from pathlib import Path

import oracle
import pytest
from directories.restarts import (
    LENGTH,
    assert_as_cold,
    files,
    forget_memory,
    held_up,
    model_of,
    opened,
    until_idle,
    write,
)

from mlx_hybridcache.disk.tier.write_behind import WriteBehind


def test_pins_survive_a_restart_on_disk(tmp_path: Path) -> None:
    """One of 12 prompts is pinned; a disk budget for four of them keeps it over restarts, until it
    is unpinned.
    """
    tokens, others = oracle.prompt(LENGTH, seed=50), range(51, 57)
    write(tmp_path / "probe", tokens)
    budget = 4 * sum(files(tmp_path / "probe").values())
    with opened(tmp_path, disk_budget=budget) as cache:
        oracle.read(cache, tokens)
        assert cache.flush(30)
        assert cache.pin(tokens) == LENGTH - 1
    for start in (51, 57):
        with opened(tmp_path, disk_budget=budget) as cache:
            for seed in range(start, start + len(others)):
                oracle.read(cache, oracle.prompt(LENGTH, seed=seed))
                assert cache.flush(30)
    with opened(tmp_path, disk_budget=budget) as cache:
        assert cache.lookup(oracle.prompt(LENGTH, seed=51)).restored_tokens == 0
        assert (cache.lookup(tokens).restored_tokens, cache.lookup(tokens).tier) == (
            LENGTH - 1,
            "disk",
        )
        assert_as_cold(cache, tokens)
        cache.unpin(tokens)
        forget_memory(cache)
        for seed in range(70, 76):
            oracle.read(cache, oracle.prompt(LENGTH, seed=seed))
            assert cache.flush(30)
        forget_memory(cache)
        assert cache.lookup(tokens).restored_tokens < LENGTH - 1


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_pin_set_or_lifted_while_its_files_are_written_is_kept(
    is_pinned: bool, tmp_path: Path
) -> None:
    """`pin` while the disk stands still, and for the other case `unpin` too: so it is after a restart."""
    tokens = oracle.prompt(LENGTH, seed=58)
    with opened(tmp_path) as cache:
        with held_up(cache):
            oracle.read(cache, tokens)
            cache.pin(tokens)
            if not is_pinned:
                cache.unpin(tokens)
        assert cache.flush(30)
    with opened(tmp_path) as cache:
        nodes = cache.engine.tiers.disk.catalogue.store.nodes()
        assert [node.end for node in nodes if node.pinned] == [LENGTH - 1] * is_pinned


def test_a_file_is_pinned_as_it_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Who is killed before it hears that the file is there finds it pinned all the same."""
    tokens = oracle.prompt(LENGTH, seed=59)
    monkeypatch.setattr(WriteBehind, "_keep", lambda *heard: None)
    with opened(tmp_path) as cache:
        with monkeypatch.context() as later:
            later.setattr(WriteBehind, "write", lambda behind: None)
            oracle.read(cache, tokens)
            cache.pin(tokens)
        assert cache.flush(30)
    with opened(tmp_path) as cache:
        nodes = cache.engine.tiers.disk.catalogue.store.nodes()
        assert [node.end for node in nodes if node.pinned] == [LENGTH - 1]


def test_a_smaller_disk_budget_lets_go_what_is_over_it_even_pins(tmp_path: Path) -> None:
    """Four prompts, one pinned: a start with room for two keeps the pinned one; with room for a
    quarter of one it starts all the same.
    """
    prompts = [oracle.prompt(LENGTH, seed=80 + seed) for seed in range(4)]
    with opened(tmp_path) as cache:
        for tokens in prompts:
            oracle.read(cache, tokens)
        assert cache.flush(30)
        cache.pin(prompts[0])
        one = cache.disk_stats().held_bytes // 4
    with opened(tmp_path, disk_budget=2 * one) as cache:
        until_idle(cache)
        assert cache.lookup(prompts[0]).restored_tokens == LENGTH - 1
        assert sum(files(tmp_path).values()) == cache.disk_stats().held_bytes <= 2 * one
    with opened(tmp_path, disk_budget=one // 4) as cache:
        until_idle(cache)
        assert sum(files(tmp_path).values()) == cache.disk_stats().held_bytes <= one // 4
        assert_as_cold(cache, prompts[0])


def test_clear_deletes_the_files_and_what_comes_later_is_kept(tmp_path: Path) -> None:
    """Two prompts on disk, `clear`: no file is left, nothing is found; a third one is written."""
    with opened(tmp_path) as cache:
        for seed in (90, 91):
            oracle.read(cache, oracle.prompt(LENGTH, seed=seed))
        cache.clear()
        assert cache.flush(30)
        until_idle(cache)
        assert files(tmp_path) == {}
        assert cache.disk_stats().held_bytes == 0
        assert cache.lookup(oracle.prompt(LENGTH, seed=90)).restored_tokens == 0
        oracle.read(cache, oracle.prompt(LENGTH, seed=92))
    with opened(tmp_path) as cache:
        assert cache.lookup(oracle.prompt(LENGTH, seed=92)).restored_tokens == LENGTH - 1
        assert cache.lookup(oracle.prompt(LENGTH, seed=91)).restored_tokens == 0


def test_what_is_being_written_is_cleared_too(tmp_path: Path) -> None:
    """`clear` while the disk thread stands still: what it wrote afterwards is not found either."""
    tokens = oracle.prompt(LENGTH, seed=89)
    with opened(tmp_path) as cache:
        with held_up(cache):
            oracle.read(cache, tokens)
            cache.clear()
        assert cache.flush(30)
        until_idle(cache)
        assert (cache.lookup(tokens).restored_tokens, files(tmp_path)) == (0, {})
        assert cache.disk_stats().held_bytes == 0


def test_what_is_being_written_is_cleared_though_the_cache_closes_at_once(tmp_path: Path) -> None:
    """`clear` and `close(0)` while the disk thread stands still: no file is left to be adopted."""
    tokens = oracle.prompt(LENGTH, seed=86)
    with opened(tmp_path) as cache, held_up(cache) as go_on:
        oracle.read(cache, tokens)
        assert cache.disk_stats().queued_bytes > 0
        cache.clear()
        threading.Timer(0.1, go_on.set).start()  # closing waits for what was asked of the disk
        cache.close(0)
    assert files(tmp_path) == {}


def test_what_is_cleared_while_it_is_written_can_be_kept_at_once(tmp_path: Path) -> None:
    """Read, cleared and read again while the disk thread stands still: it is found afterwards."""
    tokens = oracle.prompt(LENGTH, seed=85)
    with opened(tmp_path) as cache:
        with held_up(cache):
            oracle.read(cache, tokens)
            cache.clear()
            oracle.read(cache, tokens)
        assert cache.flush(30)
        until_idle(cache)
        assert sum(files(tmp_path).values()) == cache.disk_stats().held_bytes
        forget_memory(cache)
        assert cache.lookup(tokens).restored_tokens == LENGTH - 1
        assert_as_cold(cache, tokens)


def test_a_cache_that_is_dropped_ends_its_threads_and_frees_the_directory(tmp_path: Path) -> None:
    """Dropped without `close`: neither its worker nor its disk thread lives on, and the next one writes."""
    before = set(threading.enumerate())
    cache = oracle.new_cache(model_of("qwen3_next"), cache_dir=tmp_path)
    oracle.read(cache, oracle.prompt(LENGTH, seed=87))
    del cache
    gc.collect()
    assert set(threading.enumerate()) == before
    with opened(tmp_path) as cache:
        assert cache.disk_stats().is_writer


def test_a_cache_that_is_dropped_is_not_kept_by_what_it_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged file was met at the start, and a handler keeps the record: the next cache is the writer."""
    write(tmp_path, oracle.prompt(LENGTH, seed=84))
    (tmp_path / "index.sqlite").unlink()
    next(tmp_path.rglob("*.state.safetensors")).write_bytes(b"")
    cache = oracle.new_cache(model_of("qwen3_next"), cache_dir=tmp_path)
    assert any("Passed over" in record.getMessage() for record in caplog.records)
    del cache
    gc.collect()
    with opened(tmp_path) as cache:
        assert cache.disk_stats().is_writer
