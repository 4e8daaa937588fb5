"""The caches of a running request as a lender of rows: views while it runs, its buffers when it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..store.lazy_rows import (
    BorrowedRows,
    Column,
    Lender,
    Ranges,
)
from ..store.tree import Rows
from ..tokens import Namespace, Tokens
from .checkpoint import take_rows, view_rows
from .kinds.kind import Arrays
from .kinds.rows import (
    AXIS,
    RowBlock,
    compact,
    evaluate_to_keep,
)
from .layout import Layout, leaves


@dataclass(eq=False)
class BufferColumn:
    """One layer's buffer of keys or of values, `(1, heads, capacity, dim)`."""

    leaf: int
    buffer: mx.array | None
    row_bytes: int
    copies: list[mx.array] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes if self.buffer is not None else 0

    def surrender(self, ranges: Ranges) -> None:
        assert self.buffer is not None
        self.copies = [compact(self.buffer[:, :, a:b]) for a, b in ranges]
        evaluate_to_keep(self.copies)
        self.buffer = None


class CacheLender(Lender):
    """The plain caches of one request. `caches` is the list by which whoever runs them holds them."""

    def __init__(self, namespace: Namespace, tokens: Tokens, layout: Layout):
        super().__init__(namespace, tokens, layout.row_bytes)
        self.caches: list[Any] = []
        self._layout = layout
        self._columns: list[BufferColumn] = []

    def rows_to(self, end: int) -> Callable[[int], Rows]:
        """What the store borrows up to `end`, from a start that it names."""
        return lambda start: BorrowedRows(start, end, self)

    @property
    def is_standing(self) -> bool:
        return bool(self.caches)

    def let_go(self) -> None:
        self.caches = []

    def view(self, start: int, end: int) -> RowBlock:
        block = view_rows(self._layout, self.caches, start, end)
        assert block is not None, "rows have left the caches that lend them"
        return block

    def passing_bytes(self, tokens: int) -> int:
        states = max(kind.snapshot_bytes for kind in self._layout.kinds)
        return max(tokens * self._layout.array_bytes, states)

    def copies(self, ranges: Ranges) -> list[Rows]:
        made: list[Rows] = []
        for a, b in ranges:
            block = take_rows(self._layout, self.caches, a, b)
            assert block is not None, "rows have left the caches that lend them"
            made.append(block)
        return made

    def columns(self) -> list[Column]:
        buffers: list[Arrays] = [
            kind.surrender(cache)
            for kind, cache in zip(self._layout.kinds, leaves(self.caches), strict=True)
        ]
        self.caches.clear()
        self._columns = [
            BufferColumn(leaf, buffer, buffer.nbytes // buffer.shape[AXIS])
            for leaf, arrays in enumerate(buffers)
            for buffer in arrays
        ]
        return [*self._columns]

    def surrendered(self, ranges: Ranges) -> list[Rows]:
        columns, self._columns = self._columns, []
        count = len(self._layout.kinds)
        made: list[Rows] = []
        for index, (a, b) in enumerate(ranges):
            layers: list[list[mx.array]] = [[] for _ in range(count)]
            for column in columns:
                layers[column.leaf].append(column.copies[index])
            made.append(RowBlock(a, b, tuple(map(tuple, layers))))
        return made
