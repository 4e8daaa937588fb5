"""A disk that is full, read-only or gone, and a clock that lies: a miss, one line, and no other reply."""

import os
import shutil
import sys
import time

import pytest
import tiny
from directories import faults
from directories.faults import PATIENCE_SECONDS, served
from directories.filled import END, FIRST, MODEL, SECOND, assert_healed, opened, wait_until
from long import mostly_long

from mlx_hybridcache import SettingError
from mlx_hybridcache.disk import thread
from mlx_hybridcache.disk.segment import SEGMENTS
from mlx_hybridcache.disk.tier import write_behind

# The disk


def test_a_full_disk_costs_one_line_and_no_reply(said, tmp_path):
    """128 KiB for two prompts of 150 KiB each: a part is kept, no more is tried, all replies are cold's."""
    with faults.tmpfs(tmp_path, 128 << 10):
        with opened(tmp_path / "cache", disk_budget="10MB") as cache:
            for prompt in (FIRST, SECOND, FIRST):
                served(cache, prompt)
                assert not cache.flush(PATIENCE_SECONDS)
            stats = cache.disk_stats()
            assert 0 < stats.held_bytes <= stats.budget_bytes < 128 << 10
            assert stats.failures > 0
        line = said.take_one()
        assert "No space left" in line
        assert "From now on it holds at most" in line
        with opened(tmp_path / "cache", disk_budget="10MB") as cache:
            assert cache.disk_stats().held_bytes > 0
            served(cache, FIRST)
            served(cache, SECOND)


def test_a_disk_that_has_room_again_is_written_again(said, quick, tmp_path):
    """Another's file fills it at first, and is deleted then."""
    with faults.tmpfs(tmp_path, 1 << 20):
        with opened(tmp_path / "cache", disk_budget="10MB") as cache:
            (tmp_path / "other").write_bytes(bytes((1 << 20) - (120 << 10)))
            served(cache, FIRST)
            cache.flush(PATIENCE_SECONDS)
            (tmp_path / "other").unlink()
        with opened(tmp_path / "cache", disk_budget="10MB") as cache:
            served(cache, FIRST)
            served(cache, SECOND)
            assert cache.flush(PATIENCE_SECONDS)
        assert_healed(tmp_path / "cache", said, FIRST, SECOND)


def test_a_directory_that_turns_read_only_is_read_on_and_costs_one_line(root, said, quick):
    """What is there is served, nothing new is kept; writable again, it is written to again."""
    with faults.tmpfs(root.parent, 0):
        pass  # or skip
    with opened(root) as cache:
        with faults.read_only(root):
            assert served(cache, FIRST) == ("disk", END)
            assert served(cache, SECOND) == ("none", 0)
            assert not cache.flush(0.2)
            assert "Read-only" in said.take_one()
        assert cache.flush(PATIENCE_SECONDS)
        said.take()  # of a write that had failed before another one succeeded
    assert_healed(root, said, FIRST, SECOND)


def test_a_read_only_directory_is_refused_at_the_start_with_a_sentence(root):
    """There is nothing that a cache could keep there."""
    with faults.tmpfs(root.parent, 0):
        pass  # or skip
    with faults.read_only(root), pytest.raises(SettingError, match="Read-only"):
        opened(root)


@pytest.mark.parametrize("segments", [1, 2, 1000])
def test_what_could_not_be_written_is_not_forgotten(root, quick, monkeypatch, segments):
    """Writes fail with one, two or all segments of a prompt under way; `flush` waits for all of them."""
    with faults.tmpfs(root.parent, 0):
        pass  # or skip
    monkeypatch.setattr(write_behind, "QUEUE_SHARE", 64_000_000 // (segments * 8_000))
    with opened(root) as cache:
        with faults.read_only(root):
            served(cache, SECOND)
            wait_until(lambda: cache.disk_stats().failures > 3)
            assert not cache.flush(0.1)
        assert cache.flush(PATIENCE_SECONDS)
    with opened(root) as cache:
        assert served(cache, SECOND) == ("disk", len(SECOND) - 1)


@pytest.mark.parametrize("which", mostly_long(range(5), [0, 4]))
def test_what_is_written_beside_a_failure_is_written_to_its_end(
    tmp_path, quick, monkeypatch, which
):
    """One folder cannot be made, two segments are under way: in the end every checkpoint is there."""
    faults.written(tmp_path / "expected", tiny.build(MODEL), FIRST, SECOND)
    expected = {path.name for path in faults.segments(tmp_path / "expected", "state")}
    monkeypatch.setattr(write_behind, "QUEUE_SHARE", 64_000_000 // 40_000)
    obstacle = tmp_path / "cache" / SEGMENTS / sorted(expected)[which][:2]
    obstacle.parent.mkdir(parents=True)
    obstacle.touch()
    with opened(tmp_path / "cache") as cache:
        served(cache, FIRST)
        served(cache, SECOND)
        wait_until(lambda: cache.disk_stats().failures > 3)
        obstacle.unlink()
        assert cache.flush(PATIENCE_SECONDS)
    assert {path.name for path in faults.segments(tmp_path / "cache", "state")} == expected


@pytest.mark.parametrize("noticed_by", ["a read", "a write", "a look"])
def test_a_directory_removed_while_in_use_is_begun_anew_with_one_line(
    root, said, monkeypatch, noticed_by
):
    """`rm -r` of it all: a miss, then the next prompts are kept in a new one."""
    monkeypatch.setattr(write_behind, "REST_SECONDS", 0.0)
    if noticed_by == "a look":
        monkeypatch.setattr(thread, "TICK_SECONDS", 0.05)
    with opened(root) as cache:
        shutil.rmtree(root)
        if noticed_by == "a look":
            wait_until(lambda: cache.disk_stats().files == 0)
        if noticed_by != "a write":
            assert served(cache, FIRST) == ("none", 0)
        served(cache, SECOND)
        wait_until(lambda: cache.flush(PATIENCE_SECONDS))
        assert cache.disk_stats().is_writer
    said.take_one()
    assert root.stat().st_mode & 0o777 == 0o700
    with opened(root) as cache:
        assert served(cache, SECOND) == ("disk", len(SECOND) - 1)


def test_who_lost_the_directory_does_not_write_into_anothers(root, said, quick):
    """Removed and made again by another process, which is the writer now."""
    with opened(root) as loser:
        shutil.rmtree(root)
        with opened(root) as winner:
            wait_until(lambda: loser.disk_stats().files == 0)
            assert [c.disk_stats().is_writer for c in (winner, loser)].count(True) == 1
            served(loser, FIRST)
            served(winner, SECOND)
            served(loser, SECOND)
    said.take_one()


# The clock


def test_no_decision_asks_the_clock(root, said, monkeypatch):
    """It goes back an hour at every look, and files come from the future and from 1970.

    Outlines, which say when something was used, show it; nothing else asks.
    """
    asked_by = []
    hours = iter(range(10**9))

    def backwards():
        asked_by.append(sys._getframe(1).f_globals["__name__"])
        return 1e9 - 3600 * next(hours)

    monkeypatch.setattr(time, "time", backwards)
    for at, path in enumerate(faults.segments(root)):
        moment = 2**33 if at % 2 else 0
        os.utime(path, (moment, moment))
    os.utime(root / "index.sqlite", (2**33, 2**33))
    with opened(root) as cache:
        assert served(cache, FIRST) == ("disk", END)
        served(cache, SECOND)
        assert cache.flush(PATIENCE_SECONDS)
    (root / "index.sqlite").unlink()
    for path in faults.segments(root):
        os.utime(path, (2**33, 2**33))
    with opened(root) as cache:
        assert served(cache, SECOND) == ("disk", len(SECOND) - 1)
        assert served(cache, FIRST) == ("disk", END)
        assert not cache.last_report.replayed_tokens > 1
    assert "the index was lost" in said.take_one()
    ours = {name for name in asked_by if name.startswith("mlx_hybridcache")}
    assert ours == {"mlx_hybridcache.store.outline"}


def test_what_was_used_last_stays_whatever_the_files_times_say(root):
    """`SECOND` was written last, `FIRST` was used after it, and its files claim to be from 1970."""
    old = {path.name for path in faults.segments(root)}
    faults.written(root, tiny.build(MODEL), SECOND)
    held = sum(path.stat().st_size for path in faults.segments(root))
    with opened(root) as cache:
        assert served(cache, FIRST) == ("disk", END)
    for path in faults.segments(root):
        os.utime(path, (0, 0) if path.name in old else (2**33, 2**33))
    with opened(root, disk_budget=held // 3) as cache:
        assert cache.lookup(FIRST).restored_tokens > cache.lookup(SECOND).restored_tokens
