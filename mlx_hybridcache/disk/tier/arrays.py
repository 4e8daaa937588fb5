"""Arrays as bytes: what the disk tier is handed to write, and the memory it reads into.

Nothing is copied on the way to the disk: views of evaluated, contiguous arrays are handed over. On the
way back the bytes go straight into the buffers in which the caches will live.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any

import mlx.core as mx

from ...caches.checkpoint import Checkpoint, restore, stored_rows, take, take_rows
from ...caches.kinds.kind import Arrays, Snapshot
from ...caches.kinds.rows import (
    AXIS,
    RowBlock,
    Span,
    compact,
    evaluate_to_keep,
    rows_in,
)
from ...caches.kinds.smaller import PIECE, is_small
from ...caches.layout import (
    LEARNT_FROM,
    Layout,
    leaves,
)
from ..segment import Segment, Tensor

_NAMES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.float32: "F32",
    mx.uint64: "U64",
    mx.int64: "I64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}

EMPTY = Tensor("", "BOOL", (0,))
"""How an empty slot of a snapshot is written."""


@dataclass(frozen=True, slots=True)
class ByteViews:
    """Tensors with views of their bytes, in file order; a tensor may lie in several views."""

    tensors: tuple[Tensor, ...]
    data: list[memoryview]


def rows_views(blocks: Sequence[RowBlock], start: int, end: int) -> ByteViews:
    """The rows of `[start, end)` of every layer, without a copy; no tensor of an array that has none there.

    `blocks` are adjoining and cover that range.
    """
    parts = [block for block in blocks if block.start < end and block.end > start]
    tensors: list[Tensor] = []
    data: list[memoryview] = []
    columns = [_plain([x for arrays in block.layers for x in arrays]) for block in parts]
    for column, (leaf, which, array) in enumerate(_arrays_in(parts[0])):
        _, heads, _, dim = array.shape
        held = [block.within(leaf, which, block.start, block.end)[1] for block in parts]
        wanted = [block.within(leaf, which, start, end) for block in parts]
        length = sum(b - a for a, b in wanted)
        if not length:
            continue
        tensors.append(_tensor(f"{leaf}.{which}", array.dtype, (1, heads, length, dim)))
        row = dim * array.dtype.size
        for head in range(heads):
            for rows, (a, b), views in zip(held, wanted, columns, strict=True):
                first = head * rows
                data.append(views[column][(first + a) * row : (first + b) * row])
    return ByteViews(tuple(tensors), data)


def _arrays_in(block: RowBlock) -> Iterator[tuple[int, int, mx.array]]:
    """Each array of rows with the leaf it belongs to and its number there."""
    for leaf, arrays in enumerate(block.layers):
        for which, array in enumerate(arrays):
            yield leaf, which, array


def state_views(checkpoint: Checkpoint) -> ByteViews:
    """Every layer's snapshot, without a copy."""
    named = [
        (f"{leaf}.{slot}", array)
        for leaf, snapshot in enumerate(checkpoint.snapshots)
        if snapshot is not None
        for slot, array in enumerate(snapshot.arrays)
    ]
    tensors = tuple(
        Tensor(name, EMPTY.dtype, EMPTY.shape)
        if array is None
        else _tensor(name, array.dtype, tuple(array.shape))
        for name, array in named
    )
    return ByteViews(tensors, _plain([array for _, array in named if array is not None]))


def _plain(arrays: Sequence[mx.array]) -> list[memoryview]:
    """A view of each array's bytes. The arrays are evaluated, so MLX has nothing to do for it.

    A window that was read in one slice still lies as the model computed it, token by token instead of
    head by head; such an array is copied into the order of the file.
    """
    views: list[Any] = [memoryview(x) for x in arrays]  # type: ignore[arg-type]
    for index, view in enumerate(views):
        if not view.c_contiguous:
            views[index] = memoryview(mx.contiguous(arrays[index]))  # type: ignore[arg-type]
    # What has no bytes cannot be cast: some layers keep keys alone, with values of no width.
    return [view.cast("B") if view.nbytes else memoryview(bytearray()) for view in views]


@lru_cache(maxsize=4096)
def _tensor(name: str, dtype: mx.Dtype, shape: tuple[int, ...]) -> Tensor:
    """Made once: a checkpoint of a large model has a hundred, and each is checked when it is made."""
    return Tensor(name, _NAMES[dtype], shape)


@dataclass(frozen=True, slots=True)
class Shapes:
    """What the files of one model hold: the tensors of one token's rows, each with the positions of which
    there are any, and of checkpoints.

    `states` are those of two positions, one tensor beside the other: where these differ others may, too.
    """

    rows: tuple[tuple[Tensor, Span], ...]
    states: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, layout: Layout, model: Any) -> Shapes:
        """Learn them by letting the model read one token, and then a few more.

        Windows grow with what they have read, and so do the states of some layers, up to their size.
        """
        caches = layout.fresh_caches(model)

        def state_behind(more: int, position: int) -> tuple[Tensor, ...]:
            logits = model(mx.array([[0] * more]), cache=caches)
            mx.eval(logits, [cache.state for cache in caches], layout.lazy())
            return state_views(take(layout, caches, position)).tensors

        first = state_behind(1, 1)
        block = take_rows(layout, caches, 0, 1)
        assert block is not None
        later = state_behind(LEARNT_FROM - 1, LEARNT_FROM)
        rows = tuple(
            (_tensor(f"{leaf}.{which}", array.dtype, _longer(tuple(array.shape), 1)), span)
            for leaf, arrays in enumerate(block.layers)
            for which, (array, span) in enumerate(
                zip(arrays, layout.spans_of(leaf, len(arrays)), strict=True)
            )
        )
        return cls(rows, tuple(zip(first, later, strict=True)))

    def suit(self, segment: Segment) -> bool:
        """Whether the file is one of this model's, whatever its name says."""
        if segment.kind == "rows":
            ranges = [rows_in(span, segment.start, segment.end) for _, span in self.rows]
            expected = [
                replace(known, shape=_longer(known.shape, b - a))
                for (known, _), (a, b) in zip(self.rows, ranges, strict=True)
                if a < b
            ]
            return expected == [*segment.tensors]
        return len(self.states) == len(segment.tensors) and all(
            any(_is_like(found, known, other) for known, other in ((a, b), (b, a)))
            for (a, b), found in zip(self.states, segment.tensors, strict=True)
        )


def _numbers(tensor: Tensor) -> tuple[int, int]:
    """The leaf that a tensor of rows belongs to, and its number there."""
    leaf, _, which = tensor.name.partition(".")
    return int(leaf), int(which)


def _longer(shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    return (*shape[:AXIS], rows, *shape[AXIS + 1 :])


def _is_like(found: Tensor, known: Tensor, other: Tensor) -> bool:
    """Whether `found` is `known`, but for axes along which that differs from `other`."""
    if (found.name, found.dtype, len(found.shape)) != (known.name, known.dtype, len(known.shape)):
        return False
    if len(known.shape) != len(other.shape):  # one of them is an empty slot
        return found.shape == known.shape
    axes = zip(found.shape, known.shape, other.shape, strict=True)
    return all(length == own or own != its for length, own, its in axes)


class RestoreBuffers:
    """Caches under construction: buffers for `[0, position)` with room for `capacity` tokens.

    Rows come from memory by `copy`, or from files into the views that `room_for_rows` and
    `room_for_state` give out; `caches` are the whole.
    """

    def __init__(self, layout: Layout, position: int, capacity: int):
        self.position = position
        self._layout = layout
        self._capacity = capacity
        self._rows: dict[str, mx.array] = {}
        self._states: dict[str, mx.array | None] = {}
        self._read_into: set[str] = set()

    def copy(self, blocks: Sequence[RowBlock], end: int) -> None:
        """Take the rows of `[0, end)` from memory."""
        for block in blocks:
            if block.start >= end:
                break
            for part, a, b in self._as_stored(block, min(block.end, end)):
                self._copy(part, a, b)

    def _as_stored(self, block: RowBlock, end: int) -> Iterator[tuple[RowBlock, int, int]]:
        """What to copy of its rows before `end`: running caches' are made small, a piece at a time."""
        is_stored = any(is_small(arrays) for arrays in block.layers)
        if self._layout.storing.kv_bits is None or is_stored:
            yield block, block.start, end
            return
        for a, b in pairwise([*range(block.start, end, PIECE), end]):
            small = stored_rows(self._layout, block.piece(a, b))
            mx.eval(small)
            yield RowBlock(a, b, small), a, b

    def _copy(self, block: RowBlock, start: int, end: int) -> None:
        found = rows_views([block], start, end)
        self._make_rows(found.tensors)
        views = iter(found.data)
        for tensor in found.tensors:
            for target in self._targets(tensor, *rows_in(self._span(tensor), start, end)):
                target[:] = next(views)

    def _span(self, tensor: Tensor) -> Span:
        leaf, which = _numbers(tensor)
        return self._layout.spans_of(leaf, which + 1)[which]

    def room_for_rows(self, segment: Segment, start: int, end: int) -> Iterator[memoryview]:
        """Where the bytes of a segment belong, in file order, of which `[start, end)` is wanted.

        What lies outside is read as well, because the checksum covers it, into memory that is
        thrown away.
        """
        self._make_rows(segment.tensors)
        self._read_into.update(tensor.name for tensor in segment.tensors)
        for tensor in segment.tensors:
            span = self._span(tensor)
            first, last = rows_in(span, segment.start, segment.end)
            a, b = rows_in(span, start, end)
            before, behind = a - first, last - b
            row = tensor.nbytes // max(1, prod(tensor.shape[:3]))
            scrap = memoryview(bytearray(max(before, behind) * row))
            for target in self._targets(tensor, a, b):
                yield from (scrap[: before * row], target, scrap[: behind * row])

    def room_for_state(self, segment: Segment) -> Iterator[memoryview]:
        """Where the bytes of a checkpoint belong, in file order."""
        for tensor in segment.tensors:
            is_empty = (tensor.dtype, tensor.shape) == (EMPTY.dtype, EMPTY.shape)
            array = None if is_empty else mx.zeros(tensor.shape, _DTYPES[tensor.dtype])
            self._states[tensor.name] = array
        made = [array for array in self._states.values() if array is not None]
        evaluate_to_keep(made)
        yield from _plain(made)

    @property
    def room_nbytes(self) -> int:
        """Bytes of the buffers in which room was given out; the others have their rows from memory."""
        states = sum(array.nbytes for array in self._states.values() if array is not None)
        return states + sum(self._rows[name].nbytes for name in self._read_into)

    def block(self, start: int) -> RowBlock:
        """A copy of the rows of `[start, position)`, as the memory tier keeps them."""
        layers = tuple(
            tuple(
                compact(x[:, :, slice(*rows_in(span, start, self.position))])
                for x, span in zip(arrays, self._layout.spans_of(leaf, len(arrays)), strict=True)
            )
            for leaf, arrays in enumerate(self._every_array())
        )
        evaluate_to_keep(layers)
        least = self._layout.least_row_bytes
        return RowBlock(start, self.position, layers, self._layout.spans, least_row_bytes=least)

    def _every_array(self) -> list[Arrays]:
        return [
            kind.every_array(self._buffers(leaf)) for leaf, kind in enumerate(self._layout.kinds)
        ]

    def caches(self, model: Any) -> tuple[list[Any], Checkpoint | None]:
        """The model's caches, standing at `position`, and the checkpoint they were made from."""
        caches = self._layout.fresh_caches(model)
        snapshots = tuple(self._snapshot(leaf) for leaf in range(len(self._layout.kinds)))
        least = self._layout.least_snapshot_bytes
        needs = self._layout.needs_snapshots
        checkpoint = Checkpoint(self.position, snapshots, least) if needs else None
        if self._layout.storing:
            return self._made_full(model, snapshots), checkpoint
        for leaf, (kind, cache) in enumerate(zip(self._layout.kinds, leaves(caches), strict=True)):
            kind.adopt(cache, self._buffers(leaf), snapshots[leaf], self.position)
        mx.eval([cache.state for cache in caches])
        return caches, checkpoint

    def _made_full(self, model: Any, snapshots: Sequence[Snapshot | None]) -> list[Any]:
        """Caches of their own: the buffers hold what is stored."""
        layers = tuple(self._buffers(leaf) for leaf in range(len(self._layout.kinds)))
        blocks = [RowBlock(0, self.position, layers)]
        return restore(
            self._layout,
            model,
            blocks,
            [*snapshots],
            self.position,
            self._capacity,
            is_spent=False,
        )

    def _make_rows(self, tensors: Sequence[Tensor]) -> None:
        """The buffers that are not there yet, in one evaluation."""
        missing = [tensor for tensor in tensors if tensor.name not in self._rows]
        for tensor in missing:
            _, heads, _, dim = tensor.shape
            leaf, which = _numbers(tensor)
            rows = self._layout.kinds[leaf].buffer_rows(self.position, self._capacity, which)
            if self._layout.storing:
                _, rows = rows_in(self._span(tensor), 0, self.position)
            shape = (1, heads, rows, dim)
            self._rows[tensor.name] = mx.zeros(shape, _DTYPES[tensor.dtype])
        if missing:
            evaluate_to_keep([self._rows[tensor.name] for tensor in missing])

    def _targets(self, tensor: Tensor, start: int, end: int) -> Iterator[memoryview]:
        """Of each head the bytes of the rows `[start, end)` in this tensor's buffer."""
        buffer = self._rows[tensor.name]
        _, heads, length, dim = buffer.shape
        row = dim * buffer.dtype.size
        (view,) = _plain([buffer])
        for head in range(heads):
            yield view[(head * length + start) * row : (head * length + end) * row]

    def _buffers(self, leaf: int) -> Arrays:
        found: list[mx.array] = []
        while (name := f"{leaf}.{len(found)}") in self._rows:
            found.append(self._rows[name])
        return tuple(found)

    def _snapshot(self, leaf: int) -> Snapshot | None:
        found: list[mx.array | None] = []
        while (name := f"{leaf}.{len(found)}") in self._states:
            found.append(self._states[name])
        return Snapshot(tuple(found)) if found else None
