"""Whatever happens to the files of a cache directory costs a miss, says so in one line, and changes no reply."""

import itertools
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import tiny
from directories import faults
from directories.faults import DAMAGES, PATIENCE_SECONDS, served
from directories.filled import END, FIRST, MODEL, SECOND, assert_healed, opened
from long import mostly_long

from mlx_hybridcache import Reason
from mlx_hybridcache.cli.main import main as cli
from mlx_hybridcache.tiers import TRIES

# Damaged files

WHICH = ("first rows", "last rows", "state")

each_damage = pytest.mark.parametrize(
    ("damage", "which"),
    mostly_long(
        itertools.product(DAMAGES, WHICH), list(zip(DAMAGES, itertools.cycle(WHICH), strict=False))
    ),
)
"""Always each damage to one kind of file, and each kind of file by a third of them."""


@each_damage
def test_a_damaged_file_is_a_miss_with_one_line(root, said, damage, which):
    """Each of three files of a 300-token prompt in ten ways, while nobody has the directory open."""
    kind = which.split()[-1]
    DAMAGES[damage](faults.segments(root, kind)[0 if which == "first rows" else -1])
    with opened(root) as cache:
        tier, position = served(cache, FIRST)
        assert (tier == "none") == (which == "first rows")
        assert position < END
        assert cache.flush(PATIENCE_SECONDS)
    said.take_one()
    assert_healed(root, said, FIRST)


@each_damage
def test_a_file_damaged_while_it_is_in_use_is_a_miss_with_one_line(root, said, damage, which):
    """The same to a directory that a cache has open; its report names the reason."""
    kind = which.split()[-1]
    with opened(root) as cache:
        DAMAGES[damage](faults.segments(root, kind)[0 if which == "first rows" else -1])
        _, position = served(cache, FIRST)
        assert cache.last_report.reason is Reason.DISK_REJECTED
        assert position < END
        assert cache.disk_stats().rejected == 1
        assert cache.flush(PATIENCE_SECONDS)
    said.take_one()
    assert_healed(root, said, FIRST)


def test_a_file_that_fails_again_and_again_holds_nobody_up(root, said, monkeypatch):
    """Were it found anew each time, a request would pass over it so often and go on without the disk."""
    DAMAGES["a bit of its data"](faults.segments(root, "rows")[0])
    with opened(root) as cache:
        catalogue = cache.engine.tiers.disk.catalogue
        monkeypatch.setattr(catalogue, "forget", lambda segment: None)
        assert served(cache, FIRST)[0] == "none"
        assert cache.disk_stats().rejected == TRIES
        monkeypatch.undo()
    said.take()


def test_a_file_that_is_gone_is_a_miss_with_one_line(root, said):
    """The run behind position 128 deleted by hand: what lies before it is still served."""
    with opened(root) as cache:
        faults.segments(root, "rows")[4].unlink()
        assert served(cache, FIRST) == ("disk", 128)
        assert cache.flush(PATIENCE_SECONDS)
    assert "No such file" in said.take_one()
    assert_healed(root, said, FIRST)


@pytest.mark.parametrize("index", ["kept", "lost"])
def test_rows_without_any_state_restore_nothing(root, said, index):
    """Killed before its first checkpoint was durable, or all were evicted: a hybrid reads from the start."""
    for path in faults.segments(root, "state"):
        path.unlink()
    if index == "lost":
        (root / "index.sqlite").unlink()
    with opened(root) as cache:
        assert cache.lookup(FIRST).restored_tokens == 0
        assert served(cache, FIRST) == ("none", 0)
        assert cache.flush(PATIENCE_SECONDS)
    assert_healed(root, said, FIRST)


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_holds_nothing_up(root, said, put):
    """A pipe, a link to nowhere under a segment's name, while it is in use."""
    with opened(root) as cache:
        path = faults.segments(root, "rows")[0]
        path.unlink()
        put(path)
        assert served(cache, FIRST) == ("none", 0)
    said.take_one()


@pytest.mark.parametrize("which", range(3))
def test_a_folder_under_a_segments_name_is_told_once_and_not_tried_again(root, said, quick, which):
    """Where the first rows, some in between, or a state should be: no write is tried again, replies are
    cold's, and everything that does not need it is kept.
    """
    path = [*faults.segments(root, "rows")[:4:3], faults.segments(root, "state")[-1]][which]
    path.unlink()
    path.mkdir()
    with opened(root) as cache:
        served(cache, FIRST)
        served(cache, SECOND)
        assert not cache.flush(PATIENCE_SECONDS)
        stats = cache.disk_stats()
        assert (stats.failures, stats.queued_bytes, stats.unwritten) == (0, 0, 0)
        served(cache, FIRST)
    assert "is a folder. It is left alone" in said.take_one()
    assert path.is_dir()
    with opened(root) as cache:
        assert served(cache, SECOND) == ("disk", len(SECOND) - 1)


@pytest.mark.parametrize("index", ["kept", "lost"])
def test_files_of_a_newer_version_are_misses_and_stay_as_they_are(root, said, index):
    """Version 2 has written all of `FIRST`, and of `SECOND` nothing: both are served, cleared, verified
    and read again; not a byte of version 2 changes. Where a start has met them they leave less room.
    """
    newer = faults.segments(root)
    for path in newer:
        data = path.read_bytes()
        path.write_bytes(data.replace(b'"version":"1"', b'"version":"2"', 1))
    if index == "lost":
        (root / "index.sqlite").unlink()
    before = {path: path.read_bytes() for path in newer}
    weight = sum(map(len, before.values()))
    with opened(root, disk_budget=weight + 150_000) as cache:
        if index == "lost":
            assert "14 files (" in said.take_one()
            assert cache.disk_stats().budget_bytes == 150_000
        for prompt in (FIRST, SECOND, FIRST, SECOND):
            served(cache, prompt)
            cache.flush(PATIENCE_SECONDS)
        cache.clear()
        served(cache, FIRST)
        served(cache, SECOND)
        cache.flush(PATIENCE_SECONDS)
        held = sum(path.stat().st_size for path in faults.segments(root))
        assert held > weight
        assert index == "kept" or held <= weight + 150_000
    assert cli(["cache", "verify", "--delete", "--cache-dir", str(root)]) == 0
    assert {path: path.read_bytes() for path in newer} == before


# The index


def _index_of_another_version(path):
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")


def _index_of_noise(path):
    path.write_bytes(b"noise" * 5000)


def _index_with_a_damaged_page(path):
    data = bytearray(path.read_bytes())
    data[5000:9000] = b"\xff" * 4000
    path.write_bytes(data)


def _index_is_a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "lose",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        _index_of_another_version,
        _index_of_noise,
        _index_with_a_damaged_page,
        _index_is_a_folder,
    ],
    ids=["gone", "empty", "another version", "noise", "a damaged page", "a folder"],
)
def test_an_index_that_is_lost_costs_one_line_and_no_file(root, said, lose):
    """It is made anew from the files, and everything is served from them."""
    lose(root / "index.sqlite")
    with opened(root) as cache:
        assert served(cache, FIRST) == ("disk", END)
    said.take_one()


def test_an_index_from_before_costs_nothing(root, said, tmp_path):
    """Two prompts are in the files, the index of a backup knows of one; nobody is told."""
    shutil.copyfile(root / "index.sqlite", tmp_path / "backup")
    faults.written(root, tiny.build(MODEL), SECOND)
    shutil.copyfile(tmp_path / "backup", root / "index.sqlite")
    assert_healed(root, said, FIRST, SECOND)


def test_an_index_that_breaks_while_it_is_in_use_costs_one_line(root, said):
    """Its pages turn to noise; both prompts are found by the next process."""
    with opened(root) as cache:
        with (root / "index.sqlite").open("r+b") as index:
            index.write(b"noise" * 5000)
        for suffix in ("-wal", "-shm"):
            with (root / f"index.sqlite{suffix}").open("r+b") as log:
                log.write(b"noise" * 5000)
        assert served(cache, SECOND) == ("none", 0)
        assert served(cache, FIRST) == ("disk", END)
        assert cache.flush(PATIENCE_SECONDS)
    said.take_one()
    with opened(root) as cache:
        assert served(cache, SECOND) == ("disk", len(SECOND) - 1)
