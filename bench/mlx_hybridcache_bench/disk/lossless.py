"""What lossless compression would save of real states and rows: `python -m mlx_hybridcache_bench.disk.lossless`.

Bytes only, of the bundled model: zstd at level 3 as they are, with the bytes of all numbers side by side
(shuffled), and as differences from the checkpoint before. It needs the package `zstandard`.
"""

from __future__ import annotations

import time
from importlib import import_module
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hybridcache import models
from mlx_hybridcache.caches import checkpoint as checkpoints
from mlx_hybridcache.caches.layout import Layout
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.demo.workloads import default_text

STEP, CHECKPOINTS = 256, 8
"""Tokens between checkpoints, and how many."""

LEVEL = 3

Words = np.ndarray[Any, np.dtype[np.uint32]]


def _words(arrays: Any) -> Words:
    return np.concatenate([np.array(x).view(np.uint32).ravel() for x in arrays if x is not None])


def _shuffled(words: Words) -> bytes:
    return words.view(np.uint8).reshape(-1, 4).T.tobytes()


def _read() -> list[tuple[Words, Words]]:
    """The states at each checkpoint, and the rows that lead to it from the one before."""
    model, tokenizer = models.load(str(BUNDLED_MODEL))
    layout = Layout.of(model, STEP)
    ids = list(tokenizer.encode(default_text()[: 16 * STEP * CHECKPOINTS]))
    caches, found = layout.fresh_caches(model), []
    for start in range(0, STEP * CHECKPOINTS, STEP):
        model(mx.array([ids[start : start + STEP]]), cache=caches)
        mx.eval([cache.state for cache in caches])
        taken = checkpoints.take(layout, caches, start + STEP)
        rows = checkpoints.take_rows(layout, caches, start, start + STEP)
        assert rows is not None
        states = [x for each in taken.snapshots if each is not None for x in each.arrays]
        found.append((_words(states), _words([x for layer in rows.layers for x in layer])))
    layout.release()
    return found


def main() -> None:
    """Print each way's share of the bytes, and its MB a second."""
    compress = import_module("zstandard").ZstdCompressor(level=LEVEL).compress
    found = _read()
    states, rows = [each for each, _ in found], [each for _, each in found]
    deltas = [b ^ a for a, b in pairwise(states)]
    ways = {
        "states": [x.tobytes() for x in states],
        "states, shuffled": [_shuffled(x) for x in states],
        "states, xor with the one before, shuffled": [_shuffled(x) for x in deltas],
        "rows": [x.tobytes() for x in rows],
        "rows, shuffled": [_shuffled(x) for x in rows],
    }
    for name, each in ways.items():
        raw, began = sum(map(len, each)), time.process_time()
        small = sum(len(compress(x)) for x in each)
        seconds = time.process_time() - began
        print(f"{name}: {small / raw:.3f} of {raw:,} bytes, {raw / 1e6 / seconds:,.0f} MB/s")


if __name__ == "__main__":
    main()
