"""Rows: one key and one value per token and head, so the past can be cut at any token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple

import mlx.core as mx

from .kind import Arrays, LayerKind, Parts, Snapshot

AXIS = 2  # (batch, heads, tokens, dim)

END = 2**62
"""Behind every position."""


class Span(NamedTuple):
    """The positions of which an array has rows, half open, and how many of them make a row."""

    start: int
    end: int
    every: int = 1


EVERYWHERE = Span(0, END)


def rows_in(span: Span, start: int, end: int) -> tuple[int, int]:
    """Which rows an array has of `[start, end)`; there may be none. A row is the last position's it is made of."""
    low, high, every = span
    return min(max(start, low), high) // every, min(max(end, low), high) // every


Origin = tuple[int, int, int]
"""The rows of positions `[a, b)`, and their lineage."""

_lineages = count(1)


def new_lineage() -> int:
    """A number for rows that are computed once: whatever is copied from them has it too, and the same bits."""
    return next(_lineages)


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows of positions `[start, end)` for every layer that keeps rows.

    `layers[i]` holds that layer's keys `(1, heads, end - start, key_dim)` and values, compact and
    evaluated: a view would keep the running cache's whole buffer alive. Where `spans` are given, for each
    layer one an array, an array has rows of the positions in its span only. In a smaller store each is
    integers and then scales, with the same tokens along the same axis (`smaller`). Blocks of
    one `lineage` were copied from each other, and have the same bits at the same positions. A token counts for
    `least_row_bytes` at least: what it weighs where another rank of a group holds more of it.
    """

    start: int
    end: int
    layers: tuple[Arrays, ...]
    spans: tuple[tuple[Span, ...], ...] = ()
    lineage: int = field(default_factory=new_lineage)
    least_row_bytes: int = 0

    @property
    def nbytes(self) -> int:
        held = sum(array.nbytes for arrays in self.layers for array in arrays)
        return max(held, (self.end - self.start) * self.least_row_bytes)

    def split(self, position: int) -> tuple[RowBlock, RowBlock]:
        """Two blocks that own their bytes, `[start, position)` and `[position, end)`."""
        above, below = self.piece(self.start, position), self.piece(position, self.end)
        upper = replace(self, end=position, layers=above)
        lower = replace(self, start=position, layers=below)
        evaluate_to_keep(upper.layers, lower.layers)
        return upper, lower

    def piece(self, start: int, end: int) -> tuple[Arrays, ...]:
        """Unevaluated copies of the rows of `[start, end)`, or the block's own arrays if that is all."""
        if (start, end) == (self.start, self.end):
            return self.layers
        return tuple(
            tuple(
                compact(x[:, :, slice(*self.within(leaf, which, start, end))])
                for which, x in enumerate(arrays)
            )
            for leaf, arrays in enumerate(self.layers)
        )

    def within(self, leaf: int, which: int, start: int, end: int) -> tuple[int, int]:
        """Where in array `which` of a layer the rows of `[start, end)` lie, as far as they are here."""
        span = self.spans[leaf][which] if self.spans else EVERYWHERE
        first, _ = rows_in(span, self.start, self.end)
        a, b = rows_in(span, max(start, self.start), min(end, self.end))
        return a - first, b - first


def origins_of(blocks: Iterable[RowBlock], end: int) -> list[Origin]:
    """Where the rows of adjoining blocks before `end` come from."""
    found: list[Origin] = []
    for block in blocks:
        a, b, lineage = block.start, min(block.end, end), block.lineage
        if a >= b:
            break
        if found and found[-1][1:] == (a, lineage):
            a = found.pop()[0]
        found.append((a, b, lineage))
    return found


def compact(view: mx.array) -> mx.array:
    """A copy that owns exactly its bytes.

    `mx.contiguous` would hand a view through whose buffer is up to 16 KiB larger than the view.
    """
    return mx.array(view)


def evaluate_to_keep(*arrays: Any) -> None:
    """Evaluate copies that will be kept, into buffers of their own size.

    MLX would else take recycled buffers, each up to two pages larger than was asked for: with small
    arrays that was 3 % of the store, held and never reported.
    """
    mx.clear_cache()
    mx.eval(*arrays)


@dataclass(frozen=True, slots=True)
class RowsKind(LayerKind):
    """A growing buffer of keys and values. Shapes `(1, heads, 1, dim)` as one token's are."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[mx.Dtype, ...]
    headroom: bool  # False for caches that take exactly what is there, and grow by concatenation

    goes_back = True
    stores_small = "rows"

    @classmethod
    def seen(cls, cache: Any, headroom: bool) -> RowsKind:
        """From a cache that has read a few tokens."""
        keys, values = cache.keys, cache.values
        shapes = tuple((1, x.shape[1], 1, x.shape[3]) for x in (keys, values))
        return cls(shapes, (keys.dtype, values.dtype), headroom)

    @property
    def row_bytes(self) -> int:
        return sum(self._each())

    @property
    def array_bytes(self) -> int:
        return max(self._each())

    def _each(self) -> list[int]:
        return [
            shape[1] * shape[3] * dtype.size
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]

    def position(self, cache: Any) -> int:
        return int(cache.offset)

    def go_back(
        self, cache: Any, mark: Any, stands: int, count: int, snapshot: Snapshot | None = None
    ) -> None:
        cache.trim(stands - count)
        if not self.headroom:  # such a cache appends to all that it has, whatever its offset
            cache.state = tuple(
                compact(x[:, :, : cache.offset]) for x in (cache.keys, cache.values)
            )

    def view_rows(self, cache: Any, start: int, end: int) -> Arrays:
        return tuple(x[:, :, start:end] for x in (cache.keys, cache.values))

    def take_arrays(self, cache: Any) -> Arrays:
        buffers = (cache.keys, cache.values)
        cache.keys = cache.values = None
        return buffers

    def fill(
        self,
        cache: Any,
        rows: Parts,
        snapshot: Snapshot | None,
        position: int,
        capacity: int,
    ) -> None:
        room = capacity - position if self.headroom else 0
        buffers = []
        for which, (shape, dtype) in enumerate(zip(self.shapes, self.dtypes, strict=True)):
            parts = rows.take(which)
            buffers.append(joined(parts, room, shape, dtype) if parts or room else None)
            if rows.is_spent and parts:
                mx.eval(buffers[-1])
                parts.clear()
                mx.clear_cache()
        if buffers[0] is not None:
            cache.keys, cache.values = buffers
            cache.offset = position

    def buffer_rows(self, position: int, capacity: int, which: int) -> int:
        return max(position, capacity) if self.headroom else position

    def adopt(self, cache: Any, buffers: Arrays, snapshot: Snapshot | None, position: int) -> None:
        cache.keys, cache.values = buffers
        cache.offset = position

    def grow(self, cache: Any, capacity: int) -> None:
        room = capacity - cache.keys.shape[AXIS]
        if self.headroom and room > 0:
            cache.keys, cache.values = (with_room(x, room) for x in (cache.keys, cache.values))


def joined(
    parts: Sequence[mx.array], room: int, shape: tuple[int, ...], dtype: mx.Dtype
) -> mx.array:
    """One buffer of all `parts` and of `room` zeros, in memory of its own even where there are only those.

    MLX's CPU backend concatenates element by element, so eight bytes count as one element. Zeros are
    made as such: to see narrow ones as wide ones MLX would copy them all.
    """
    _, heads, _, dim = shape
    wide = dim * dtype.size % mx.uint64.size == 0
    if wide:
        shape = (1, heads, 1, dim * dtype.size // mx.uint64.size)
        parts = [part.view(mx.uint64) for part in parts]
    if room:
        parts = [*parts, blank(shape, mx.uint64 if wide else dtype, room)]
    joined = mx.contiguous(mx.concatenate(list(parts), axis=AXIS))
    return joined.view(dtype) if wide else joined


def with_room(rows: mx.array, more: int) -> mx.array:
    """The same rows in a buffer with room for so many more."""
    if more <= 0:
        return rows
    if rows.shape[AXIS] == 0:
        return mx.zeros((*rows.shape[:AXIS], more, *rows.shape[AXIS + 1 :]), rows.dtype)
    return joined([rows], more, tuple(rows.shape), rows.dtype)


def blank(shape: tuple[int, ...], dtype: mx.Dtype, rows: int) -> mx.array:
    """Zeros that cost no memory until they are copied into a buffer."""
    return mx.broadcast_to(mx.array(0, dtype), (1, shape[1], rows, shape[3]))
