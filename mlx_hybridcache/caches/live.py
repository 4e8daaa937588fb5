"""The caches of one running request: where they stand, what pays for them, what the store leaves in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from ..errors import BudgetError
from ..store.budget import Claim
from ..store.lazy_rows import (
    Column,
    LazySource,
    Ranges,
    rows_before,
)
from ..tokens import Namespace, Tokens
from . import checkpoint as checkpoints
from .checkpoint import Checkpoint
from .hidden import Listener
from .kinds.kind import Arrays
from .kinds.rows import (
    AXIS,
    Origin,
    RowBlock,
    Span,
    evaluate_to_keep,
    rows_in,
)
from .layout import Layout, leaves
from .memory import MemoryFound, MemoryMaterializer, MemoryRows
from .retaining.buffers import Lineage, Retained
from .room import FIRST_ROOM, ROW_STEP

AMPLE = 4
"""Headroom for later turns is taken where so many times of it are free."""

SURPLUS = 8
"""Buffers that are larger than a request needs are taken over where that is at most such a part, or a first room."""

RowsFrom = Callable[[int], MemoryRows | None]
"""The rows from a start on; None where they are gone."""


@dataclass(eq=False)
class BufferColumn:
    """One layer's buffer of keys or of values, `(1, heads, capacity, dim)`, with rows of the positions in `span`.

    `copy` makes of them what the store keeps.
    """

    leaf: int
    buffer: mx.array | None
    row_bytes: int
    span: Span
    copy: Callable[[mx.array], Arrays]
    copies: list[Arrays] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes if self.buffer is not None else 0

    def tokens_in(self, ranges: Ranges) -> int:
        return sum(b - a for a, b in self._rows(ranges))

    def _rows(self, ranges: Ranges) -> list[tuple[int, int]]:
        return [rows_in(self.span, a, b) for a, b in ranges]

    def materialize(self, ranges: Ranges) -> None:
        assert self.buffer is not None
        self.copies = [self.copy(self.buffer[:, :, a:b]) for a, b in self._rows(ranges)]
        evaluate_to_keep(self.copies)
        self.buffer = None


class LiveCaches(LazySource[RowBlock]):
    """One request's caches, from before they are restored until they are let go of.

    `caches` stand at `position`, with room for `capacity` tokens, and `claim` pays for them. Nobody
    else holds their arrays: MLX copies a buffer that is held twice when it is written to. The list is
    empty before they are restored, while their reply is in a batch, and once they were handed over.

    Where the caches keep all their rows, the store leaves its own in them (`store/lazy_rows`), unless
    `shares` is False, for caches that are changed elsewhere. Whether they do is asked nowhere else.
    `ended_well` says that nothing failed, so that another request may go on in their buffers. The `listener`,
    if any, hears what they read.
    """

    def __init__(
        self,
        materializer: MemoryMaterializer,
        layout: Layout,
        namespace: Namespace,
        tokens: Tokens,
        *,
        shares: bool = True,
    ):
        super().__init__(namespace, tokens, layout.stored_row_bytes)
        self.caches: list[Any] = []
        self.position = 0
        self.capacity = 0
        self.ended_well = False
        self.listener: Listener | None = None
        self.claim = materializer.store.budget.claim(0)
        self._layout = layout
        self._materializer = materializer
        self._shares = shares and layout.shares_rows
        self._is_known = False
        self._lineage = Lineage()
        self._columns: list[BufferColumn] = []

    # Their life

    def claim_for(self, nbytes: int, found: MemoryFound) -> list[RowBlock]:
        """Claim room for what is restored, and return its rows; a checkpoint goes for it at the last.

        Raises `BudgetError` when there is none.
        """
        if not self._shares:
            self.claim = self._materializer.store.claim(nbytes, found)
            return rows_before(found.nodes(), found.position)
        try:
            self.claim, blocks = self._materializer.claim_for(nbytes, found, self)
        except BudgetError as error:
            if error.fits_soon:
                raise
            self.claim, blocks = self._materializer.claim_for(
                nbytes, found, self, spends_checkpoint=True
            )
        return blocks

    def stand(self, caches: list[Any], position: int, capacity: int) -> None:
        """These are the caches now. Their rows are not known to be the store's."""
        self.caches, self.position, self.capacity = caches, position, capacity
        self._lineage = Lineage()
        if self.listener is not None:
            self.listener.begin(caches, position)

    def settle(self, cuts: Sequence[int]) -> None:
        """A slice was read, with checkpoints at `cuts`: who listens holds nothing more of it."""
        if self.listener is not None:
            self.listener.settle(cuts)

    def restored(
        self, caches: list[Any], position: int, capacity: int, origins: Sequence[Origin]
    ) -> None:
        """The same for caches whose first rows are copies of what the store has, which `origins` tell."""
        self.stand(caches, position, capacity)
        self._lineage = Lineage(tuple(origins))
        self.attach()

    def take_over(self, model: Any, retained: Retained, found: MemoryFound, rows: int) -> bool:
        """Stand at `found` in the buffers of a request that has ended, without copying a row.

        `rows` is what another request would have room for. False where these have less, or so much more that
        others would miss it, or where something would have to go for them: then they are let go of.
        """
        layout, budget = self._layout, self._materializer.store.budget
        claim, surplus = budget.resume(retained.nbytes), retained.capacity - rows
        more = layout.running_bytes(retained.capacity) - claim.nbytes
        fit = 0 <= surplus <= max(FIRST_ROOM, rows // SURPLUS)
        if fit:
            self._materializer.free(more)
        # Where room is short, stored rows move into fresh buffers and are held once.
        if not fit or not budget.has_room(more):
            retained.let_go()
            claim.release()
            return False
        claim.grow(more)
        self.claim = claim
        caches, origins = retained.caches(layout, model, found)
        self.restored(caches, found.position, retained.capacity, origins)
        return True

    def attach(self) -> None:
        """From now on the store may leave its rows here."""
        if self._shares:
            self._materializer.add(self)
            self._is_known = True

    def detach(self) -> bool:
        """Let the store have all rows itself, so that these caches may go; False without room.

        Nothing that is stored goes for it.
        """
        if not self._is_known:
            return True
        if not self._materializer.materialize(self):
            return False
        self._materializer.remove(self)  # at once: what makes room next would leave rows here again
        self._is_known = False
        return True

    def grow(self, rows: int) -> None:
        """Room for so many tokens more, while old buffers and new ones are both held for a moment."""
        passing = self._layout.largest_buffer_bytes(self.capacity)
        self.claim.grow(self._layout.growth_bytes(self.capacity, rows), passing=passing)
        self.capacity += rows
        checkpoints.grow(self._layout, self.caches, self.capacity)

    def headroom(self, rows: int) -> int:
        """Rows beside so many of a conversation that goes on, so that its next turns find room in its buffers.

        There are some only where a few times as many bytes are free.
        """
        if not self.retains:
            return 0
        more = rows // SURPLUS // ROW_STEP * ROW_STEP
        budget, layout = self._materializer.store.budget, self._layout
        free = budget.limit_bytes - budget.used_bytes + budget.retained_bytes
        need = layout.running_bytes(rows) + AMPLE * layout.growth_bytes(rows, more)
        return more if need <= free else 0

    def hand_over(self) -> tuple[list[Any], Claim]:
        """The caches and their claim, for who holds them from now on."""
        (caches, self.caches), claim = (self.caches, []), self.claim
        self.claim = self._materializer.store.budget.claim(0)
        return caches, claim

    def materialize(self) -> None:
        """What was read so far outlives these caches, where that costs nobody anything."""
        if self._shares:
            self._materializer.materialize(self)

    @property
    def retains(self) -> bool:
        """Whether its buffers can be those of one request after another."""
        return self._shares and self._layout.retains_rows

    def retain(self) -> Retained | None:
        """Let their buffers be held on for another request, once the store has all rows itself.

        None where that is not possible, or not of use; then they are still to be released.
        """
        may = self.retains and self.ended_well and self._is_known and self.is_standing
        if not may or not self.detach():
            return None
        match = self._materializer.store.match(self.namespace, self.tokens, self.known)
        alike = self._lineage.alike(match.nodes(), min(match.matched, self.position))
        if not alike:
            return None
        buffers = [
            kind.take_arrays(cache)
            for kind, cache in zip(self._layout.kinds, leaves(self.caches), strict=True)
        ]
        self.let_go()
        every = [array for arrays in buffers for array in arrays]
        mx.eval(every)
        capacity = min(array.shape[AXIS] for array in every)
        nbytes = sum(array.nbytes for array in every)
        del every
        if nbytes > self.claim.nbytes:
            return None
        tokens = self.tokens[:alike].copy()
        made = Retained(self.namespace, tokens, capacity, nbytes, self._lineage, buffers)
        self.claim.shrink(nbytes)
        self.claim.retain()
        return made

    def release(self) -> None:
        """They go. Rows that only they hold move to the store, and the claim is given back."""
        self._is_known = self.ended_well = False
        try:
            if self._shares:
                self._materializer.materialize_and_release(self, self.claim)
            else:
                self.let_go()
        finally:
            self.claim.release()

    # What the store gets of them

    def stored_nbytes(self, start: int, end: int) -> int:
        """What the rows of `[start, end)` add to the store now: nothing where they stay here."""
        return 0 if self._shares else self._layout.rows_nbytes(start, end)

    def rows_nbytes(self, start: int, end: int) -> int:
        return self._layout.rows_nbytes(start, end)

    def rows_to(self, end: int, copied: RowsFrom | None = None) -> RowsFrom:
        """What the store gets up to `end`: lazy rows, or what `copied` makes, by itself copies."""
        if self._shares:
            return lambda start: self.lazy_rows(start, end)
        return copied or (
            lambda start: checkpoints.take_rows(self._layout, self.caches, start, end)
        )

    def stands_at(self, position: int) -> bool:
        """Whether these are caches, and all of them have read so many tokens."""
        return self.is_standing and self._layout.mismatch(self.caches, position) is None

    def move_state(self) -> Checkpoint:
        """The state at `position`. The caches are of no use afterwards, but for their rows."""
        taken = checkpoints.move_state(self._layout, self.caches, self.position)
        self.claim.shrink(self.claim.nbytes - taken.nbytes)
        return taken

    # As the store sees them

    def has(self, rows: RowBlock) -> bool:
        return self._lineage.has(rows, rows.end)

    @property
    def is_standing(self) -> bool:
        return bool(self.caches)

    def let_go(self) -> None:
        self.caches = []

    def view(self, start: int, end: int) -> RowBlock:
        block = checkpoints.view_rows(self._layout, self.caches, start, end)
        assert block is not None, "rows have left the caches that hold them for the store"
        return replace(block, lineage=self._lineage.of(start, end))

    def passing_bytes(self, tokens: int) -> int:
        states = self._layout.largest_snapshot_bytes
        # What is small was granted room to become full with the rest (`restoring_bytes`).
        moving = 0 if self._layout.storing else tokens * self._layout.array_bytes
        return max(moving, states)

    def copies(self, ranges: Ranges) -> list[RowBlock]:
        made: list[RowBlock] = []
        for a, b in ranges:
            block = checkpoints.take_rows(self._layout, self.caches, a, b)
            assert block is not None, "rows have left the caches that hold them for the store"
            made.append(replace(block, lineage=self._lineage.of(a, b)))
        return made

    def columns(self) -> list[Column]:
        buffers: list[Arrays] = [
            kind.take_arrays(cache)
            for kind, cache in zip(self._layout.kinds, leaves(self.caches), strict=True)
        ]
        self.caches.clear()
        self._columns = [
            self._column(leaf, buffer, span)
            for leaf, arrays in enumerate(buffers)
            for buffer, span in zip(arrays, self._layout.spans_of(leaf, len(arrays)), strict=True)
        ]
        return [*self._columns]

    def _column(self, leaf: int, buffer: mx.array, span: Span) -> BufferColumn:
        storing, kind = self._layout.storing, self._layout.kinds[leaf]
        one_row = storing.rows(kind, (buffer[:, :, :1],))
        return BufferColumn(
            leaf,
            buffer,
            sum(x.nbytes for x in one_row),
            span,
            lambda rows: storing.row_copies(kind, (rows,)),
        )

    def materialized(self, ranges: Ranges) -> list[RowBlock]:
        columns, self._columns = self._columns, []
        count = len(self._layout.kinds)
        made: list[RowBlock] = []
        for index, (a, b) in enumerate(ranges):
            layers: list[list[mx.array]] = [[] for _ in range(count)]
            for column in columns:
                layers[column.leaf].extend(column.copies[index])
            whole, spans = tuple(map(tuple, layers)), self._layout.spans
            made.append(RowBlock(a, b, whole, spans, self._lineage.of(a, b)))
        return made
