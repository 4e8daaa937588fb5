"""What a smaller store keeps: integers with a scale per group, instead of what the model computed.

Running caches stay full. A number becomes its share of the largest magnitude in its group, in 127 or
7 steps either way, and that magnitude itself is the scale. So the largest number of a group comes back
to the last bit, and so does its scale when what came back is made small again: **making small, full and
small again gives the same bytes**. Rows may therefore move between the store and running caches as often
as they like (`store/lazy_rows`). MLX's own `mx.quantize` does not have that property: its scale is fitted
anew, and rows would drift with each move. SGLang keeps states of Mamba pools as int8 in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx

from ...errors import SettingError
from .kind import Arrays, Snapshot

if TYPE_CHECKING:
    from .kind import LayerKind

A = TypeVar("A", mx.array, mx.array | None)
N = TypeVar("N", Snapshot, Snapshot | None)

PIECE = 2048
"""Tokens that are converted in one go: a conversion takes several times their size for a moment."""

GROUPS = (64, 32)
"""Numbers of a row that share a scale, as many as the row's width can be cut into; else all of it."""

MOST = {8: 127, 4: 7}
"""The largest integer, by bits."""

_CODES = {mx.int8: 8, mx.uint8: 4}
"""What small arrays consist of; models compute with neither. Each is followed by its scales."""

_TINY = 1e-30
"""A group without a larger magnitude is zeros: beyond it lie numbers that some devices take for zero."""

_TOKENS = 2


@dataclass(frozen=True, slots=True)
class StorePrecision:
    """Bits of stored rows and of stored recurrent states; None where they are stored as they are.

    Convolution taps and windows are stored as they are.
    """

    kv_bits: int | None = None
    state_bits: int | None = None

    def __bool__(self) -> bool:
        return self.kv_bits is not None or self.state_bits is not None

    def rows(self, kind: LayerKind, arrays: Arrays) -> Arrays:
        """Rows of a layer as the store keeps them, unevaluated."""
        return _each_small(arrays, self.kv_bits if kind.stores_small == "rows" else None)

    def row_copies(self, kind: LayerKind, arrays: Arrays) -> Arrays:
        """The same as copies, to be evaluated once more; of what is converted for them, a piece is held."""
        bits = self.kv_bits if kind.stores_small == "rows" else None
        return tuple(copy for array in arrays for copy in _copies(array, bits))

    def row_bytes(self, kind: LayerKind, cache: Any) -> int:
        """Bytes of one token's rows of a layer as they are stored; `cache` has read one."""
        if kind.stores_small != "rows" or self.kv_bits is None:
            return kind.row_bytes
        return sum(x.nbytes for x in self.rows(kind, kind.view_rows(cache, 0, 1) or ()))

    def snapshot_bytes(self, kind: LayerKind, cache: Any, position: int) -> int:
        """The most bytes of a layer's state as it is stored; `cache` stands at `position`."""
        if kind.stores_small != "state" or self.state_bits is None:
            return kind.snapshot_bytes
        small = self.snapshot(kind, kind.snapshot(cache, position))
        return small.nbytes if small is not None else 0

    def snapshot(self, kind: LayerKind, snapshot: N) -> N:
        """A layer's state as the store keeps it, unevaluated."""
        if snapshot is None or kind.stores_small != "state" or self.state_bits is None:
            return snapshot
        return Snapshot(_each_small(snapshot.arrays, self.state_bits, by_rows=True))


FULL = StorePrecision()
"""Everything is stored as it is."""


def smaller(store_kv: int | None, store_state: str | None) -> StorePrecision:
    """The one that is asked for: 8 or 4 bits for rows, "int8" for states.

    Raises `SettingError` for anything else.
    """
    if store_kv not in (None, *MOST) or isinstance(store_kv, bool):
        raise SettingError(f"store_kv is {store_kv!r}; it must be 8 or 4, or None for all bits.")
    if store_state not in (None, "int8"):
        raise SettingError(f'store_state is {store_state!r}; it must be "int8", or None.')
    return StorePrecision(store_kv, None if store_state is None else 8)


def full_pieces(
    storing: StorePrecision, kind: LayerKind, stretches: Sequence[Sequence[mx.array]]
) -> Iterator[list[mx.array]]:
    """Rows of one layer in full, in pieces that are evaluated one after another.

    Of stretches that are not small, as in running caches, they are what would come back of them.
    """
    for arrays in stretches:
        if storing.kv_bits is None:
            yield [*arrays]
            continue
        length = arrays[0].shape[_TOKENS]
        for a, b in pairwise([*range(0, length, PIECE), length]):
            piece = tuple(x[:, :, a:b] for x in arrays)
            made = list(full(piece if is_small(piece) else storing.rows(kind, piece)))
            mx.eval(made)
            yield made


def is_small(arrays: Sequence[mx.array | None]) -> bool:
    """Whether some of these arrays are integers with scales."""
    return any(array is not None and array.dtype in _CODES for array in arrays)


def full(arrays: tuple[A, ...]) -> tuple[A, ...]:
    """What small `arrays` stand for, in the dtype that was stored, unevaluated; others as they are."""
    made: list[A] = []
    left = iter(arrays)
    for array in left:
        if array is None or array.dtype not in _CODES:
            made.append(array)
        elif (scale := next(left)) is not None:
            made.append(_decoded(array, scale))
    return tuple(made)


def _each_small(arrays: tuple[A, ...], bits: int | None, *, by_rows: bool = False) -> tuple[A, ...]:
    made: list[A] = []
    for array in arrays:
        if bits is None or array is None or not _can_be_small(array):
            made.append(array)
        else:
            made.extend(_encoded(array, bits, array.shape[-1] if by_rows else _group(array)))
    return tuple(made)


def _can_be_small(array: mx.array) -> bool:
    """Whether it has heads and numbers that are worth it. Taps have no heads, some layers no values."""
    width = array.shape[-1]
    return (
        array.ndim == 4
        and mx.issubdtype(array.dtype, mx.floating)
        and width >= 8
        and width % 2 == 0
    )


def _group(array: mx.array) -> int:
    width = int(array.shape[-1])
    return next((each for each in GROUPS if width % each == 0), width)


def _copies(array: mx.array, bits: int | None) -> list[mx.array]:
    if bits is None or not _can_be_small(array):
        return [mx.array(array)]
    pieces = []
    for start in range(0, array.shape[_TOKENS], PIECE):
        piece = array[:, :, start : start + PIECE]
        pieces.append(_encoded(piece, bits, _group(array)))
        mx.eval(pieces[-1])
    return [mx.array(mx.concatenate([*each], axis=_TOKENS)) for each in zip(*pieces, strict=True)]


def _encoded(array: mx.array, bits: int, group: int) -> tuple[mx.array, mx.array]:
    """Integers, int8 of the same shape or two in a uint8, and scales `(..., width / group)` in its dtype."""
    *outer, width = array.shape
    groups = mx.reshape(array, (*outer, width // group, group))
    scale = mx.abs(groups).max(axis=-1)
    largest = scale.astype(mx.float32)
    is_zero = largest < _TINY
    shares = groups.astype(mx.float32) / mx.where(is_zero, 1.0, largest)[..., None]
    codes = mx.round(shares * MOST[bits]).astype(mx.int8)
    codes = mx.reshape(mx.where(is_zero[..., None], mx.array(0, mx.int8), codes), (*outer, width))
    if bits == 4:
        low, high = ((half + 8).astype(mx.uint8) for half in mx.split(codes, 2, axis=-1))
        codes = low | (high << 4)
    return codes, mx.where(is_zero, mx.array(0, array.dtype), scale)


def _decoded(codes: mx.array, scale: mx.array) -> mx.array:
    bits = _CODES[codes.dtype]
    if bits == 4:
        halves = [codes & 15, codes >> 4]
        codes = mx.concatenate(halves, axis=-1).astype(mx.int8) - 8
    *outer, width = codes.shape
    groups = mx.reshape(codes, (*outer, scale.shape[-1], width // scale.shape[-1]))
    # The product with the reciprocal is 1 for the largest integer, on every device.
    shares = groups.astype(mx.float32) * (1.0 / MOST[bits])
    made = (shares * scale[..., None].astype(mx.float32)).astype(scale.dtype)
    return mx.reshape(made, (*outer, width))
