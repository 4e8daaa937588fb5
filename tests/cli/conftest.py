"""A cache directory with something in it, and the command that looks into it."""

import shutil
from types import SimpleNamespace

import bundled
import oracle
import pytest
import tiny
from directories.cache_directories import BRANCHED, BUDGET, CHATS, ROWS_ONLY, TEXT, id_at

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.cli.main import main


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Two chats with one system prompt, two texts that part ways at 1,500, and a model of rows alone."""
    root = tmp_path_factory.mktemp("made") / "cache"
    with HybridPromptCache(*bundled.load(), cache_dir=root, **BUDGET) as cache:
        for prompt in (*CHATS[:2], TEXT, BRANCHED):
            cache.prefill(prompt).release()
        stored = sorted(len(tokens) for tokens in cache.checkpoints())
        assert cache.flush(60)
    with oracle.new_cache(tiny.build("llama"), cache_dir=root) as cache:
        cache.prefill(ROWS_ONLY).release()
        assert cache.flush(60)
        stats = cache.disk_stats()
    return SimpleNamespace(root=root, positions=stored, stats=stats)


@pytest.fixture
def root(made, tmp_path):
    """A copy of its own."""
    return shutil.copytree(made.root, tmp_path / "cache")


@pytest.fixture
def cache(root, capsys):
    """Run one command on that copy: exit status, output and errors."""

    def run(*words, at=root):
        status = main(["cache", *map(str, words), "--cache-dir", str(at)])
        shown = capsys.readouterr()
        return SimpleNamespace(status=status, out=shown.out, err=shown.err)

    return run


# export and import


@pytest.fixture
def archive(cache, tmp_path):
    """The texts' first 1,500 tokens: the rows of the first text reach beyond."""
    to = tmp_path / "texts.tar"
    assert cache("export", id_at(cache, 1500), "--to", to).status == 0
    return to
