"""Idle: a cache that its layer never fills. It stands at every position, and holds nothing there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .kind import LayerKind, Parts, Snapshot


@dataclass(frozen=True, slots=True)
class IdleKind(LayerKind):
    """mlx-lm gives each layer a cache, also one whose attention was replaced by a linear map."""

    def snapshot(self, cache: Any, position: int) -> Snapshot | None:
        # A state that appeared since the layout was learnt would be missing behind every restore.
        assert is_idle(cache), f"{type(cache).__name__} was empty at first, and holds a state now"
        return None

    def fill(
        self,
        cache: Any,
        rows: Parts,
        snapshot: Snapshot | None,
        position: int,
        capacity: int,
    ) -> None:
        pass


def is_idle(cache: Any) -> bool:
    """Whether `cache` holds no array."""
    held: Any = tree_flatten([cache.state])
    return not any(isinstance(leaf, mx.array) for _, leaf in held)
