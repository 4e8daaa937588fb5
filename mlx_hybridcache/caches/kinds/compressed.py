"""Compressed rows: one row for each whole group of tokens, beside a window and the tokens of the open group.

A row is there once its group's last token was read, so rows can be cut at any position, as those of single
tokens can: `[start, end)` has the rows of the groups that close in it. What is between two rows is state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .kind import Arrays, LayerKind, Parts, Snapshot
from .rows import AXIS, END, Span, blank, compact, rows_in

ROWS = ("compress_kv", "index_k")
"""What grows by a row a group. A layer has both, the first alone, or none."""

OPEN = ("pending_kv", "pending_gate")
"""What the open group's tokens have left so far, where a group is more than one token."""

LEAST, MOST = 64, 2**16
"""Tokens that are looked ahead, without computing them, for a layer's first group to close."""


@dataclass(frozen=True, slots=True)
class CompressedKind(LayerKind):
    """mlx-lm's cache of one layer of DeepSeek V4.1: rows `(1, groups, dim)`, a window of `size` rows, and
    the open group's `(1, tokens, dim)`.

    `every` tokens make a row of `shapes`, as `(1, 1, 1, dim)`; there are none where `shapes` is empty. In a
    snapshot the open group has room for all tokens but one, so that its shape is known of any position.
    """

    size: int
    step: int
    every: int
    window_row_nbytes: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[mx.Dtype, ...]
    open_widths: tuple[int, ...]
    open_dtypes: tuple[mx.Dtype, ...]

    needs_snapshot = True
    sees_interior = False
    goes_back_in_blocks = False  # both the rows before a block and those behind it would be held

    @classmethod
    def seen(cls, cache: Any, step: int) -> CompressedKind:
        """From a cache that has read enough for a group to close, for slices of at most `step`."""
        rows = [x for name in ROWS if (x := getattr(cache, name)) is not None]
        left = [x for name in OPEN if (x := getattr(cache, name)) is not None]
        pending = left[0].shape[1] if left else 0
        return cls(
            size=cache.window_size,
            step=step,
            every=(cache.offset - pending) // rows[0].shape[1] if rows else 1,
            window_row_nbytes=cache.window.shape[-1] * cache.window.dtype.size,
            shapes=tuple((1, 1, 1, x.shape[-1]) for x in rows),
            dtypes=tuple(x.dtype for x in rows),
            open_widths=tuple(x.shape[-1] for x in left),
            open_dtypes=tuple(x.dtype for x in left),
        )

    @property
    def spans(self) -> tuple[Span, ...]:
        return (Span(0, END, self.every),) * len(self.shapes)

    @property
    def row_bytes(self) -> int:
        """The most: a token's part of a row, rounded up."""
        return -(-sum(self._each()) // self.every)

    @property
    def array_bytes(self) -> int:
        return -(-max(self._each(), default=0) // self.every)

    def _each(self) -> list[int]:
        return [
            shape[-1] * dtype.size for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]

    def rows_nbytes(self, start: int, end: int) -> int:
        return (end // self.every - start // self.every) * sum(self._each())

    def buffer_nbytes(self, capacity: int) -> int:
        return self.rows_nbytes(0, capacity)

    @property
    def snapshot_bytes(self) -> int:
        return self.size * self.window_row_nbytes + self._open_nbytes(self.every - 1)

    @property
    def running_bytes(self) -> int:
        return (self.size + self.step) * self.window_row_nbytes + self._open_nbytes(
            self.every + self.step
        )

    def _open_nbytes(self, tokens: int) -> int:
        each = zip(self.open_widths, self.open_dtypes, strict=True)
        return tokens * sum(width * dtype.size for width, dtype in each)

    def position(self, cache: Any) -> int:
        return int(cache.offset)

    def view_rows(self, cache: Any, start: int, end: int) -> Arrays:
        return tuple(
            blank(shape, dtype, 0)
            if rows is None
            else rows[:, None, slice(*rows_in(span, start, end))]
            for rows, span, shape, dtype in zip(
                self._rows(cache), self.spans, self.shapes, self.dtypes, strict=True
            )
        )

    def _rows(self, cache: Any) -> list[mx.array | None]:
        return [getattr(cache, name) for name in ROWS[: len(self.shapes)]]

    def every_array(self, buffers: Arrays) -> Arrays:
        missing = [*zip(self.shapes, self.dtypes, strict=True)][len(buffers) :]
        return (*buffers, *(blank(shape, dtype, 0) for shape, dtype in missing))

    def take_arrays(self, cache: Any) -> Arrays:
        rows = self.every_array(tuple(x[:, None] for x in self._rows(cache) if x is not None))
        for name in ROWS:
            setattr(cache, name, None)
        return rows

    def snapshot(self, cache: Any, position: int) -> Snapshot:
        assert position == cache.offset
        window = compact(cache.window[:, -self.size :])
        return Snapshot(
            (window, *(self._open(cache, which) for which in range(len(self.open_widths))))
        )

    def _open(self, cache: Any, which: int) -> mx.array:
        rows = getattr(cache, OPEN[which])
        room = self.every - 1 - rows.shape[1]
        return compact(mx.pad(rows, [(0, 0), (0, room), (0, 0)]))

    def let_state_go(self, cache: Any) -> None:
        for name in ("window", *OPEN):
            setattr(cache, name, None)

    def fill(
        self,
        cache: Any,
        rows: Parts,
        snapshot: Snapshot | None,
        position: int,
        capacity: int,
    ) -> None:
        made = []
        for which in range(len(self.shapes)):
            parts = [x for x in rows.take(which) if x.shape[AXIS]]
            if parts:
                made.append(mx.contiguous(mx.concatenate(parts, axis=AXIS)))
        self.adopt(cache, tuple(made), snapshot, position)

    def buffer_rows(self, position: int, capacity: int, which: int) -> int:
        return position // self.every

    def adopt(self, cache: Any, buffers: Arrays, snapshot: Snapshot | None, position: int) -> None:
        for name, buffer in zip(ROWS, buffers, strict=False):  # none before the first group closes
            setattr(cache, name, buffer[:, 0])
        if snapshot is None:
            return
        window, *left = (compact(x) for x in snapshot.arrays if x is not None)
        cache.window, cache.offset = window, position
        for name, kept in zip(OPEN, left, strict=False):
            setattr(cache, name, kept[:, : position % self.every])


def looked_ahead(
    model: Any,
    caches: Sequence[Any],
    make: Callable[[Any], list[Any]],
    flat: Callable[[Sequence[Any]], list[Any]],
) -> Sequence[Any]:
    """Caches in which each layer that makes rows has one, for their shapes.

    `make` gives the model's empty caches and `flat` their leaves, as `caches` are. Nothing is computed.
    """
    tokens = LEAST
    while tokens <= MOST and any(_waits(cache) for cache in caches):
        made: list[Any] = []

        def read(ids: mx.array, made: list[Any] = made) -> mx.array:
            made.extend(make(model))
            model(ids, cache=made)
            return ids

        mx.compile(read)(mx.array([[0] * tokens]))
        caches, tokens = flat(made), 4 * tokens
    return caches


def _waits(cache: Any) -> bool:
    return getattr(cache, OPEN[0], None) is not None and cache.compress_kv is None
