"""A directory with all of one prompt in its files: opened after a fault, and whole again afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import tiny

from directories.faults import PATIENCE_SECONDS, Said, served
from mlx_hybridcache import HybridPromptCache

MODEL = "qwen3_next"
FIRST = oracle.prompt(300, seed=1)
SECOND = oracle.prompt(280, seed=2)
END = 299
"""The last checkpoint of `FIRST`: its end less the token that is always read."""


def opened(root: Path, **settings: Any) -> HybridPromptCache:
    """A cache in the directory, of the model that wrote it."""
    return oracle.new_cache(tiny.build(MODEL), cache_dir=root, **settings)


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for what other threads and processes do."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.01)


def assert_healed(root: Path, said: Said, *prompts: list[int]) -> None:
    """Everything was written anew: the next process finds all of it, and has nothing to say."""
    said.take()
    with opened(root) as cache:
        assert [served(cache, p) for p in prompts] == [("disk", len(p) - 1) for p in prompts]
        assert cache.disk_stats().rejected == 0
    assert said.take() == []
    assert not list(root.rglob("*.partial"))
