"""A checkpoint: a position and every layer's state there. How it is taken, and how caches stand there again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from .kinds.kind import Arrays, LayerKind, Parts, Snapshot
from .kinds.rows import RowBlock, compact, evaluate_to_keep
from .kinds.smaller import StorePrecision, full, full_pieces, is_small
from .layout import Layout, leaves


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One snapshot per leaf of the model's caches, None for those that rows alone restore.

    `nbytes` are all of its arrays', or `least_bytes` where another rank of a group holds more: asked of every
    checkpoint on a path with each request, added up once.
    """

    position: int
    snapshots: tuple[Snapshot | None, ...]
    least_bytes: int = field(default=0, repr=False, compare=False)
    nbytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        held = sum(snapshot.nbytes for snapshot in self.snapshots if snapshot is not None)
        object.__setattr__(self, "nbytes", max(held, self.least_bytes))


def take(
    layout: Layout,
    caches: Sequence[Any],
    position: int,
    captured: Mapping[int, Snapshot] | None = None,
) -> Checkpoint:
    """The state at `position`, evaluated and owning its bytes.

    `position` is where `caches` stand, or lies inside the slice they read last; then `captured`
    has the snapshots of the leaves that cannot look back themselves, as they are stored.
    """
    captured = captured or {}
    snapshots = tuple(
        _kept(captured[index])
        if index in captured
        else _kept(layout.stored(index, kind.snapshot(cache, position)))
        for index, (kind, cache) in enumerate(zip(layout.kinds, leaves(caches), strict=True))
    )
    evaluate_to_keep([s.arrays for s in snapshots if s is not None])
    return Checkpoint(position, snapshots, layout.least_snapshot_bytes)


def move_state(layout: Layout, caches: Sequence[Any], position: int) -> Checkpoint:
    """The same, out of caches that stand at `position` and are of no use afterwards, but for their rows.

    One layer after another, so that no more than one layer's state is held twice.
    """
    snapshots: list[Snapshot | None] = []
    for index, (kind, cache) in enumerate(zip(layout.kinds, leaves(caches), strict=True)):
        snapshot = _kept(layout.stored(index, kind.snapshot(cache, position)))
        if snapshot is not None:
            evaluate_to_keep(snapshot.arrays)
            kind.let_state_go(cache)
        snapshots.append(snapshot)
    return Checkpoint(position, tuple(snapshots), layout.least_snapshot_bytes)


def _kept(snapshot: Snapshot | None) -> Snapshot | None:
    """What is made small is computed at once, a layer at a time, and then copied out of recycled buffers."""
    if snapshot is None or not is_small(snapshot.arrays):
        return snapshot
    mx.eval(snapshot.arrays)
    return Snapshot(tuple(None if x is None else compact(x) for x in snapshot.arrays))


def take_rows(layout: Layout, caches: Sequence[Any], start: int, end: int) -> RowBlock | None:
    """The rows of `[start, end)`, evaluated and owning their bytes.

    None where some of them have left the live caches.
    """
    view = view_rows(layout, caches, start, end)
    if view is None:
        return None
    taken = stored_rows(layout, view.layers)
    del view
    evaluate_to_keep(taken)
    return RowBlock(start, end, taken, layout.spans, least_row_bytes=layout.least_row_bytes)


def stored_rows(layout: Layout, rows: Sequence[Arrays]) -> tuple[Arrays, ...]:
    """Copies of every layer's rows as the store keeps them, not yet evaluated."""
    return tuple(
        layout.storing.row_copies(kind, arrays)
        for kind, arrays in zip(layout.kinds, rows, strict=True)
    )


def view_rows(layout: Layout, caches: Sequence[Any], start: int, end: int) -> RowBlock | None:
    """The same in full where they lie, without a copy: to be let go of before the caches go on."""
    views: list[Arrays] = []
    for kind, cache in zip(layout.kinds, leaves(caches), strict=True):
        rows = kind.view_rows(cache, start, end)
        if rows is None:
            return None
        views.append(rows)
    return RowBlock(start, end, tuple(views), layout.spans)


def restore(
    layout: Layout,
    model: Any,
    blocks: list[RowBlock],
    snapshots: list[Snapshot | None],
    position: int,
    capacity: int,
    *,
    is_spent: bool,
) -> list[Any]:
    """Fresh mlx-lm caches that stand at `position`, with room for `capacity` tokens.

    `blocks` hold the rows of `[0, position)` in order; what the last one holds beyond is left out.
    Position 0 gives empty caches whose buffers are there already. Every byte is copied once, into
    the buffer it will live in: a cache restored at its exact size would be copied again, whole, by
    the first token written behind it.

    What is stored small becomes full on the way, and so does what running caches have in full of it: the
    bits are the same, whoever holds them. `snapshots` are a checkpoint's, empty where rows alone restore. `is_spent` says that nobody else
    holds some of these arrays, which are let go of as they are copied: no more than one is held twice.
    Both lists are emptied.
    """
    caches = layout.fresh_caches(model)
    is_let_go = is_spent or bool(layout.storing)
    pieces = [list(block.piece(block.start, min(block.end, position))) for block in blocks]
    blocks.clear()
    for index, (kind, cache) in enumerate(zip(layout.kinds, leaves(caches), strict=True)):
        every = [list(piece[index]) for piece in pieces if piece[index]]
        for piece in pieces:
            piece[index] = ()
        snapshot = _popped(snapshots)
        if layout.storing:
            every, snapshot = _in_full(layout.storing, kind, every, snapshot)
        kind.fill(cache, Parts(every, is_let_go), snapshot, position, capacity)
        del every, snapshot
        if is_let_go:
            mx.eval(cache.state)
            mx.clear_cache()
    mx.eval([cache.state for cache in caches])
    return caches


def _in_full(
    storing: StorePrecision,
    kind: LayerKind,
    every: list[list[mx.array]],
    snapshot: Snapshot | None,
) -> tuple[list[list[mx.array]], Snapshot | None]:
    """One layer's rows and state in full, which nobody else holds."""
    state = None if snapshot is None else Snapshot(full(snapshot.arrays))
    return list(full_pieces(storing, kind, every)), state


def _popped(snapshots: list[Snapshot | None]) -> Snapshot | None:
    return snapshots.pop(0) if snapshots else None


def grow(layout: Layout, caches: Sequence[Any], capacity: int) -> None:
    """Give live caches room for `capacity` tokens, one layer after another.

    While a layer grows, its old buffer and its new one are both held.
    """
    for kind, cache in zip(layout.kinds, leaves(caches), strict=True):
        kind.grow(cache, capacity)
        mx.eval(cache.state)
