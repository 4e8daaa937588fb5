"""Whatever happens to a cache directory costs a miss, says so in one line, and changes no reply."""

import itertools
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import faults
import mlx.core as mx
import oracle
import pytest
import tiny
from faults import DAMAGES, PATIENCE_SECONDS, Said, served
from long import mostly_long
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from places import SUPPORT

from mlx_hybridcache import Reason, SettingError
from mlx_hybridcache.cli.main import main as cli
from mlx_hybridcache.disk import thread, write_behind
from mlx_hybridcache.disk.segment import SEGMENTS
from mlx_hybridcache.tiers import TRIES

MODEL = "qwen3_next"
FIRST = oracle.prompt(300, seed=1)
SECOND = oracle.prompt(280, seed=2)
END = 299
"""The last checkpoint of `FIRST`: its end less the token that is always read."""


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A directory with all of `FIRST`, in five files of rows and their checkpoints."""
    root = tmp_path_factory.mktemp("filled")
    faults.written(root, tiny.build(MODEL), FIRST)
    return root


@pytest.fixture
def root(filled, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(filled, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="mlx_hybridcache")
    return Said(caplog)


@pytest.fixture
def quick(monkeypatch):
    """A disk thread that looks around twenty times a second, and tries again at once."""
    monkeypatch.setattr(thread, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(write_behind, "REST_SECONDS", 0.0)


def opened(root, **settings):
    return oracle.new_cache(tiny.build(MODEL), cache_dir=root, **settings)


def wait_until(holds):
    """Wait for what other threads and processes do."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.01)


def assert_healed(root, said, *prompts):
    """Everything was written anew: the next process finds all of it, and has nothing to say."""
    said.take()
    with opened(root) as cache:
        assert [served(cache, p) for p in prompts] == [("disk", len(p) - 1) for p in prompts]
        assert cache.disk_stats().rejected == 0
    assert said.take() == []
    assert not list(root.rglob("*.partial"))


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


# The disk


def test_a_full_disk_costs_one_line_and_no_reply(said, tmp_path):
    """160 KiB for two prompts of 200 KiB each: a part is kept, no more is tried, all replies are cold's."""
    with faults.tmpfs(tmp_path, 160 << 10):
        with opened(tmp_path / "cache", disk_budget="10MB") as cache:
            for prompt in (FIRST, SECOND, FIRST):
                served(cache, prompt)
                assert not cache.flush(PATIENCE_SECONDS)
            stats = cache.disk_stats()
            assert 0 < stats.held_bytes <= stats.budget_bytes < 160 << 10
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


# Two processes


def test_a_reader_sees_what_the_writer_wrote_and_takes_over_when_it_closes(root, said, quick):
    """Two caches in one directory: the second reads, then writes."""
    with opened(root) as reader:
        assert reader.disk_stats().is_writer
    with opened(root) as writer, opened(root) as reader:
        assert [cache.disk_stats().is_writer for cache in (writer, reader)] == [True, False]
        served(writer, SECOND)
        assert writer.flush(PATIENCE_SECONDS)
        wait_until(lambda: reader.lookup(SECOND).restored_tokens == len(SECOND) - 1)
        assert served(reader, SECOND) == ("disk", len(SECOND) - 1)
        writer.close()
        wait_until(lambda: reader.disk_stats().is_writer)
        third = oracle.prompt(200, seed=3)
        served(reader, third)
        assert reader.flush(PATIENCE_SECONDS)
    assert said.take() == []
    assert_healed(root, said, FIRST, SECOND, third)


WRITER = """
import sys, time
import oracle, tiny
cache = oracle.new_cache(tiny.build("qwen3_next"), cache_dir=sys.argv[1])
assert cache.disk_stats().is_writer
print("ready", flush=True)
for seed in range(100, 10_000):
    oracle.read(cache, oracle.prompt(300, seed=seed))
"""


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_reader_takes_over_when_the_writer_is_killed(root, said, quick, busy):
    """Killed while it writes; the reader goes on, also when requests never leave it a moment's rest."""
    command = [sys.executable, "-c", WRITER, str(root)]
    where = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=where) as writer:
        try:
            assert writer.stdout.readline() == b"ready\n"
            with opened(root) as reader:
                assert not reader.disk_stats().is_writer
                assert served(reader, FIRST) == ("disk", END)
                disk = reader.engine.tiers.disk.thread
                writer.send_signal(signal.SIGKILL)
                if busy:
                    beat = [True]

                    def again(transfer):
                        if beat:
                            disk.read(thread.Transfer([], again))

                    again(None)
                wait_until(lambda: reader.disk_stats().is_writer)
                if busy:
                    beat.clear()
                assert served(reader, SECOND) == ("none", 0)
                assert reader.flush(PATIENCE_SECONDS)
        finally:
            writer.kill()
    assert said.take() == []
    assert_healed(root, said, FIRST, SECOND)


# Another model


@pytest.mark.parametrize(
    ("path", "end"),
    mostly_long(
        itertools.product(
            [
                "model.embed_tokens.weight",
                "model.layers.0.linear_attn.A_log",
                "model.layers.3.mlp.switch_mlp.up_proj.weight",
                "lm_head.weight",
            ],
            [0, -1],
        ),
        [("model.embed_tokens.weight", 0), ("lm_head.weight", -1)],
    ),
)
def test_one_changed_number_is_another_model(root, path, end):
    """The next larger float32, at the first and the last place: nothing is shared, in either direction."""
    changed = faults.changed_weight(MODEL, path, end)
    with oracle.new_cache(changed, cache_dir=root) as cache:
        assert served(cache, FIRST) == ("none", 0)
        assert cache.flush(PATIENCE_SECONDS)
    with oracle.new_cache(changed, cache_dir=root) as cache:
        assert served(cache, FIRST) == ("disk", END)
    with opened(root) as cache:
        assert served(cache, FIRST) == ("disk", END)


def test_a_fused_adapter_is_another_model(root):
    """A LoRA of rank 2 on one projection, as layers of its own and fused: three models, three caches."""
    adapted = tiny.fresh(MODEL)
    attention = adapted.model.layers[3].self_attn
    lora = LoRALinear.from_base(attention.q_proj, r=2)
    lora.lora_b = 0.01 * mx.random.normal(lora.lora_b.shape)
    attention.q_proj = lora
    fused = tiny.fresh(MODEL)
    fused.model.layers[3].self_attn.q_proj = lora.fuse()
    mx.eval(adapted.parameters(), fused.parameters())
    assert len(tree_flatten(fused.parameters())) == len(
        tree_flatten(tiny.build(MODEL).parameters())
    )
    for model in (adapted, fused):
        with oracle.new_cache(model, cache_dir=root) as cache:
            assert served(cache, FIRST) == ("none", 0)
            assert cache.flush(PATIENCE_SECONDS)
    for model in (tiny.build(MODEL), adapted, fused):
        with oracle.new_cache(model, cache_dir=root) as cache:
            assert served(cache, FIRST) == ("disk", END)
