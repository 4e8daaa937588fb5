"""Cold runs without a cache of ours, and what their slices alone change on this device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..caches.layout import fresh_caches, leaves, replaced
from ..caches.quantizing.precision import Precision
from .proof import max_abs

MARGIN = 4.0
"""Times the probe's own largest difference that a restore may differ on such a device."""

Caches = list[Any]


@dataclass(frozen=True, slots=True)
class Reader:
    """How a model reads into caches without ours: in slices of `step`, as mlx-lm does.

    Where rows are to be quantized, in the leaves `quantized`, no slice reaches across the start, and caches
    that stand there are converted by mlx-lm itself. A cache of ours has done so by then.
    """

    model: Any
    step: int
    precision: Precision | None = None
    quantized: frozenset[int] = frozenset()

    def cold(self, tokens: list[int]) -> Caches:
        """Caches that have read `tokens` and nothing else."""
        caches = fresh_caches(self.model)
        self.read(caches, 0, tokens)
        return caches

    def read(self, caches: Caches, at: int, tokens: list[int]) -> None:
        """Read `tokens` into `caches`, which stand at `at`."""
        end = at + len(tokens)
        ends = {*range(at + self.step, end, self.step), end} - {at}
        if self.precision is not None and at < self.precision.start < end:
            ends.add(self.precision.start)
        for to in sorted(ends):
            self._forward(caches, at, tokens[at - end : to - end or None])
            at = to

    def next_logits(self, caches: Caches, at: int, token: int) -> mx.array:
        """Logits, float32 `(vocabulary,)`, behind one more token."""
        logits: mx.array = self._forward(caches, at, [token])[0, -1].astype(mx.float32)
        mx.eval(logits)
        return logits

    def _forward(self, caches: Caches, at: int, tokens: list[int]) -> mx.array:
        self._convert(caches, at)
        logits: mx.array = self.model(mx.array([tokens]), cache=caches)
        mx.eval([cache.state for cache in caches])
        return logits

    def _convert(self, caches: Caches, at: int) -> None:
        """As mlx-lm does it, in caches that stand at `at`."""
        kv = self.precision
        if kv is None or at < kv.start:
            return
        found = leaves(caches)
        made = (
            leaf.to_quantized(group_size=kv.group_size, bits=kv.bits)
            if hasattr(leaf := found[number], "to_quantized")
            else leaf
            for number in sorted(self.quantized)
        )
        caches[:] = replaced(caches, self.quantized, made.__next__)


def probe(model: Any, tokens: list[int], step: int) -> float:
    """The largest logit difference between cold runs that slice the same prompt differently."""
    return _probe(Reader(model, step), tokens)


def measured(reader: Reader, prompts: Sequence[list[int]], limit: int | None) -> float:
    """What the longest prompt says up to `limit`: beyond it slices matter on every device."""
    return _probe(reader, max(prompts, key=len)[:limit]) if limit != 0 else 0.0


def _probe(reader: Reader, tokens: list[int]) -> float:
    step, at = reader.step, len(tokens) - 1
    reference: mx.array | None = None
    worst = 0.0
    for size in (step, *sorted({max(1, step // 2), max(1, step // 4), 37, 7})):
        caches = replace(reader, step=size).cold(tokens[:-1])
        logits = reader.next_logits(caches, at, tokens[-1])
        if reference is None:
            reference = logits
        worst = max(worst, max_abs(reference, logits))
    return worst
