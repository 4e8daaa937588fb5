"""The disk tier as a user sees it: what one run of a program has read, the next one resumes."""

import subprocess
import sys
from pathlib import Path

import oracle
import pytest
from directories.restarts import (
    LENGTH,
    assert_as_cold,
    each_family,
    each_kind,
    files,
    forget_memory,
    opened,
    write,
)
from long import mostly_long
from oracle import STEP
from places import SUPPORT

from mlx_hybridcache.disk.tier.tier import WORTH


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
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent / "disk" / "tier")]
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
