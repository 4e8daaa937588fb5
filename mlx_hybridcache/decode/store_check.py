"""What a smaller store costs in exactness, measured on the model that is served before it serves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..caches import checkpoint as checkpoints
from ..caches.layout import Layout, fresh_caches
from ..report import StoreError

READ = (256, 512)
"""Positions that are restored, in tokens."""

AHEAD = 16
"""Tokens behind each, before which the next token's distributions are compared."""

STEP = 256


def measure(model: Any, tokenizer: Any, layout: Layout) -> StoreError:
    """Read a text, give it back from the smaller store at two positions, and compare what follows."""
    tokens = _sample(tokenizer, layout.vocabulary)
    kls: list[float] = []
    others: list[int] = []
    cold = fresh_caches(model)
    begin = 0
    for position in _positions(len(tokens)):
        for a in range(begin, position, STEP):
            model(mx.array([tokens[a : min(a + STEP, position)]]), cache=cold)
            mx.eval([cache.state for cache in cold])
        hot = _given_back(model, layout, cold, position)
        begin = position + AHEAD
        for index, token in enumerate(tokens[position:begin]):
            p, q = (_log_probabilities(model, caches, token) for caches in (cold, hot))
            kls.append(max(0.0, float((np.exp(p) * (p - q)).sum())))
            if p.argmax() != q.argmax():
                others.append(index)
    mx.clear_cache()
    return StoreError(
        len(kls), sum(kls) / len(kls), max(kls), len(others), min(others, default=None)
    )


def _positions(tokens: int) -> list[int]:
    """Where to restore in a text of so many tokens."""
    return [each for each in READ if each + AHEAD <= tokens] or [max(1, tokens - AHEAD)]


def _given_back(model: Any, layout: Layout, caches: Sequence[Any], position: int) -> list[Any]:
    """Caches as a request would get them that resumes where `caches` stand."""
    taken = checkpoints.take(layout, caches, position)
    rows = checkpoints.take_rows(layout, caches, 0, position)
    blocks, snapshots = [rows] if rows is not None else [], [*taken.snapshots]
    return checkpoints.restore(
        layout, model, blocks, snapshots, position, position + AHEAD, is_spent=False
    )


def _log_probabilities(model: Any, caches: Sequence[Any], token: int) -> np.ndarray[Any, Any]:
    logits = model(mx.array([[token]]), cache=caches)[0, -1].astype(mx.float32)
    return log_probabilities(np.array(logits))


def log_probabilities(logits: Any) -> np.ndarray[Any, Any]:
    """Of logits `(vocabulary,)`, in float64."""
    x = np.array(logits, np.float64)
    return x - np.logaddexp.reduce(x)  # type: ignore[no-any-return]


def _sample(tokenizer: Any, vocabulary: int) -> list[int]:
    """Tokens of a text that every Python brings: a module's source. Without a tokenizer, any tokens."""
    most = READ[-1] + AHEAD
    if tokenizer is not None:
        text = Path(argparse.__file__).read_text(encoding="utf-8")[: 12 * most]
        found = [int(each) for each in tokenizer.encode(text)][:most]
        if len(found) > AHEAD and max(found) < vocabulary:
            return found
    return [(1 + 7919 * index) % vocabulary for index in range(most)]
