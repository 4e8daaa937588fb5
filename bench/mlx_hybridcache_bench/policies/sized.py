"""A model of sizes only: what its caches weigh is known, and nothing is in them.

The library's own tiers, schedule and replay run on it as on any other, so that what they do with long
prompts can be counted in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

from mlx_hybridcache.caches.kinds.kind import LayerKind, Parts, Snapshot
from mlx_hybridcache.caches.kinds.rows import RowBlock
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

    def running_bytes(self, asked: TracedRequest) -> int:
        """A live request: rows for its prompt and its reply, rounded as buffers are, and one state."""
        rows = rounded(len(asked.tokens) + asked.reply_tokens)
        return rows * self.row_bytes + self.checkpoint_bytes

    def prefix_bytes(self, tokens: int) -> int:
        """A copy of everything that restores `tokens` tokens."""
        return tokens * self.row_bytes + self.checkpoint_bytes


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

    @property
    def nbytes(self) -> int:
        return (self.end - self.start) * self.row_bytes

    def split(self, position: int) -> tuple[SizedRows, SizedRows]:
        """Two stretches, `[start, position)` and `[position, end)`."""
        return (
            SizedRows(self.start, position, self.row_bytes),
            SizedRows(position, self.end, self.row_bytes),
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
        return cast("Snapshot", SizedCheckpoint(position, self.shape.checkpoint_bytes))

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
        return cls((SizedKind(shape),), (SizedCache,), (), None, alignment=1, vocabulary=0)

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
        return cast("RowBlock", SizedRows(start, end, self.row_bytes))

    def copies(self, ranges: Ranges) -> list[RowBlock]:
        return [self.view(start, end) for start, end in ranges]

    def columns(self) -> list[Column]:
        self.caches.clear()
        layout = cast("SizedLayout", self._layout)
        each = self.row_bytes // layout.shape.arrays
        return [SizedColumn(self.capacity * each, each) for _ in range(layout.shape.arrays)]

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
