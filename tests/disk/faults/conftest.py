"""A directory with one prompt, a copy of it to be damaged, and what was logged."""

import logging
import shutil

import pytest
import tiny
from directories import faults
from directories.faults import Said
from directories.filled import FIRST, MODEL

from mlx_hybridcache.disk import thread
from mlx_hybridcache.disk.tier import write_behind


@pytest.fixture(scope="session")
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
