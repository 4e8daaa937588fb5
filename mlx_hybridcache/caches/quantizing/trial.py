"""Which layers of a model can look at quantized rows: asked of the model, with rows whose result is known.

The attention code of a model decides that, not the class of its caches: latent attention and attention
with sinks have no quantized form in mlx-lm. So the model reads a few tokens into quantized rows, and what it
computes is compared with what it makes of the same rows, rounded and in full.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..kinds.kind import LayerKind
from ..kinds.quantized import QuantizedRowsKind
from ..kinds.rows import AXIS, RowsKind
from .cache import QuantizingCache
from .precision import Precision

MOST_OFF = 0.5
"""How far logits may be from the known ones, in parts of how far those are spread. Two ways of adding up
the same numbers differ by far less, also in half precision; attention to anything else by far more."""

TOKENS = (8, 1)
"""What is read: a slice, and a token as in decoding."""

Make = Callable[[Sequence[int], Callable[[], Any]], list[Any]]
"""Fresh caches of the model, in which the given leaves are made by somebody else."""


def quantized_kind(kind: LayerKind, precision: Precision) -> QuantizedRowsKind | None:
    """The layer's kind with quantized rows; None where its rows cannot be."""
    if not isinstance(kind, RowsKind) or not kind.headroom:
        return None
    dims = [shape[3] for shape in kind.shapes]
    if not all(precision.fits(dim) for dim in dims):
        return None
    widths = tuple(width for dim in dims for width in precision.widths(dim))
    return QuantizedRowsKind(kind, widths, precision.start)


Takes = Callable[[Any, Make, Sequence[int], Precision], bool]
"""Whether a model's attention takes quantized rows in these leaves."""


def able(
    model: Any, make: Make, candidates: Mapping[int, LayerKind], precision: Precision, takes: Takes
) -> frozenset[int]:
    """Those of the layers, by their leaf, whose attention takes quantized rows: all of them, or all of a shape."""
    tried = replace(precision, start=0)
    if takes(model, make, [*candidates], tried):
        return frozenset(candidates)
    shapes: dict[LayerKind, list[int]] = defaultdict(list)
    for leaf, kind in candidates.items():
        shapes[kind].append(leaf)
    found: list[int] = []
    for alike in shapes.values() if len(shapes) > 1 else ():
        if takes(model, make, [*found, *alike], tried):
            found += alike
    return frozenset(found)


def computed(model: Any, make: Make, leaves: Sequence[int], precision: Precision) -> bool:
    """Whether what the model computes is what it computes of the same rows in full."""
    if not leaves:
        return False
    try:
        quantized = [*_read(model, make(leaves, lambda: QuantizingCache(precision)))]
    except Exception:  # models raise whatever their arithmetic meets
        return False
    known = [*_read(model, make(leaves, lambda: RoundingCache(precision)))]
    return all(_is_near(one, other) for one, other in zip(quantized, known, strict=True))


def traced(model: Any, make: Make, leaves: Sequence[int], precision: Precision) -> bool:
    """Whether shapes and kinds of arrays fit, of a model whose weights may not be there."""

    def read(tokens: mx.array) -> mx.array:
        model(tokens, cache=make(leaves, lambda: QuantizingCache(precision)))
        return tokens

    try:
        mx.compile(read)(mx.array([[*range(TOKENS[0])]]))
    except Exception:  # models raise whatever their arithmetic meets
        return False
    return bool(leaves)


def _read(model: Any, caches: list[Any]) -> Iterator[mx.array]:
    for count in TOKENS:
        logits = model(mx.array([[*range(1, count + 1)]]), cache=caches).astype(mx.float32)
        mx.eval(logits)
        yield logits


def _is_near(found: mx.array, known: mx.array) -> bool:
    off = mx.abs(found - known).max()
    return bool((off <= MOST_OFF * mx.std(known)).item())  # not if it is no number


class RoundingCache(QuantizingCache):
    """The reference: rows that are quantized and made full again, for attention that knows nothing of it."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As a plain cache of rows."""
        rounded = [self._rounded(each) for each in (keys, values)]
        if self.keys is not None:
            pairs = zip((self.keys, self.values), rounded, strict=True)
            rounded = [mx.concatenate([*pair], axis=AXIS) for pair in pairs]
        self.keys, self.values = rounded
        self.offset = self.keys.shape[AXIS]
        return self.keys, self.values

    def _rounded(self, rows: mx.array) -> mx.array:
        words, scales, biases = self.quantize(rows)
        return mx.dequantize(words, scales, biases, self.precision.group_size, self.precision.bits)
