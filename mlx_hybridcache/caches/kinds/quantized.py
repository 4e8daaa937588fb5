"""Quantized rows: words, scales and biases per token and head, so the past can be cut at any token.

A token's row is quantized by itself, so that cutting and joining quantized rows changes nothing of them.
Before the start the same layer has full rows, which are stored as such: a prompt may go on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .kind import Arrays, LayerKind, Parts, Snapshot
from .rows import AXIS, END, RowsKind, Span, blank, joined, rows_in

_PACKED_DTYPE = mx.uint32


@dataclass(frozen=True, slots=True)
class QuantizedRowsKind(LayerKind):
    """As `full` rows up to `start`, then as six arrays: of keys, and of values, words, scales and biases.

    `widths` are those of the six arrays. Where `start` is 0 there are no full rows.
    """

    full: RowsKind
    widths: tuple[int, ...]
    start: int

    goes_back = True

    @property
    def spans(self) -> tuple[Span, ...]:
        before = (Span(0, self.start),) * 2 if self.start else ()
        return (*before, *(Span(self.start, END),) * 6)

    @property
    def row_bytes(self) -> int:
        """Bytes that one token adds behind the start."""
        return sum(self._packed_bytes())

    def rows_nbytes(self, start: int, end: int) -> int:
        (a, b), (c, d) = (
            rows_in(Span(0, self.start), start, end),
            rows_in(Span(self.start, END), start, end),
        )
        return (b - a) * self.full.row_bytes + (d - c) * self.row_bytes

    def buffer_nbytes(self, capacity: int) -> int:
        """With the full rows, which stay, and all of them quantized too once that has begun."""
        quantized = capacity * self.row_bytes if capacity > self.start else 0
        return min(capacity, self.start) * self.full.row_bytes + quantized

    @property
    def array_bytes(self) -> int:
        return max(*self._packed_bytes(), self.full.array_bytes if self.start else 0)

    def _packed_bytes(self) -> list[int]:
        return [
            shape[1] * shape[3] * dtype.size for shape, dtype in self._shapes()[-len(self.widths) :]
        ]

    def _shapes(self) -> list[tuple[tuple[int, ...], mx.Dtype]]:
        """Of each array the shape of one token's rows, and the dtype."""
        full: list[tuple[tuple[int, ...], mx.Dtype]] = [
            *zip(self.full.shapes, self.full.dtypes, strict=True)
        ]
        packed: list[tuple[tuple[int, ...], mx.Dtype]] = [
            ((1, shape[1], 1, width), _PACKED_DTYPE if which == 0 else dtype)
            for at, (shape, dtype) in enumerate(full)
            for which, width in enumerate(self.widths[3 * at : 3 * at + 3])
        ]
        return [*full, *packed] if self.start else packed

    def position(self, cache: Any) -> int:
        return int(cache.offset)

    def go_back(
        self, cache: Any, mark: Any, stands: int, count: int, snapshot: Snapshot | None = None
    ) -> None:
        cache.trim(stands - count)

    def view_rows(self, cache: Any, start: int, end: int) -> Arrays:
        wanted = [rows_in(span, start, end) for span in self.spans]
        return tuple(x[:, :, a:b] for x, (a, b) in zip(self._arrays(cache), wanted, strict=True))

    def every_array(self, buffers: Arrays) -> Arrays:
        missing = self._shapes()[len(buffers) :]
        return (*buffers, *(blank(shape, dtype, 0) for shape, dtype in missing))

    def _arrays(self, cache: Any) -> Arrays:
        return self.every_array((*(cache.full() if self.start else ()), *cache.packed()))

    def take_arrays(self, cache: Any) -> Arrays:
        taken = self._arrays(cache)
        cache.let_go()
        return taken

    def fill(
        self,
        cache: Any,
        rows: Parts,
        snapshot: Snapshot | None,
        position: int,
        capacity: int,
    ) -> None:
        full: list[mx.array] = []
        packed: list[mx.array] = []
        beginning: list[mx.array] = []
        for which, (shape, dtype) in enumerate(self._shapes()):
            is_full = self.start > 0 and which < 2
            parts = [x for x in rows.take(which) if x.shape[AXIS]]
            if not is_full and position <= self.start:
                continue
            if full and not is_full and not beginning:
                beginning = self._beginning(cache, full)
            # Three for keys and three for values; each is let go of as its buffer is made.
            first = [beginning.pop(0)] if full and not is_full else []
            there = sum(x.shape[AXIS] for x in (*first, *parts))
            room = self.buffer_rows(position, capacity, which) - there
            buffer = joined([*first, *parts], room, shape, dtype)
            if rows.is_spent or first:
                mx.eval(buffer)
                first.clear()
                parts.clear()
                mx.clear_cache()
            (full if is_full else packed).append(buffer)
        cache.hold(tuple(full), tuple(packed), position, capacity)

    def _beginning(self, cache: Any, full: Sequence[mx.array]) -> list[mx.array]:
        """What the full rows before the start come to."""
        found = [x for rows in full for x in cache.quantize(rows[:, :, : self.start])]
        mx.eval(found)
        return found

    def buffer_rows(self, position: int, capacity: int, which: int) -> int:
        rows = max(position, capacity)
        return min(rows, self.start) if self.start and which < 2 else rows

    def adopt(self, cache: Any, buffers: Arrays, snapshot: Snapshot | None, position: int) -> None:
        full, packed = (buffers[:2], buffers[2:]) if self.start else ((), buffers)
        if full and packed:
            for buffer, rows in zip(packed, self._beginning(cache, full), strict=True):
                buffer[:, :, : self.start] = rows
        capacity = (packed or full)[0].shape[AXIS] if buffers else 0
        cache.hold(full, packed, position, capacity)

    def grow(self, cache: Any, capacity: int) -> None:
        cache.grow(capacity)
