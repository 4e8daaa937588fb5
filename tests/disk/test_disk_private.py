"""Prompts are private: what is the cache's own is its owner's alone, and what is not is left alone."""

import logging

import pytest
from directories.faults import Said
from directories.segment_files import umask
from test_disk_changes import path_of_files

from mlx_hybridcache.disk.directory import Directory


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="mlx_hybridcache")
    return Said(caplog)


def used(root, prompts=2):
    """Let a cache write into a directory, and end."""
    directory = Directory(root)
    directory.open()
    for entry in path_of_files(prompts):
        directory.write(entry, [memoryview(bytes(entry.segment.data_nbytes))])
    directory.close()


def modes(root):
    """The mode of everything in a directory that the cache made, and of that itself."""
    return {
        "root": mode(root),
        "folders": {mode(path) for path in root.rglob("*") if path.is_dir()},
        "files": {mode(path) for path in root.rglob("*") if path.is_file()},
    }


def mode(path):
    return f"{path.stat().st_mode & 0o7777:o}"


PRIVATE = {"root": "700", "folders": {"700"}, "files": {"600"}}


@pytest.mark.parametrize("before", ["none", "empty", "its own"])
def test_a_directory_of_the_caches_own_is_private(tmp_path, said, before):
    """Not there yet, empty at 0775, or written earlier and opened to all since: 0700, and nothing to say."""
    root = tmp_path / "cache"
    if before != "none":
        root.mkdir()
        root.chmod(0o775)
    if before == "its own":
        used(root)
        root.chmod(0o775)
        (root / "segments").chmod(0o755)
    with umask(0):
        used(root, 3)
    assert modes(root) == PRIVATE
    assert said.take() == []


def test_a_directory_with_other_things_in_it_keeps_its_mode(tmp_path, said):
    """0775 with a colleague's notes: it stays so and is told each start; the cache's own files are private."""
    root = tmp_path / "shared"
    root.mkdir()
    (root / "notes.txt").write_text("theirs")
    (root / "notes.txt").chmod(0o644)
    root.chmod(0o775)
    for _ in range(2):
        with umask(0):
            used(root)
        assert mode(root) == "775"
        line = said.take_one()
        assert "holds 'notes.txt', which is not this cache's, so its mode stays 0775" in line
        assert "or remove it. Name an empty directory" in line
    assert mode(root / "notes.txt") == "644"
    (root / "notes.txt").unlink()
    assert modes(root) == {**PRIVATE, "root": "775"}
    used(root)  # nothing but its own is left
    assert modes(root) == PRIVATE


def test_other_things_in_a_private_directory_are_nobodys_business(tmp_path, said):
    """0700, and whatever a file manager leaves behind: no word."""
    used(tmp_path)
    (tmp_path / ".DS_Store").touch()
    used(tmp_path)
    assert said.take() == []
    assert mode(tmp_path) == "700"


def test_other_things_in_the_folder_of_segments_keep_its_mode(tmp_path, said):
    """Somebody keeps backups in there at 0755: told, and the files lie in folders of 0700."""
    folder = tmp_path / "segments"
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "backup").touch()
    used(tmp_path)
    assert "segments holds 'backup'" in said.take_one()
    assert mode(folder) == "755"
    assert {mode(path) for path in folder.iterdir() if path.is_dir()} == {"700"}
