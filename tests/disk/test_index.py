"""The index of the disk tier: a cache of headers that may be lost, damaged or out of date."""

import os
import random
import resource
import sqlite3
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from directories.segment_files import content, place, rows, state, stored, umask
from places import SUPPORT

from mlx_hybridcache.disk.index import Entry, Index, IndexUnavailableError, scan
from mlx_hybridcache.disk.segment import SegmentError, Tensor, write

PATH = "index.sqlite"


def entry(segment, used=0, *, pinned=False):
    return Entry(segment, used, pinned, segment.file_nbytes)


def store(root, *segments):
    """Segments in their files, each a second younger than the one before."""
    for age, segment in enumerate(segments):
        os.utime(stored(root, segment), (age, age))
    return [segment.name for segment in segments]


def by_name(entries):
    return {entry.segment.name: entry for entry in entries}


def snapshot(root):
    """Everything in a directory: names, bytes, times."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return [(path, path.read_bytes(), path.stat().st_mtime_ns) for path in files]


@pytest.fixture
def index(tmp_path):
    with_index = Index(tmp_path / PATH)
    yield with_index
    with_index.close()


def test_what_was_put_is_loaded_by_the_next_process(tmp_path, index):
    """Rows with a parent, a state and a pin, all fields of each."""
    entries = [entry(rows(2, 6, model="模\0型"), 7), entry(state(), -3, pinned=True)]
    assert index.was_new
    index.put(entries)
    index.close()
    again = Index(tmp_path / PATH)
    assert not again.was_new
    assert again.load() == entries
    again.close()


def test_recency_pins_and_absence_are_noted(index):
    """Three entries: the first is used at 9, the second pinned, the third dropped."""
    names = [segment.name for segment in (rows(0, 4), rows(4, 8), rows(8, 12))]
    index.put([entry(rows(0, 4)), entry(rows(4, 8)), entry(rows(8, 12))])
    index.touch(names[:1], 9)
    index.pin(names[1:2], True)
    index.drop([*names[2:], "never/there"])
    found = [(entry.segment.name, entry.used, entry.pinned) for entry in index.load()]
    assert found == [(names[0], 9, False), (names[1], 0, True)]
    index.pin(names[1:2], False)
    assert not any(entry.pinned for entry in index.load())


def test_an_entry_is_replaced_by_one_of_the_same_name(index):
    """[0, 4) and then [2, 4) of the same tokens lie under one name."""
    index.put([entry(rows(0, 4), 1)])
    index.put([entry(rows(2, 4), 2)])
    assert index.load() == [entry(rows(2, 4), 2)]


def test_a_change_is_made_whole_or_not_at_all(index):
    """The third of three entries cannot be had: none is there."""

    def entries():
        yield from (entry(rows(0, 4)), entry(rows(4, 8)))
        raise KeyError

    with pytest.raises(KeyError):
        index.put(entries())
    assert index.load() == []


@pytest.mark.parametrize("mask", [0, 0o777])
def test_the_index_is_private_whatever_the_umask(tmp_path, mask):
    """Its log too: both hold prompts. A missing folder is made, private as well."""
    path = tmp_path / "cache" / PATH
    with umask(mask):
        index = Index(path)
        index.put([entry(rows())])
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {
        PATH: 0o600,
        f"{PATH}-wal": 0o600,
        f"{PATH}-shm": 0o600,
    }
    index.close()


def alter(statement):
    def damage(path):
        with sqlite3.connect(path) as db:
            db.execute(statement)
        db.close()

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not an index" * 1000),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(path.read_bytes()[:4096] + b"\xff" * 40_000),
        alter("PRAGMA user_version = 0"),
        alter("PRAGMA user_version = 99"),
        alter("ALTER TABLE segments RENAME COLUMN used TO last_used"),
    ],
)
def test_what_is_no_index_is_made_anew(tmp_path, damage):
    """Empty, foreign, cut short, overwritten, older, from the future, of other columns."""
    path = tmp_path / PATH
    index = Index(path)
    index.put([entry(rows(at, at + 4)) for at in range(100)])
    index.close()
    damage(path)
    index = Index(path)
    assert index.was_new
    assert index.load() == []
    index.put([entry(rows())])
    assert index.load() == [entry(rows())]
    index.close()


def test_no_damage_to_an_index_gives_a_wrong_entry_or_stops_anyone(tmp_path):
    """300 times one to 2,000 bytes are overwritten anywhere: right entries, or none."""
    path = tmp_path / PATH
    index = Index(path)
    entries = by_name(entry(rows(at, at + 500)) for at in range(20))
    index.put(entries.values())
    index.close()
    sound, rng = path.read_bytes(), random.Random(0)
    losses = 0
    for _ in range(300):
        raw, at = bytearray(sound), rng.randrange(len(sound))
        length = rng.choice([1, 1, 20, 2000])
        raw[at : at + length] = rng.randbytes(len(raw[at : at + length]))
        path.write_bytes(raw)
        reader = Index.read_only(path)
        found = readable(reader)
        assert found.items() <= entries.items()
        index = Index(path)
        found = readable(index)
        assert found.items() <= entries.items()
        losses += len(found) < len(entries)
        index.close()
    assert losses > 100


def readable(index):
    """What an index says but for recency and pins, nothing when it cannot be read."""
    try:
        found = index.load() if index is not None else []
    except IndexUnavailableError:
        return {}
    finally:
        if index is not None:
            index.close()
    return by_name(Entry(e.segment, 0, pinned=False, file_nbytes=e.file_nbytes) for e in found)


def test_an_index_that_is_busy_is_not_deleted(tmp_path, monkeypatch):
    """Another program holds it: an OSError, and its entries are still there afterwards."""
    monkeypatch.setattr("mlx_hybridcache.disk.index._PATIENCE_SECONDS", 0.01)
    index = Index(tmp_path / PATH)
    index.put([entry(rows(), pinned=True)])
    index.close()
    other = sqlite3.connect(tmp_path / PATH)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(OSError, match="locked"):
        Index(tmp_path / PATH)
    other.close()
    index = Index(tmp_path / PATH)
    assert index.load() == [entry(rows(), pinned=True)]
    index.close()


def test_what_sqlite_raises_is_an_os_error(tmp_path, monkeypatch):
    """Another process writes for longer than one waits; a closed index; a folder in its place."""
    monkeypatch.setattr("mlx_hybridcache.disk.index._PATIENCE_SECONDS", 0.01)
    index = Index(tmp_path / PATH)
    other = sqlite3.connect(tmp_path / PATH)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(IndexUnavailableError, match="locked") as told:
        index.put([entry(rows())])
    assert not told.value.is_damaged
    other.close()
    index.close()
    index.close()
    for use in (index.load, lambda: index.drop([]), lambda: index.touch(["a"], 1)):
        with pytest.raises(IndexUnavailableError):
            use()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="unable to open"):
        Index(tmp_path / "folder")
    assert issubclass(IndexUnavailableError, OSError)


def test_an_error_says_whether_the_index_is_damaged(tmp_path):
    """A reader meets 40,000 overwritten bytes behind a sound first page."""
    index = Index(tmp_path / PATH)
    index.put([entry(rows(at, at + 4)) for at in range(100)])
    index.close()
    raw = (tmp_path / PATH).read_bytes()
    (tmp_path / PATH).write_bytes(raw[:4096] + b"\xff" * 40_000 + raw[44_096:])
    reader = Index.read_only(tmp_path / PATH)
    with pytest.raises(IndexUnavailableError) as told:
        reader.load()
    assert told.value.is_damaged
    reader.close()


def test_a_reader_without_an_index_has_none(tmp_path):
    """No file, and none of this version; neither is touched."""
    assert Index.read_only(tmp_path / PATH) is None
    (tmp_path / PATH).write_bytes(b"foreign")
    before = snapshot(tmp_path)
    assert Index.read_only(tmp_path / PATH) is None
    assert snapshot(tmp_path) == before


def test_a_reader_leaves_nothing_behind(tmp_path):
    """The directory of a writer that is gone looks the same before and after."""
    index = Index(tmp_path / PATH)
    index.put([entry(rows())])
    index.close()
    before = snapshot(tmp_path)
    reader = Index.read_only(tmp_path / PATH)
    assert reader.load() == [entry(rows())]
    with pytest.raises(IndexUnavailableError, match="readonly"):
        reader.put([entry(rows())])
    reader.close()
    assert snapshot(tmp_path) == before


WRITER = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(SUPPORT)]!r}
from pathlib import Path
from test_index import *
index = Index(Path(sys.argv[1]) / PATH)
for end in range(4, 10_000):
    index.put([entry(rows(0, end), end)])
    print(end, flush=True)
"""


def test_a_reader_sees_what_a_living_writer_has_noted(tmp_path):
    """After each of 20 entries of another process: that one, and all before. Then it is killed."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        for end in range(4, 24):
            assert int(process.stdout.readline()) == end
            reader = Index.read_only(tmp_path / PATH)
            found = {entry.used for entry in reader.load()}
            assert found == set(range(4, max(found) + 1))
            assert max(found) >= end
            reader.close()
        process.kill()
    index = Index(tmp_path / PATH)
    assert not index.was_new
    assert len(index.load()) >= 20
    index.close()


def test_files_without_a_row_are_adopted_oldest_first(tmp_path, index):
    """One known file used at 5; two more become less recent, in the order of their times."""
    first, second, third = store(tmp_path, rows(0, 4), rows(4, 8), state(8))
    index.put([entry(rows(4, 8), 5)])
    for _ in range(2):
        found = scan(tmp_path, index, adopt=True)
        assert [entry.segment.name for entry in found] == [first, third, second]
        assert [entry.used for entry in found] == [3, 4, 5]
        assert by_name(index.load()) == by_name(found)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_lost_index_loses_no_file(tmp_path, is_there):
    """Three files and an index that is new, or cannot be had: three entries in their order."""
    names = store(tmp_path, rows(0, 4), rows(4, 8), state(8))
    index = Index(tmp_path / PATH) if is_there else None
    found = scan(tmp_path, index, adopt=is_there)
    assert [entry.segment.name for entry in found] == names
    assert [entry.segment for entry in found] == [rows(0, 4), rows(4, 8), state(8)]
    assert found[0].file_nbytes == place(tmp_path, rows(0, 4)).stat().st_size
    if index is not None:
        assert len(index.load()) == 3
        index.close()


@pytest.mark.parametrize("order", [1, -1])
def test_recency_comes_from_the_files_times_when_it_is_lost(tmp_path, order):
    """Eight files in either order of age, in whatever order the folder lists them."""
    names = store(tmp_path, *[rows(at, at + 4) for at in range(8)][::order])
    assert [entry.segment.name for entry in scan(tmp_path, None, adopt=False)] == names


def test_an_index_that_fails_is_done_without(tmp_path, index):
    """It was closed: the files are found all the same."""
    names = store(tmp_path, rows(0, 4), rows(4, 8))
    index.close()
    assert [entry.segment.name for entry in scan(tmp_path, index, adopt=True)] == names


def test_rows_without_a_file_are_dropped(tmp_path, index):
    """Two entries, one file, then no folder at all."""
    store(tmp_path, rows(0, 4))
    index.put([entry(rows(0, 4)), entry(rows(4, 8))])
    assert scan(tmp_path, index, adopt=False) == [entry(rows(0, 4))]
    assert len(index.load()) == 2
    assert scan(tmp_path, index, adopt=True) == [entry(rows(0, 4))] == index.load()
    assert scan(tmp_path / "nowhere", index, adopt=True) == [] == index.load()


def test_files_that_the_index_knows_are_not_opened(tmp_path, index):
    """Ten of them hold nothing but zeros, of the right size: nobody notices."""
    segments = [rows(at, at + 4) for at in range(10)]
    store(tmp_path, *segments)
    known = scan(tmp_path, index, adopt=True)
    for segment in segments:
        place(tmp_path, segment).write_bytes(bytes(segment.file_nbytes))
    rejected = []
    again = scan(tmp_path, index, adopt=True, on_rejected=lambda *what: rejected.append(what))
    assert (again, rejected) == (known, [])


def test_a_file_of_another_size_than_its_row_is_read_afresh(tmp_path, index):
    """[0, 4) was replaced by [2, 4): its recency and its pin stay."""
    store(tmp_path, rows(0, 4))
    index.put([entry(rows(0, 4), 8, pinned=True)])
    write(tmp_path, rows(2, 4), [content(rows(2, 4))])
    found = scan(tmp_path, index, adopt=True)
    assert found == [entry(rows(2, 4), 8, pinned=True)] == index.load()


def spoil(root):
    """A sound file, a damaged one, an unfinished one, and files of someone else's."""
    sound, damaged = store(root, rows(0, 4), rows(4, 8))
    damaged = root / "segments" / damaged
    damaged.write_bytes(damaged.read_bytes()[:-1])
    unfinished = place(root, rows(8, 12))
    unfinished = unfinished.with_name(f"{unfinished.name}.0abc.partial")
    unfinished.parent.mkdir(exist_ok=True)
    unfinished.write_bytes(b"half")
    others = [damaged.with_name("note.txt"), damaged.with_name("a.partial"), root / "x.safetensors"]
    for path in others:
        path.write_bytes(b"mine")
    return root / "segments" / sound, damaged, unfinished, others


def test_a_writer_deletes_what_is_damaged_or_unfinished(tmp_path, index):
    """Each damaged file is told; files of other names are nobody's business."""
    sound, damaged, unfinished, others = spoil(tmp_path)
    index.put([entry(rows(4, 8))])
    rejected = {}
    found = scan(tmp_path, index, adopt=True, on_rejected=rejected.__setitem__)
    assert found == index.load() == [entry(rows(0, 4), -1)]
    assert list(rejected) == [damaged]
    assert isinstance(rejected[damaged], SegmentError)
    assert not damaged.exists()
    assert not unfinished.exists()
    assert all(path.exists() for path in [sound, *others])


def test_a_reader_changes_nothing(tmp_path):
    """The same directory: the damaged file is told and stays, and so does the index."""
    _, damaged, *_ = spoil(tmp_path)
    index = Index(tmp_path / PATH)
    index.put([entry(rows(4, 8))])
    index.close()
    before = snapshot(tmp_path)
    reader = Index.read_only(tmp_path / PATH)
    rejected = []
    found = scan(tmp_path, reader, adopt=False, on_rejected=lambda *what: rejected.append(what[0]))
    reader.close()
    assert [entry.segment for entry in found] == [rows(0, 4)]
    assert rejected == [damaged]
    assert snapshot(tmp_path) == before


def test_a_file_that_cannot_be_read_now_is_told_and_stays(tmp_path, index):
    """This process may open the two folders, and no file more."""
    path = stored(tmp_path, rows())
    rejected = {}
    with two_more_files():
        assert scan(tmp_path, index, adopt=True, on_rejected=rejected.__setitem__) == []
    assert "Too many open files" in str(rejected[path])
    assert [entry.segment for entry in scan(tmp_path, index, adopt=True)] == [rows()]


@contextmanager
def two_more_files():
    free = [os.open("/", os.O_RDONLY) for _ in range(3)]
    for fd in free:
        os.close(fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[2], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_layouts_with_many_tensors_survive(tmp_path, index):
    """200 tensors of three dtypes, and the same layout twice."""
    kinds = ("F32", "BF16", "U8")
    tensors = tuple(Tensor(f"{i}.0", kinds[i % 3], (1, i, 2)) for i in range(200))
    entries = [entry(rows(0, 4, tensors)), entry(rows(4, 8, tensors))]
    index.put(entries)
    assert index.load() == entries
