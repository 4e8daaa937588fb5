"""A checkpoint: a position and every layer's state there. How it is taken, and how caches stand there again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .layers.adapt import Layout, fresh_caches, leaves
from .layers.kind import Arrays, Snapshot
from .layers.rows import RowBlock, compact, evaluate_to_keep


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One snapshot per leaf of the model's caches, None for those that rows alone restore."""

    position: int
    snapshots: tuple[Snapshot | None, ...]

    @property
    def nbytes(self) -> int:
        return sum(snapshot.nbytes for snapshot in self.snapshots if snapshot is not None)


def take(
    layout: Layout,
    caches: Sequence[Any],
    position: int,
    captured: Mapping[int, Snapshot] | None = None,
) -> Checkpoint:
    """The state at `position`, evaluated and owning its bytes.

    `position` is where `caches` stand, or lies inside the slice they read last; then `captured`
    has the snapshots of the leaves that cannot look back themselves.
    """
    captured = captured or {}
    snapshots = tuple(
        captured[index] if index in captured else kind.snapshot(cache, position)
        for index, (kind, cache) in enumerate(zip(layout.kinds, leaves(caches), strict=True))
    )
    evaluate_to_keep([s.arrays for s in snapshots if s is not None])
    return Checkpoint(position, snapshots)


def take_rows(layout: Layout, caches: Sequence[Any], start: int, end: int) -> RowBlock | None:
    """The rows of `[start, end)`, evaluated and owning their bytes.

    None where some of them have left the live caches.
    """
    view = view_rows(layout, caches, start, end)
    if view is None:
        return None
    taken = tuple(tuple(compact(x) for x in arrays) for arrays in view.layers)
    del view
    evaluate_to_keep(taken)
    return RowBlock(start, end, taken)


def view_rows(layout: Layout, caches: Sequence[Any], start: int, end: int) -> RowBlock | None:
    """The same where they lie, without a copy: to be let go of before the caches go on."""
    views: list[Arrays] = []
    for kind, cache in zip(layout.kinds, leaves(caches), strict=True):
        rows = kind.view_rows(cache, start, end)
        if rows is None:
            return None
        views.append(rows)
    return RowBlock(start, end, tuple(views))


def restore(
    layout: Layout,
    model: Any,
    blocks: list[RowBlock],
    checkpoint: Checkpoint | None,
    position: int,
    capacity: int,
    *,
    by_layer: bool,
) -> list[Any]:
    """Fresh mlx-lm caches that stand at `position`, with room for `capacity` tokens.

    `blocks` hold the rows of `[0, position)` in order; what the last one holds beyond is left out.
    Position 0 gives empty caches whose buffers are there already. Every byte is copied once, into
    the buffer it will live in: a cache restored at its exact size would be copied again, whole, by
    the first token written behind it.

    `blocks` is emptied. `by_layer`, each layer's rows are let go of as soon as they are copied: where
    nobody else holds them, no more than one layer is held twice.
    """
    caches = fresh_caches(model)
    pieces = [list(block.piece(block.start, min(block.end, position))) for block in blocks]
    blocks.clear()
    for index, (kind, cache) in enumerate(zip(layout.kinds, leaves(caches), strict=True)):
        snapshot = checkpoint.snapshots[index] if checkpoint is not None else None
        rows = [piece[index] for piece in pieces]
        kind.fill(cache, [part for part in rows if part], snapshot, position, capacity)
        if by_layer:
            mx.eval(cache.state)
            del rows
            for piece in pieces:
                piece[index] = ()
            mx.clear_cache()
    mx.eval([cache.state for cache in caches])
    return caches


def grow(layout: Layout, caches: Sequence[Any], capacity: int) -> None:
    """Give live caches room for `capacity` tokens, one layer after another.

    While a layer grows, its old buffer and its new one are both held.
    """
    for kind, cache in zip(layout.kinds, leaves(caches), strict=True):
        kind.grow(cache, capacity)
        mx.eval(cache.state)
