"""A stand-in with Qwen3-Next-80B's caches and no weights: what the cache handles, at full size.

Each forward writes rows and states of the real shapes into mlx-lm's own caches. Their values say
which token and which position they belong to, so that a restored cache can be checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, KVCache

VOCABULARY = 128
"""Token ids below this are whole numbers in bfloat16."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """The cache shapes of one model; every fourth layer is attention, as in Qwen3-Next."""

    attention_layers: int = 12
    recurrent_layers: int = 36
    kv_heads: int = 2
    head_dim: int = 256
    value_heads: int = 32
    value_dim: int = 128
    key_dim: int = 128
    taps: int = 3
    channels: int = 8192

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's keys and values (bfloat16), all layers."""
        return self.attention_layers * 2 * self.kv_heads * self.head_dim * 2

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of one checkpoint: float32 states and bfloat16 taps, all layers."""
        state = self.value_heads * self.value_dim * self.key_dim * 4
        return self.recurrent_layers * (state + self.taps * self.channels * 2)


QWEN3_NEXT_80B = Shapes()

TINY = Shapes(
    attention_layers=2,
    recurrent_layers=6,
    head_dim=32,
    value_heads=4,
    value_dim=32,
    key_dim=32,
    channels=512,
)
"""The same proportions, for trying things out."""

SHAPES = {"qwen3-next-80b": QWEN3_NEXT_80B, "tiny": TINY}


class StandIn(nn.Module):
    """Behaves like a model towards its caches. Its logits are zeros."""

    def __init__(self, shapes: Shapes = QWEN3_NEXT_80B) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # mlx gives it no types
        self.layers: list[nn.Module] = []
        self._shapes = shapes

    def make_cache(self) -> list[Any]:
        """Empty caches, three recurrent ones before each of attention."""
        shapes = self._shapes
        each = shapes.recurrent_layers // shapes.attention_layers
        caches: list[Any] = []
        for _ in range(shapes.attention_layers):
            caches += [*(ArraysCache(size=2) for _ in range(each)), _empty_rows()]
        return caches

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        """Tokens `(1, L)` into `cache`; logits `(1, L, VOCABULARY)`."""
        shapes, length = self._shapes, inputs.shape[1]
        rows = mx.broadcast_to(
            inputs.astype(mx.bfloat16)[:, None, :, None],
            (1, shapes.kv_heads, length, shapes.head_dim),
        )
        for layer in cache:
            if isinstance(layer, KVCache):
                layer.update_and_fetch(rows, rows)
            else:
                self._scan(layer, inputs)
        return mx.zeros((1, length, VOCABULARY))

    def _scan(self, layer: ArraysCache, inputs: mx.array) -> None:
        shapes, length = self._shapes, inputs.shape[1]
        if layer[1] is None:
            layer[1] = mx.zeros((1, shapes.value_heads, shapes.value_dim, shapes.key_dim))
        layer[1] = layer[1] + length  # a state that says how many tokens it has read
        # Added to zeros: a broadcast number would be an array that owns no bytes of its own.
        taps = mx.zeros((1, shapes.taps, shapes.channels), mx.bfloat16)
        layer[0] = taps + inputs[0, -1].astype(mx.bfloat16)


def _empty_rows() -> Any:
    make: Any = KVCache  # its constructor has no types
    return make()


def stands_at(caches: list[Any], tokens: list[int]) -> bool:
    """Whether restored `caches` hold the rows of exactly `tokens` and the states at their end."""
    wanted = mx.array(tokens).astype(mx.bfloat16)[:, None]
    layer: Any
    for layer in caches:
        keeps_rows = isinstance(layer, KVCache)
        if keeps_rows:
            rows = (layer.keys[0, :, : len(tokens)], layer.values[0, :, : len(tokens)])
            right = layer.offset == len(tokens) and all(
                bool(mx.all(x == wanted).item()) for x in rows
            )
        else:
            taps, state = layer[0], layer[1]
            right = bool(mx.all(state == len(tokens)).item() and mx.all(taps == tokens[-1]).item())
        if not right:
            return False
    return True
