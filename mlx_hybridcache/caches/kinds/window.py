"""Windows: the last W rows only. A past can be returned to where its own last W rows were kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .kind import Arrays, LayerKind, Parts, Snapshot
from .rows import AXIS, compact


@dataclass(frozen=True, slots=True)
class _Window(LayerKind):
    """What all windows share: `size` rows of `row_nbytes`, and slices of at most `step` tokens."""

    size: int
    step: int
    row_nbytes: int

    @property
    def running_bytes(self) -> int:
        return (self.size + self.step) * self.row_nbytes

    def position(self, cache: Any) -> int:
        return int(cache.offset)

    def block_bytes(self, tokens: int) -> int:
        # As it was, and the ordered copy that a block is read into; or the ring that is put back.
        return (2 * self.size + tokens) * self.row_nbytes

    def mark(self, cache: Any) -> Any:
        keys, values, *rest = cache.state
        # Handles of their own: a single token is written into the ring where it lies.
        return (keys[...], values[...], *rest)

    def go_back(
        self, cache: Any, mark: Any, stands: int, count: int, snapshot: Snapshot | None = None
    ) -> None:
        """As it was, with the kept rows written one by one: the ring that single tokens would have left."""
        keys, values, offset, keep, _, index = cache.state
        fresh = [_in_order(x, offset, keep, index)[:, :, -stands:] for x in (keys, values)]
        before = [compact(x) for x in mark[:2]]  # a ring is written to where it lies
        cache.state = (*before, *mark[2:])
        for row in range(count):
            cache.update_and_fetch(*(x[:, :, row : row + 1] for x in fresh))


@dataclass(frozen=True, slots=True)
class WindowKind(_Window):
    """A rotating window of `size` rows, the first `keep` of which never leave.

    mlx-lm's rotating cache holds up to `size - 1` older rows and the whole of the last slice, in
    temporal order; single-token steps write over the oldest in place. A snapshot is the last `size`
    rows in temporal order, which both ways of going on trim as they trim a cold prefill's.
    """

    keep: int

    needs_snapshot = True

    @classmethod
    def seen(cls, cache: Any, step: int) -> WindowKind:
        """From a cache that has read a few tokens, for slices of at most `step`."""
        return cls(cache.max_size, step, _row_nbytes(cache), cache.keep)

    @property
    def snapshot_bytes(self) -> int:
        return self.size * self.row_nbytes

    def snapshot(self, cache: Any, position: int) -> Snapshot:
        keys, values, offset, keep, size, index = cache.state
        return Snapshot(
            tuple(
                compact(_last(_in_order(x, offset, keep, index), offset, position, keep, size))
                for x in (keys, values)
            )
        )

    def fill(
        self,
        cache: Any,
        rows: Parts,
        snapshot: Snapshot | None,
        position: int,
        capacity: int,
    ) -> None:
        if snapshot is None:
            return
        keys, values = (compact(x) for x in snapshot.arrays if x is not None)
        cache.state = (keys, values, position, self.keep, self.size, keys.shape[AXIS])


@dataclass(frozen=True, slots=True)
class FullWindowKind(_Window):
    """A rotating window of which every row is stored, so that it restores at any position.

    What llama.cpp calls `--swa-full`. The live cache is mlx-lm's own and keeps its last rows only,
    so rows are taken before they leave it: after each slice, and not behind a longer reply.
    """

    stores_small = "rows"

    @classmethod
    def seen(cls, cache: Any, step: int) -> FullWindowKind:
        """From a cache that has read a few tokens, for slices of at most `step`."""
        return cls(cache.max_size, step, _row_nbytes(cache))

    @property
    def row_bytes(self) -> int:
        return self.row_nbytes

    def view_rows(self, cache: Any, start: int, end: int) -> Arrays | None:
        keys, values, offset, keep, _, index = cache.state
        ordered = [_in_order(x, offset, keep, index) for x in (keys, values)]
        first = offset - ordered[0].shape[AXIS]
        if start < first:
            return None
        return tuple(x[:, :, start - first : end - first] for x in ordered)

    def fill(
        self,
        cache: Any,
        rows: Parts,
        snapshot: Snapshot | None,
        position: int,
        capacity: int,
    ) -> None:
        needed, parts = min(position, self.size), []
        for arrays in reversed(rows.every):
            if needed <= 0:
                break
            length = arrays[0].shape[AXIS]
            parts.append([x[:, :, max(0, length - needed) :] for x in arrays])
            needed -= length
        if parts:
            keys, values = (
                compact(mx.concatenate(list(each), axis=AXIS))
                for each in zip(*reversed(parts), strict=True)
            )
            cache.state = (keys, values, position, 0, self.size, keys.shape[AXIS])


def _row_nbytes(cache: Any) -> int:
    return sum(x.nbytes // x.shape[AXIS] for x in (cache.keys, cache.values))


def _in_order(rows: mx.array, offset: int, keep: int, index: int) -> mx.array:
    """The filled rows of a rotating buffer, oldest first; `index` is where it writes next."""
    if index == rows.shape[AXIS]:
        return rows
    if index < offset:  # it has wrapped round: the oldest row stands at the write position
        return mx.concatenate(
            [rows[:, :, :keep], rows[:, :, index:], rows[:, :, keep:index]], axis=AXIS
        )
    return rows[:, :, :index]


def _last(rows: mx.array, offset: int, position: int, keep: int, size: int) -> mx.array:
    """Of ordered `rows` that end at `offset`, the window that a prefill up to `position` needs."""
    end = position - (offset - rows.shape[AXIS])
    if position <= size:
        return rows[:, :, :end]
    tail = rows[:, :, end - (size - keep) : end]
    return mx.concatenate([rows[:, :, :keep], tail], axis=AXIS) if keep else tail


@dataclass(frozen=True, slots=True)
class ChunkedKind(_Window):
    """Llama 4's chunked window: the rows since a start that moves when a forward begins.

    The start depends on how the prefill was cut, so interior positions are not read off afterwards.
    """

    needs_snapshot = True
    sees_interior = False
    goes_back = True

    @classmethod
    def seen(cls, cache: Any, step: int) -> ChunkedKind:
        """From a cache that has read a few tokens, for slices of at most `step`."""
        return cls(cache.chunk_size, step, _row_nbytes(cache))

    @property
    def snapshot_bytes(self) -> int:
        return self.size * self.row_nbytes

    def block_bytes(self, tokens: int) -> int:
        return 0

    def mark(self, cache: Any) -> None:
        return None

    def go_back(
        self, cache: Any, mark: Any, stands: int, count: int, snapshot: Snapshot | None = None
    ) -> None:
        cache.trim(stands - count)

    def snapshot(self, cache: Any, position: int) -> Snapshot:
        assert position == cache.offset
        filled = cache.offset - cache.start_position
        last = max(0, filled - self.size)  # what the next forward would trim first of all
        return Snapshot(tuple(compact(x[:, :, last:filled]) for x in (cache.keys, cache.values)))

    def fill(
        self,
        cache: Any,
        rows: Parts,
        snapshot: Snapshot | None,
        position: int,
        capacity: int,
    ) -> None:
        if snapshot is None:
            return
        keys, values = (compact(x) for x in snapshot.arrays if x is not None)
        cache.state = (keys, values, position, self.size, position - keys.shape[AXIS])
