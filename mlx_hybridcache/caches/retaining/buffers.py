"""Retained buffers: the rows of a request that has ended, which the next turn of its conversation takes over.

The store owns all of these rows too, so that the buffers may go at any moment. Whether they hold the
store's very bits is told by where its rows come from (`Lineage`), never by their tokens: the same tokens
may have been let go of and read anew since, or read from a file.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import mlx.core as mx
import numpy as np

from ...store.lazy_rows import rows_before
from ...tokens import Namespace, Tokens
from ..kinds.kind import Arrays
from ..kinds.rows import Origin, RowBlock, new_lineage, origins_of
from ..layout import Layout, leaves
from ..memory import MemoryFound, MemoryNode

_START = itemgetter(0)


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where the rows of one set of caches come from: copies of the store's, as `origins` say, then their own.

    These adjoin one another from position 0 on.
    """

    origins: tuple[Origin, ...] = ()
    number: int = field(default_factory=new_lineage)

    def of(self, start: int, end: int) -> int:
        """The number that rows of `[start, end)` are stored with."""
        copied = self._copied(start, end)
        return self.number if copied is None else copied

    def has(self, rows: RowBlock, end: int) -> bool:
        """Whether the caches hold the very bits of these stored rows up to `end`."""
        return rows.lineage in (self.number, self._copied(rows.start, end))

    def _copied(self, start: int, end: int) -> int | None:
        """The lineage of the rows of `[start, end)` if they are copies of one; a long conversation has one a turn."""
        at = bisect_right(self.origins, start, key=_START) - 1
        if at < 0 or end > self.origins[at][1]:
            return None
        return self.origins[at][2]

    def alike(self, nodes: Iterable[MemoryNode], end: int) -> int:
        """How far, up to `end`, they hold the very bits that the store has on this path itself."""
        reached = 0
        for node in nodes:
            for rows in node.rows:
                last = min(rows.end, end)
                if reached >= end or not isinstance(rows, RowBlock) or not self.has(rows, last):
                    return reached
                reached = last
        return reached


@dataclass(eq=False, slots=True)
class Retained:
    """One request's buffers of rows, by layer, with room for `capacity` tokens.

    They hold the rows of `tokens`, as the store had them when it ended. Nobody else holds the arrays.
    """

    namespace: Namespace
    tokens: Tokens
    capacity: int
    nbytes: int
    lineage: Lineage
    buffers: list[Arrays]

    def alike(self, namespace: Namespace, tokens: Tokens, found: MemoryFound) -> int:
        """How many rows of what `found` restores of `tokens` are here; 0 where it is not the larger part of both."""
        position, held = found.position, len(self.tokens)
        end = min(position, held)
        if namespace != self.namespace or 2 * end <= max(position, held):
            return 0
        if not np.array_equal(self.tokens[:end], tokens[:end]):
            return 0
        alike = self.lineage.alike(found.nodes(), end)
        return alike if 2 * alike > max(position, held) else 0

    def caches(
        self, layout: Layout, model: Any, found: MemoryFound
    ) -> tuple[list[Any], list[Origin]]:
        """Fresh mlx-lm caches that stand at the place that was found, in these buffers, and where their rows come from.

        States are copied from the checkpoint there, and rows that are not here from the store; what lies
        behind it in the buffers is written over.
        """
        position, state = found.position, found.checkpoint
        blocks = rows_before(found.nodes(), position)
        origins = origins_of(blocks, position)
        here = self.lineage.alike(found.nodes(), position)
        missing = [block for block in blocks if block.end > here]
        del blocks
        caches = layout.fresh_caches(model)
        snapshots = state.snapshots if state is not None else (None,) * len(layout.kinds)
        each = zip(layout.kinds, leaves(caches), snapshots, strict=True)
        for leaf, (kind, cache, snapshot) in enumerate(each):
            buffers = self.buffers.pop(0)
            for block in missing:
                a, b = max(here, block.start), min(block.end, position)
                for buffer, rows in zip(buffers, block.layers[leaf], strict=True):
                    buffer[:, :, a:b] = rows[:, :, a - block.start : b - block.start]
            kind.adopt(cache, buffers, snapshot, position)
            del buffers
            mx.eval(cache.state)
        return caches, origins

    def let_go(self) -> None:
        """Hold them no more."""
        self.buffers.clear()
