"""A model of sizes only: what its caches weigh is known, and nothing is in them.

The library's own tiers, schedule and replay run on it as on any other, so that what they do with long
prompts can be counted in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast

import mlx.core as mx

from mlx_hybridcache.caches.kinds.kind import LayerKind, Parts, Snapshot
from mlx_hybridcache.caches.kinds.recurrent import RecurrentKind
from mlx_hybridcache.caches.kinds.rows import RowBlock, RowsKind
from mlx_hybridcache.caches.kinds.smaller import FULL, StorePrecision
from mlx_hybridcache.caches.layout import Layout
from mlx_hybridcache.caches.live import LiveCaches
from mlx_hybridcache.caches.room import rounded
from mlx_hybridcache.request.request import Request
from mlx_hybridcache.store.lazy_rows import Column, Ranges
from mlx_hybridcache.tiers import Tiers

from .traces import TracedRequest


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model's caches weigh, in bytes: one token's rows, one checkpoint's states."""

    name: str
    row_bytes: int
    checkpoint_bytes: int
    arrays: int  # layers with rows, times two
    states: int  # layers without
    stored_row_bytes: int = 0  # of a smaller store; 0: as they are
    stored_checkpoint_bytes: int = 0

    def running_bytes(self, asked: TracedRequest) -> int:
        """A live request: rows for its prompt and its reply, rounded as buffers are, and one state."""
        rows = rounded(len(asked.tokens) + asked.reply_tokens)
        return rows * self.row_bytes + self.checkpoint_bytes

    def smaller(self, storing: StorePrecision) -> Shape:
        """The same with a smaller store, by what it makes of one such layer (`caches/kinds/smaller`)."""
        if not storing:
            return self
        keys = mx.zeros((1, KV_HEADS, 1, HEAD_DIM), mx.bfloat16)
        state, taps = mx.zeros((1, *STATE), mx.float32), mx.zeros((1, *TAPS), mx.bfloat16)
        rows = storing.rows(RowsKind((), (), headroom=True), (keys,))
        small = storing.snapshot(RecurrentKind(0), Snapshot((taps, state)))
        return replace(
            self,
            stored_row_bytes=self.arrays * sum(x.nbytes for x in rows),
            stored_checkpoint_bytes=self.states * small.nbytes,
        )

    def prefix_bytes(self, tokens: int) -> int:
        """A copy of everything that restores `tokens` tokens."""
        return tokens * self.row_bytes + self.checkpoint_bytes


KV_HEADS, HEAD_DIM, STATE, TAPS = 2, 256, (32, 128, 128), (3, 8192)
"""Of both models' layers."""

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "qwen3-next-80b", 12 * 2 * 2 * 256 * 2, 36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2), 24, 36
        ),
        Shape(
            "qwen3.5-35b", 10 * 2 * 2 * 256 * 2, 30 * (32 * 128 * 128 * 4 + 3 * 8192 * 2), 20, 30
        ),
    )
}


@dataclass(frozen=True, slots=True)
class SizedRows:
    """Rows of `[start, end)` without their contents."""

    start: int
    end: int
    row_bytes: int
    lineage: int = 0

    @property
    def nbytes(self) -> int:
        return (self.end - self.start) * self.row_bytes

    def split(self, position: int) -> tuple[SizedRows, SizedRows]:
        """Two stretches, `[start, position)` and `[position, end)`."""
        return (
            SizedRows(self.start, position, self.row_bytes, self.lineage),
            SizedRows(position, self.end, self.row_bytes, self.lineage),
        )

    def piece(self, start: int, end: int) -> tuple[tuple[()], ...]:
        """No arrays for the one layer that stands for all."""
        return ((),)


@dataclass(frozen=True, slots=True)
class SizedCheckpoint:
    """A checkpoint of one layer, or a layer's snapshot, without its contents."""

    position: int
    nbytes: int
    arrays: tuple[()] = ()

    @property
    def snapshots(self) -> tuple[SizedCheckpoint, ...]:
        return (self,)


@dataclass(slots=True)
class SizedColumn:
    """One layer's buffer of keys or of values."""

    nbytes: int
    row_bytes: int

    def tokens_in(self, ranges: Ranges) -> int:
        """Of all of them, as it is one layer's."""
        return sum(end - start for start, end in ranges)

    def materialize(self, ranges: Ranges) -> None:
        self.nbytes = 0


@dataclass(slots=True)
class SizedCache:
    """All layers' live caches: how many tokens they have read."""

    position: int = 0
    state: tuple[()] = ()

    def empty(self) -> bool:
        """As mlx-lm's caches say it."""
        return self.position == 0


class SizedModel:
    """Reads by counting."""

    def make_cache(self) -> list[SizedCache]:
        """One cache for all layers."""
        return [SizedCache()]

    def __call__(self, tokens: Any, cache: list[SizedCache]) -> None:
        """`tokens` has shape `(1, n)`."""
        cache[0].position += tokens.shape[1]


@dataclass(frozen=True)
class SizedKind(LayerKind):
    """Stands for all layers: rows for each token, and states that hold at one position.

    Those can be taken anywhere within a slice, as with a capture hook.
    """

    shape: Shape

    needs_snapshot: ClassVar[bool] = True

    @property
    def row_bytes(self) -> int:
        return self.shape.row_bytes

    @property
    def array_bytes(self) -> int:
        return self.shape.row_bytes // self.shape.arrays

    @property
    def snapshot_bytes(self) -> int:
        """One layer's, which is what is held twice for a moment."""
        return self.shape.checkpoint_bytes // self.shape.states

    @property
    def running_bytes(self) -> int:
        return self.shape.checkpoint_bytes

    def position(self, cache: Any) -> int:
        return int(cache.position)

    def snapshot(self, cache: Any, position: int) -> Snapshot:
        nbytes = self.shape.stored_checkpoint_bytes or self.shape.checkpoint_bytes
        return cast("Snapshot", SizedCheckpoint(position, nbytes))

    def fill(
        self, cache: Any, rows: Parts, snapshot: Snapshot | None, position: int, capacity: int
    ) -> None:
        cache.position = position


@dataclass(frozen=True)
class SizedLayout(Layout):
    """How the model of sizes comes apart."""

    @classmethod
    def of_shape(cls, shape: Shape) -> Self:
        """With the weight of `shape`."""
        small = bool(shape.stored_row_bytes)
        return cls(
            (SizedKind(shape),),
            (SizedCache,),
            (),
            None,
            alignment=1,
            vocabulary=0,
            storing=StorePrecision(8, 8) if small else FULL,
            small_row_bytes=shape.stored_row_bytes,
            small_snapshot_bytes=shape.stored_checkpoint_bytes,
        )

    def restoring_bytes(self, tokens: int, cut_tokens: int = 0) -> int:
        """As of one layer: its one kind stands for all."""
        if not self.storing:
            return super().restoring_bytes(tokens, cut_tokens)
        return 2 * (tokens * self.array_bytes + self.kinds[0].snapshot_bytes)

    @property
    def shape(self) -> Shape:
        """What its one kind weighs."""
        kind = self.kinds[0]
        assert isinstance(kind, SizedKind)
        return kind.shape

    @property
    def snapshot_bytes(self) -> int:
        return self.shape.checkpoint_bytes


class SizedCaches(LiveCaches):
    """A running request's caches, whose rows the store may leave in them, without their contents."""

    def view(self, start: int, end: int) -> RowBlock:
        lineage = self._lineage.of(start, end)
        return cast("RowBlock", SizedRows(start, end, self.row_bytes, lineage))

    def copies(self, ranges: Ranges) -> list[RowBlock]:
        return [self.view(start, end) for start, end in ranges]

    def columns(self) -> list[Column]:
        self.caches.clear()
        layout = cast("SizedLayout", self._layout)
        count = layout.shape.arrays
        running, each = layout.row_bytes // count, self.row_bytes // count
        return [SizedColumn(self.capacity * running, each) for _ in range(count)]

    def materialized(self, ranges: Ranges) -> list[RowBlock]:
        return self.copies(ranges)


class SizedRequest(Request):
    """Its caches have room for exactly the reply that is known to come."""

    @property
    def rows(self) -> int:
        return rounded(len(self.tokens) + self.max_tokens)


class SizedTiers(Tiers):
    """The library's tiers, for requests without contents."""

    def live(self, request: Request, *, shares: bool = True) -> SizedCaches:
        """Caches that are not there yet."""
        return SizedCaches(
            self._materializer, self._layout, request.namespace, request.tokens, shares=shares
        )
