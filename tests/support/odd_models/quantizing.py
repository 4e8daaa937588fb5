"""Models whose heads are wide enough to be quantized, and what mlx-lm itself makes of quantized rows.

The reference is mlx-lm's own quantized cache, begun at exactly one position: a prompt is read up to there,
converted, and read on.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import tiny
from mlx_lm.models.cache import KVCache, make_prompt_cache

HEAD_DIM = 64


@functools.cache
def wide(family: str, **changed: Any) -> nn.Module:
    """The tiny model of a family with heads of 64, and other fields of its configuration as given."""
    plain = tiny.build(family)
    if not changed:
        changed = {"head_dim": HEAD_DIM}
    return tiny.made(lambda: type(plain)(replace(plain.args, **changed)))


@dataclass(frozen=True)
class Quantized:
    """What a cache is made with."""

    bits: int
    start: int
    group_size: int = 64

    @property
    def settings(self) -> dict[str, int]:
        """As the cache takes them."""
        return {
            "kv_bits": self.bits,
            "kv_group_size": self.group_size,
            "quantized_kv_start": self.start,
        }

    def convert(self, caches: list[Any], position: int) -> None:
        """As mlx-lm does it, for caches that stand at `position`."""
        if position < self.start:
            return
        for index, cache in enumerate(caches):
            if type(cache) is KVCache:
                caches[index] = cache.to_quantized(self.group_size, self.bits)

    def read(
        self, model: nn.Module, caches: list[Any], tokens: Sequence[int], at: int, step: int
    ) -> np.ndarray:
        """Logits `(len(tokens), vocabulary)` of reading on from `at`, where `caches` stand."""
        parts, end = [], at + len(tokens)
        while at < end:
            self.convert(caches, at)
            to = min(end, at - at % step + step)
            to = min(to, self.start) if at < self.start else to
            logits = model(mx.array([list(tokens[at - end : to - end or None])]), cache=caches)
            mx.eval(logits, [cache.state for cache in caches])
            parts.append(np.array(logits[0].astype(mx.float32)))
            at = to
        return np.concatenate(parts)

    def cold(self, model: nn.Module, tokens: Sequence[int], step: int = 64) -> np.ndarray:
        """The same from empty caches, read once."""
        known, key = _COLDS.setdefault(id(model), (model, {}))[1], (self, tuple(tokens), step)
        if key not in known:
            known[key] = self.read(model, list(make_prompt_cache(model)), tokens, 0, step)
        return known[key]


_COLDS: dict[int, tuple[nn.Module, dict[Any, np.ndarray]]] = {}
"""Each model with what it says, so that no other one gets its number."""
