"""The cache of a layer whose rows are quantized from a position on: the one place that converts.

mlx-lm converts after whichever chunk of a prompt crosses the start, so that its replies depend on the
chunks. This one converts when the first token behind the start is read; that no forward reaches across is
for `forwards` to see to.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import create_attention_mask

from ..kinds.kind import Arrays
from ..kinds.rows import AXIS, compact, with_room
from .precision import Precision

_STEP = 256
"""Buffers that nobody sized grow by so many rows, as mlx-lm's own do."""


class QuantizingCache:
    """Keys and values of one layer: full ones up to `precision.start`, quantized ones behind it.

    Behind it `keys` and `values` are triples of words, scales and biases, for all tokens, and
    `bits` and `group_size` are there, by which mlx-lm chooses its quantized attention. `plain` are then
    the full rows up to the start, for who goes on from there in another way.
    """

    def __init__(self, precision: Precision):
        self.precision = precision
        self.keys: Any = None
        self.values: Any = None
        self.plain: Arrays = ()
        self.offset = 0
        self.capacity = 0

    # What models and mlx-lm ask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Take in the rows of the next tokens; all rows, full or quantized."""
        if not self.is_quantized and self.offset >= self.precision.start:
            self._convert()
        end = self.offset + keys.shape[AXIS]
        self._write(self._packed(keys), self._packed(values), end)
        self.offset = end
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        """All rows that were read."""
        if not self.is_quantized:
            return self.keys[:, :, : self.offset], self.values[:, :, : self.offset]
        found = [tuple(x[:, :, : self.offset] for x in each) for each in (self.keys, self.values)]
        return found[0], found[1]

    @property
    def state(self) -> tuple[Any, ...]:
        """Every array, and the position: as mlx-lm's caches say it, for evaluation."""
        return self.keys, self.values, self.offset, self.plain

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.nbytes for x in (*self.full(), *self.packed()))

    def make_mask(
        self, tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> Any:
        """What so many next tokens may look at."""
        return create_attention_mask(tokens, self.offset, return_array, window_size)

    def empty(self) -> bool:
        """Whether nothing was read."""
        return self.keys is None

    def size(self) -> int:
        """Tokens that were read."""
        return self.offset

    def is_trimmable(self) -> bool:
        """Whether the last tokens can be taken back."""
        return True

    def trim(self, tokens: int) -> int:
        """Take so many tokens back; before the start the rows are full ones again."""
        taken = min(self.offset, tokens)
        self.offset -= taken
        if self.is_quantized and self.offset < self.precision.start:
            (self.keys, self.values), self.plain = self.plain, ()
            del self.bits, self.group_size
        return taken

    def to_quantized(self, **_: Any) -> QuantizingCache:
        """Itself: when it is quantized was decided when it was made."""
        return self

    # What the kind of layer asks

    @property
    def is_quantized(self) -> bool:
        """Whether rows are quantized now."""
        return hasattr(self, "bits")

    def hold(self, plain: Arrays, packed: Arrays, position: int, capacity: int) -> None:
        """Stand at `position`: full rows up to the start, and if any the six arrays of quantized ones."""
        self.offset, self.capacity = position, capacity
        if packed:
            self.plain = plain
            self._quantized(packed[:3], packed[3:])
        elif plain:
            self.keys, self.values = plain

    def packed(self) -> Arrays:
        """The six buffers of quantized rows; none before the start."""
        return (*self.keys, *self.values) if self.is_quantized else ()

    def full(self) -> Arrays:
        """The two buffers of full rows up to the start; none where there are no such rows."""
        if self.is_quantized:
            return self.plain
        return () if self.keys is None else (self.keys, self.values)

    def grow(self, capacity: int) -> None:
        """Room for `capacity` tokens; before the start for no more than lie before it."""
        self.capacity = capacity
        if self.keys is not None:
            self._make_room(capacity if self.is_quantized else min(capacity, self.precision.start))

    def quantize(self, rows: mx.array) -> Arrays:
        """Words, scales and biases of full rows, unevaluated."""
        packed = mx.quantize(rows, self.precision.group_size, self.precision.bits)
        return packed[0], packed[1], packed[2]

    def let_go(self) -> None:
        """Hold nothing any more."""
        self.keys, self.values, self.plain = None, None, ()

    # Inside

    def _convert(self) -> None:
        """Quantize all rows. The full ones stay: what was stored of them may have been left here."""
        if self.keys is not None:
            full = [x[:, :, : self.offset] for x in (self.keys, self.values)]
            # A view would keep rows that no token has.
            self.plain = tuple(
                x if x.shape[AXIS] == self.offset else compact(view)
                for x, view in zip((self.keys, self.values), full, strict=True)
            )
            more = max(0, self.capacity - self.offset)
            packed = [tuple(with_room(x, more) for x in self.quantize(each)) for each in full]
            self._quantized(packed[0], packed[1])
        else:
            self._quantized(None, None)

    def _quantized(self, keys: Any, values: Any) -> None:
        self.keys, self.values = keys, values
        self.bits, self.group_size = self.precision.bits, self.precision.group_size

    def _packed(self, rows: mx.array) -> Arrays:
        return self.quantize(rows) if self.is_quantized else (rows,)

    def _write(self, keys: Arrays, values: Arrays, end: int) -> None:
        """Put new rows behind the others, in buffers that are made or grown where need be."""
        if self.keys is None:
            rows = max(end + -end % _STEP, self.capacity)
            if not self.is_quantized:  # what lies before the start
                rows = max(end, min(rows, self.precision.start))
            made = [tuple(with_room(x[:, :, :0], rows) for x in each) for each in (keys, values)]
            self.keys, self.values = made if self.is_quantized else (made[0][0], made[1][0])
        rows = self._buffers(self.keys)[0].shape[AXIS]
        if end > rows:
            self._make_room(end + -end % _STEP)
        for buffers, new in ((self.keys, keys), (self.values, values)):
            for buffer, each in zip(self._buffers(buffers), new, strict=True):
                buffer[:, :, self.offset : end] = each

    def _make_room(self, rows: int) -> None:
        self.keys, self.values = (
            tuple(grown) if self.is_quantized else grown[0]
            for grown in (
                [with_room(x, rows - x.shape[AXIS]) for x in self._buffers(each)]
                for each in (self.keys, self.values)
            )
        )

    def _buffers(self, held: Any) -> Arrays:
        return held if self.is_quantized else (held,)
