"""The disk tier as a user sees it: what one run of a program has read, the next one resumes."""

import functools
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import pytest
import tiny
from long import forms, mostly_long
from oracle import STEP
from places import SUPPORT

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.disk.index import Index
from mlx_hybridcache.disk.tier import WORTH

LENGTH = 300
"""Tokens of most prompts here: four grid steps and some more."""

FAMILIES: dict[str, tuple[str, mx.Dtype, dict[str, Any]]] = {
    "qwen3_next": ("qwen3_next", mx.float32, {}),
    "qwen3_next-paused": ("qwen3_next", mx.float32, {"paused": True}),
    "qwen3_next-exact": ("qwen3_next", mx.float32, {"exact": True}),
    "qwen3_5-bf16": ("qwen3_5", mx.bfloat16, {}),
    "jamba": ("jamba", mx.float32, {}),
    "mamba2-exact": ("mamba2", mx.float32, {"exact": True}),
    "mamba2-bf16": ("mamba2", mx.bfloat16, {"exact": True}),
    "recurrent_gemma": ("recurrent_gemma", mx.float32, {}),
    "recurrent_gemma-bf16": ("recurrent_gemma", mx.bfloat16, {}),
    "gemma3_text": ("gemma3_text", mx.float32, {}),
    "gemma3_text-bf16": ("gemma3_text", mx.bfloat16, {}),
    "gemma3_text-full": ("gemma3_text", mx.float32, {"swa_full": True}),
    "gpt_oss": ("gpt_oss", mx.float32, {}),
    "llama4": ("llama4", mx.float32, {}),
    "llama": ("llama", mx.float32, {}),
    "llama-bf16": ("llama", mx.bfloat16, {}),
    "llama_yarn-exact": ("llama_yarn", mx.float32, {"exact": True}),
    "deepseek_v3": ("deepseek_v3", mx.float32, {}),
    "granitemoehybrid-exact": ("granitemoehybrid", mx.float32, {"exact": True}),
}
"""Every kind of layer, computed in both widths where the CPU can: name -> family, dtype, settings."""

SOME = ("qwen3_next", "gemma3_text", "deepseek_v3")
each_family = pytest.mark.parametrize(
    "name", mostly_long(FAMILIES, (*SOME, "qwen3_5-bf16", "llama-bf16"))
)
each_kind = pytest.mark.parametrize("name", mostly_long(FAMILIES, SOME))

Open = Callable[..., Any]


@functools.cache
def model_of(name: str) -> nn.Module:
    family, dtype, _ = FAMILIES[name]
    model = tiny.fresh(family)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


@contextmanager
def opened(directory: Path, name: str = "qwen3_next", **how: Any) -> Iterator[HybridPromptCache]:
    settings = {"disk_budget": "64MB", **FAMILIES[name][2], **how}
    with oracle.new_cache(model_of(name), cache_dir=directory, **settings) as cache:
        yield cache


def greedy(model: nn.Module, caches: list[Any], rest: Sequence[int], count: int = 4) -> np.ndarray:
    """Logits `(count, VOCAB)`, float32, of reading `rest` and of the greedy tokens behind it."""
    feed, steps = list(rest), []
    for _ in range(count):
        logits = model(mx.array([feed]), cache=caches)[:, -1].astype(mx.float32)
        mx.eval(logits, [cache.state for cache in caches])
        steps.append(np.array(logits[0]))
        feed = [int(logits.argmax().item())]
    return np.stack(steps)


def hot(cache: HybridPromptCache, tokens: Sequence[int], **options: Any) -> np.ndarray:
    ready = cache.prefill(tokens, max_tokens=8, **options)
    logits = greedy(cache.engine.model, ready.prompt_cache, ready.rest)
    ready.release()
    return logits


COLD: dict[tuple[int, tuple[int, ...]], tuple[nn.Module, np.ndarray]] = {}
"""By the model's id, which is its own as long as the model is kept here."""


def cold(model: nn.Module, tokens: Sequence[int]) -> np.ndarray:
    key = id(model), tuple(tokens)
    if key not in COLD:
        caches = tiny.cold_caches(model, tokens[:-1], STEP)
        COLD[key] = model, greedy(model, caches, tokens[-1:])
    return COLD[key][1]


def assert_as_cold(cache: HybridPromptCache, tokens: Sequence[int], **options: Any) -> None:
    off = oracle.distance(hot(cache, tokens, **options), cold(cache.engine.model, tokens))
    assert off <= (0.0 if tiny.device_is_split_invariant() else oracle.OTHER_DEVICES)


def forget_memory(cache: HybridPromptCache) -> None:
    """What a crowd of other requests would do to the memory tier."""
    cache.worker.call(cache.engine.tiers.memory.clear)


def files(directory: Path) -> dict[str, int]:
    """Name and size of every file of rows or of a state."""
    found = directory.rglob("*.safetensors")
    return {path.name: path.stat().st_size for path in found}


def write(directory: Path, *prompts: Sequence[int], name: str = "qwen3_next", **how: Any) -> None:
    """What an earlier run has left behind."""
    with opened(directory, name, **how) as cache:
        for tokens in prompts:
            oracle.read(cache, tokens)
        assert cache.flush(30)


@each_family
def test_a_repeat_after_a_restart_comes_from_files_and_equals_cold(
    name: str, tmp_path: Path
) -> None:
    """300 tokens read by one run: the next one restores 299 (256 in exact mode) and has cold's bits;
    the second request there needs no file.
    """
    tokens = oracle.prompt(LENGTH, seed=1)
    write(tmp_path, tokens, name=name)
    with opened(tmp_path, name) as cache:
        expected = LENGTH - 1 if not cache.info.exact else 4 * STEP
        if name.startswith(("mamba2", "granite")):
            expected = 0 if expected % 256 else 256
        assert cache.lookup(tokens).restored_tokens == expected
        for tier in ("disk", "memory"):
            assert cache.lookup(tokens).tier == tier
            assert_as_cold(cache, tokens)
            report = cache.last_report
            assert report is not None
            assert (report.restored_tokens, report.tier) == (expected, tier)


@each_family
def test_every_position_that_was_kept_comes_back_from_files(name: str, tmp_path: Path) -> None:
    """Each checkpoint of a 300-token prompt, or every 37th row: restored from files alone, on its
    own and then behind what memory has of it, always with cold's bits.
    """
    whole = oracle.prompt(LENGTH + 1, seed=2)
    write(tmp_path, whole, name=name)
    with opened(tmp_path, name) as cache:
        catalogue = cache.engine.tiers.disk.catalogue
        ends = {one.end for one in catalogue.segments() if one.kind == "state"}
        if not cache.engine.layout.needs_snapshots:
            ends = {
                *range(
                    STEP if cache.info.exact else WORTH,
                    LENGTH,
                    STEP if cache.info.exact else 37,
                )
            }
        positions = sorted(at for at in ends if at >= WORTH)
        assert positions
        for at in positions:
            forget_memory(cache)
            assert_as_cold(cache, whole[: at + 1])
            assert (cache.last_report.restored_tokens, cache.last_report.tier) == (at, "disk")
        forget_memory(cache)
        for at in positions:
            assert_as_cold(cache, whole[: at + 1])
            # Memory has the one before by now; files that would save less are not read.
            assert at - WORTH < cache.last_report.restored_tokens <= at


@each_kind
def test_a_branch_inside_a_file_and_what_follows_equal_cold(name: str, tmp_path: Path) -> None:
    """A second run leaves a 300-token prompt at 170, inside a run of rows, and goes on for 100 tokens; a third
    one finds both, and the second's own end. Families of blocks, whose first checkpoint is at 256, leave at 270.
    """
    base = oracle.prompt(LENGTH, seed=3)
    leaves = 270 if name.startswith(("mamba2", "granite")) else 170
    branch = [*base[:leaves], *oracle.prompt(100, seed=4)]
    write(tmp_path, base, name=name)
    with opened(tmp_path, name) as cache:
        assert_as_cold(cache, branch)
        assert cache.last_report.tier == "disk"
        assert leaves - WORTH < cache.last_report.restored_tokens <= leaves
        assert cache.flush(30)
    with opened(tmp_path, name) as cache:
        both = (branch, base)
        for tokens, found in zip(both, [cache.lookup(tokens) for tokens in both], strict=True):
            assert found.tier == "disk"  # before anything is in memory
            least = 256 if cache.info.exact else len(tokens) - 1
            assert found.restored_tokens >= least
            assert_as_cold(cache, tokens)


@each_kind
def test_turns_over_several_runs_equal_cold(name: str, tmp_path: Path) -> None:
    """A conversation that grows by 90 tokens a run: each run restores what the one before it left."""
    history = oracle.prompt(100, seed=5)
    write(tmp_path, history, name=name)
    for turn in range(3):
        before = len(history) - 1
        history = [*history, *oracle.prompt(90, seed=6 + turn)]
        with opened(tmp_path, name) as cache:
            report = cache.lookup(history)
            if not cache.info.exact:
                assert (report.restored_tokens, report.tier) == (before, "disk")
            else:
                grid = cache.engine.layout.alignment if cache.engine.layout.alignment > 1 else STEP
                assert report.restored_tokens == before - before % grid
                assert report.tier == ("disk" if report.restored_tokens else "none")
            assert_as_cold(cache, history)
            assert cache.flush(30)


@contextmanager
def held_up(cache: HybridPromptCache) -> Iterator[threading.Event]:
    """Let the disk thread wait, so that what is asked of it meanwhile is still to come."""
    go_on, waits = threading.Event(), threading.Event()

    def wait(directory: object) -> None:
        waits.set()
        assert go_on.wait(60)

    cache.engine.tiers.disk.thread.change(wait)
    assert waits.wait(60)
    try:
        yield go_on
    finally:
        go_on.set()


def until_idle(cache: HybridPromptCache) -> None:
    """Let the disk thread do everything it was asked for, and the worker hear of it."""
    done = threading.Event()
    cache.engine.tiers.disk.thread.change(lambda directory: done.set())
    assert done.wait(60)
    cache.stats()


@pytest.mark.parametrize(
    "name",
    mostly_long(
        ["qwen3_next", "qwen3_5-bf16", "jamba", "llama", "gemma3_text-full"],
        ["qwen3_next", "llama", "gemma3_text-full"],
    ),
)
def test_memory_has_the_beginning_and_files_the_rest(name: str, tmp_path: Path) -> None:
    """Memory knows 150 tokens of 300: the rows of the rest are read, and no more than those."""
    tokens = oracle.prompt(LENGTH, seed=10)
    write(tmp_path, tokens, name=name)
    with opened(tmp_path, name) as cache:
        oracle.read(cache, tokens)
        everything = cache.disk_stats().read_bytes
        forget_memory(cache)
        oracle.read(cache, [*tokens[:150], *oracle.prompt(5, seed=11)])
        before = cache.disk_stats().read_bytes
        assert_as_cold(cache, tokens)
        report = cache.last_report
        assert (report.restored_tokens, report.tier) == (LENGTH - 1, "disk")
        assert 0 < cache.disk_stats().read_bytes - before < everything


def test_files_that_save_little_are_left_alone(tmp_path: Path) -> None:
    """Memory stands 63 tokens before what a file holds: it is not read; 64 before, it is."""
    tokens = oracle.prompt(LENGTH, seed=12)
    for beyond, tier in ((WORTH - 1, "memory"), (WORTH, "disk")):
        directory = tmp_path / str(beyond)
        write(directory, tokens)
        with opened(directory) as cache:
            oracle.read(cache, tokens[: LENGTH - beyond])
            assert cache.lookup(tokens).tier == tier
            assert_as_cold(cache, tokens)


def test_two_salts_never_share_files(tmp_path: Path) -> None:
    """A prompt written under one salt is cold under another and under none, and its own later."""
    tokens = oracle.prompt(LENGTH, seed=13)
    with opened(tmp_path) as cache:
        cache.prefill(tokens, cache_salt="one").release()
        assert cache.flush(30)
    with opened(tmp_path) as cache:
        for salt in ("two", ""):
            assert cache.lookup(tokens, cache_salt=salt).restored_tokens == 0
            cache.prefill(tokens[:-1], cache_salt=salt).release()
        assert cache.flush(30)
        assert cache.lookup(tokens, cache_salt="one").tier == "disk"
    with opened(tmp_path) as cache:
        found = {
            salt: cache.lookup(tokens, cache_salt=salt).restored_tokens
            for salt in ("one", "two", "")
        }
        assert found == {"one": LENGTH - 1, "two": LENGTH - 2, "": LENGTH - 2}
        for salt in found:
            assert_as_cold(cache, tokens, cache_salt=salt)


def test_other_weights_and_other_settings_find_nothing(tmp_path: Path) -> None:
    """Files of a float32 model: another dtype, exact mode and another family start cold there."""
    tokens = oracle.prompt(LENGTH, seed=14)
    write(tmp_path, tokens)
    for name in ("qwen3_next-exact", "qwen3_5-bf16", "jamba", "llama"):
        with opened(tmp_path, name) as cache:
            assert cache.lookup(tokens).restored_tokens == 0
            assert_as_cold(cache, tokens)
    with opened(tmp_path) as cache:
        assert cache.lookup(tokens).restored_tokens == LENGTH - 1


READER = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent / "disk")]
import oracle, test_disk
tokens = oracle.prompt(test_disk.LENGTH, seed=15)
with test_disk.opened(Path(sys.argv[2])) as cache:
    assert not cache.disk_stats().is_writer
    assert cache.lookup(tokens).tier == "disk"
    test_disk.assert_as_cold(cache, tokens)
    assert cache.last_report.tier == "disk"
    oracle.read(cache, oracle.prompt(test_disk.LENGTH, seed=16))
    assert not cache.flush(1)
    assert cache.disk_stats().written_bytes == 0
    cache.clear()
"""


def test_a_second_process_reads_what_the_first_one_wrote_and_changes_nothing(
    tmp_path: Path,
) -> None:
    """While the first one is open: the second restores 299 of 300, writes nothing and deletes nothing."""
    tokens = oracle.prompt(LENGTH, seed=15)
    with opened(tmp_path) as cache:
        oracle.read(cache, tokens)
        assert cache.flush(30)
        assert cache.disk_stats().is_writer
        before = files(tmp_path)
        here = str(SUPPORT)
        subprocess.run([sys.executable, "-c", READER, here, str(tmp_path)], check=True, timeout=120)
        assert files(tmp_path) == before
        forget_memory(cache)
        assert cache.lookup(tokens).tier == "disk"


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


@pytest.mark.parametrize("name", ["qwen3_next", "gemma3_text"])
def test_rows_without_any_state_restore_nothing(name: str, tmp_path: Path) -> None:
    """A run that ended before its first state was written left rows of 300 tokens: read again, cold."""
    tokens = oracle.prompt(LENGTH, seed=61)
    write(tmp_path, tokens, name=name)
    for path in tmp_path.rglob("*.state.safetensors"):
        path.unlink()
    with opened(tmp_path, name) as cache:
        assert cache.lookup(tokens).restored_tokens == 0
        assert_as_cold(cache, tokens)
        assert cache.last_report.tier == "none"
        assert cache.flush(30)
    with opened(tmp_path, name) as cache:
        assert cache.lookup(tokens).restored_tokens == LENGTH - 1
        assert_as_cold(cache, tokens)


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
