"""What is on the medium, and in which order: a file before its name, its name before anybody is told.

The calls are noted and made; a power cut (`bench kills --cuts`) shows the same where one can be made.
"""

import errno
import fcntl
import os
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_disk_changes import path_of_files

from mlx_hybridcache.disk import files
from mlx_hybridcache.disk.contents import path_of
from mlx_hybridcache.disk.directory import Directory
from mlx_hybridcache.disk.index import Index


@contextmanager
def noted_calls(monkeypatch):
    """What is done to files, in order: (call, path), with descriptors as the paths they were opened by."""
    calls, paths = [], {}
    real = {
        name: getattr(os, name) for name in ("open", "write", "fsync", "replace", "mkdir", "unlink")
    }

    def opened(path, *args, **how):
        fd = real["open"](path, *args, **how)
        paths[fd] = str(path)
        return fd

    def by_descriptor(name):
        def called(fd, *args):
            calls.append((name, paths.get(fd)))
            return real[name](fd, *args)

        return called

    def by_path(name):
        def called(path, *args, **how):
            calls.append((name, str(args[0] if name == "replace" else path)))
            return real[name](path, *args, **how)

        return called

    def put(index, entries):
        calls.append(("index", None))
        return real_put(index, entries)

    def drop(index, names):
        calls.append(("drop", None))
        return real_drop(index, names)

    real_put, real_drop = Index.put, Index.drop
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        for name in ("write", "fsync"):
            patch.setattr(os, name, by_descriptor(name))
        for name in ("replace", "mkdir", "unlink"):
            patch.setattr(os, name, by_path(name))
        patch.setattr(Index, "put", put)
        patch.setattr(Index, "drop", drop)
        yield calls


def written(directory, entry):
    directory.write(entry, [memoryview(bytes(entry.segment.data_nbytes))])


def without_repeats(calls):
    return [call for at, call in enumerate(calls) if at == 0 or calls[at - 1] != call]


@pytest.mark.parametrize("folder", ["new", "there"])
def test_a_file_is_flushed_then_named_then_its_name_is_flushed_then_it_is_noted(
    tmp_path, monkeypatch, folder
):
    """Written, flushed, renamed, the folder flushed, and only then a row in the index. A folder that is new
    has its own name flushed before.
    """
    directory, (entry, *_) = Directory(tmp_path), path_of_files(1)
    directory.open()
    path = path_of(tmp_path, entry.segment)
    if folder == "there":
        files.make_directory(path.parent)
    with noted_calls(monkeypatch) as calls:
        written(directory, entry)
    directory.close()
    seen = without_repeats(calls)
    made = [each for each in seen if each[0] == "mkdir"]
    if folder == "new":
        root, segments = str(tmp_path), str(path.parent.parent)
        assert seen[:4] == [
            ("mkdir", segments),
            ("fsync", root),
            ("mkdir", str(path.parent)),
            ("fsync", segments),
        ]
        seen = seen[4:]
    assert len(made) == (2 if folder == "new" else 0)
    partial = seen[0][1]
    assert partial.endswith(files.PARTIAL)
    assert Path(partial).parent == path.parent
    assert seen == [
        ("write", partial),
        ("fsync", partial),
        ("replace", str(path)),
        ("fsync", str(path.parent)),
        ("index", None),
    ]


def test_a_file_is_deleted_before_its_row_is(tmp_path, monkeypatch):
    """What a kill leaves between the two is a row without a file, which the next start drops."""
    directory, (entry, *_) = Directory(tmp_path), path_of_files(1)
    directory.open()
    written(directory, entry)
    with noted_calls(monkeypatch) as calls:
        directory.delete(entry.segment)
    directory.close()
    path = str(path_of(tmp_path, entry.segment))
    assert [call for call in calls if call[0] in {"unlink", "drop"}] == [
        ("unlink", path),
        ("drop", None),
    ]


@pytest.mark.parametrize("fails", ["file", "folder"])
def test_what_could_not_be_flushed_is_not_noted(tmp_path, monkeypatch, fails):
    """The medium fails: an error, no row, and a file that could not be flushed never had its name."""
    directory, (entry, *_) = Directory(tmp_path), path_of_files(1)
    directory.open()
    fsync = os.fsync
    path = path_of(tmp_path, entry.segment)
    files.make_directory(path.parent)

    def failing(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode) == (fails == "folder"):
            raise OSError(errno.EIO, "the medium fails")
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="the medium fails"):
            written(directory, entry)
    directory.close()
    assert path.exists() == (fails == "folder")
    assert not list(tmp_path.rglob(f"*{files.PARTIAL}"))
    index = Index(tmp_path / "index.sqlite")
    assert index.load() == []
    index.close()


@pytest.mark.parametrize("knows", [True, False])
def test_on_macos_the_drives_own_cache_is_flushed_too(tmp_path, monkeypatch, knows):
    """F_FULLFSYNC for the file and for its folder; on a network that does not know it, fsync for both."""
    asked, plain, fsync = [], [], os.fsync

    def full(fd, command):
        asked.append((command, stat.S_ISDIR(os.fstat(fd).st_mode)))
        if not knows:
            raise OSError(errno.ENOTSUP, "not here")
        return 0

    monkeypatch.setattr(files.sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full)
    monkeypatch.setattr(os, "fsync", lambda fd: plain.append(fd) or fsync(fd))
    with files.replacing(tmp_path / "file") as fd:
        files.write_all(fd, b"data")
    assert asked == [(51, False), (51, True)]
    assert len(plain) == (0 if knows else 2)
    assert (tmp_path / "file").read_bytes() == b"data"
