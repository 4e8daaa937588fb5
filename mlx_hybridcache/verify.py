"""The proof for any model on any device: every restore point against a cold run.

First the device is probed: the same prompt read cold with different slices. Where all of them give
the same bits, hot must equal cold bit for bit everywhere. Where the shape of a slice changes the last
bits (Metal), the probe's largest difference is the bound in the default mode, and exact mode must
still be bit-equal.

With quantized keys and values the cold runs are mlx-lm's own: its caches, which it quantizes itself when
they have read up to the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from .cache import HybridPromptCache
from .caches.layout import Layout, fresh_caches, leaves, replaced
from .caches.quantizing.precision import Precision
from .decode.store_check import log_probabilities

MARGIN = 4.0
"""Times the probe's own largest difference that a restore may differ on such a device."""

GREEDY_TOKENS = 8
AHEAD = 9
"""Tokens behind a restore point that belong to the prompt which is compared there."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two runs over one prompt compare. Logits are those of the prompt's last token.

    `first_differing_token` is an index into the greedy replies, None where they agree.
    """

    max_abs: float
    kl: float
    first_differing_token: int | None


@dataclass(frozen=True, slots=True)
class Point:
    """One restore point: where it stands, what was restored, and how hot compares with cold."""

    position: int
    restored: int
    prompt_tokens: int
    found: Comparison


@dataclass(frozen=True, slots=True)
class Proof:
    """The whole proof: the probe's largest difference, what was allowed, and every point.

    In `quantized_layers` layers rows were quantized.
    """

    probe: float
    allowed: float
    points: tuple[Point, ...]
    quantized_layers: int = 0

    @property
    def split_invariant(self) -> bool:
        """Whether slicing a prefill changes nothing on this device."""
        return self.probe == 0.0

    @property
    def worst(self) -> float:
        """The largest difference of any point."""
        return max((point.found.max_abs for point in self.points), default=0.0)

    @property
    def holds(self) -> bool:
        """Whether every point is within what is allowed, and there was one."""
        return bool(self.points) and self.worst <= self.allowed


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


def _measured(reader: Reader, prompts: Sequence[list[int]], limit: int | None) -> float:
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
        worst = max(worst, _max_abs(reference, logits))
    return worst


def verify(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    step: int = 512,
    exact: bool = False,
    tolerance: float | None = None,
    precision: Precision | None = None,
    store_kv: int | None = None,
    store_state: str | None = None,
    on_point: Callable[[int, int], None] = lambda done, total: None,
) -> Proof:
    """Read `prompts` through a cache, then compare every restore point with a cold run.

    `tolerance` overrides what the probe allows; in exact mode nothing but equality is. `precision` is what keys
    and values are quantized to, in both. With a smaller store (`store_kv`, `store_state`) the points show what
    that costs, and anything is allowed.
    """
    layout = Layout.of(model, step, precision=precision)
    layout.release()
    reader = Reader(model, step, layout.precision, layout.quantized)
    measured = _measured(reader, prompts, layout.slicing_limit)
    small = {"store_kv": store_kv, "store_state": store_state}
    allowed = _allowed(0.0 if exact else measured * MARGIN, tolerance, is_small=any(small.values()))
    settings = {"exact": exact, **small, **_reading(step, precision)}
    with HybridPromptCache(model, **settings) as cache:
        for prompt in prompts:
            cache.prefill(prompt).release()
        stops = list(_restore_points(cache, prompts))
        points = []
        for done, (position, prompt) in enumerate(stops):
            points.append(_compare(reader, cache, position, prompt, settings))
            on_point(done + 1, len(stops))
    return Proof(measured, allowed, tuple(points), len(layout.quantized))


def _reading(step: int, precision: Precision | None) -> dict[str, Any]:
    """A cache's settings of slices and of what is read into."""
    kv = precision and {
        "kv_bits": precision.bits,
        "kv_group_size": precision.group_size,
        "quantized_kv_start": precision.start,
    }
    return {
        "prefill_step_size": step,
        "checkpoint_every": step,
        "checkpoint_min_step": max(1, step // 4),
        **(kv or {}),
    }


def _allowed(by_probe: float, tolerance: float | None, *, is_small: bool) -> float:
    """The largest difference that passes; without a tolerance any does beside a smaller store."""
    if tolerance is not None:
        return tolerance
    return math.inf if is_small else by_probe


def _restore_points(
    cache: HybridPromptCache, prompts: Sequence[list[int]]
) -> Iterator[tuple[int, list[int]]]:
    """Each stored checkpoint with a prompt that restores it and goes on differently."""
    paths = cache.checkpoints()
    if not paths:  # every position restores: take some at odd places
        for prompt in prompts:
            for position in range(1, len(prompt) - 1, max(1, len(prompt) // 7)):
                yield position, [*prompt[:position], *reversed(prompt[:AHEAD])]
        return
    for path in paths:
        yield len(path), [*path, *reversed(path[:AHEAD])]


def _compare(
    reader: Reader,
    cache: HybridPromptCache,
    position: int,
    prompt: list[int],
    settings: dict[str, Any],
) -> Point:
    if settings["exact"]:
        hot = cache.prefill(prompt)
        with HybridPromptCache(reader.model, **settings) as empty:
            cold = list(empty.prefill(prompt).prompt_cache)
    else:
        hot = cache.restore(prompt)  # stores nothing, so each point is compared as it was saved
        reader.read(list(hot.prompt_cache), len(prompt) - len(hot.rest), hot.rest[:-1])
        cold = reader.cold(prompt[:-1])
    difference = compare(reader, list(hot.prompt_cache), cold, prompt)
    hot.release()
    return Point(position, hot.report.restored_tokens, len(prompt), difference)


def compare(reader: Reader, hot: Caches, cold: Caches, prompt: list[int]) -> Comparison:
    """Logits and greedy replies of two sets of caches that have read `prompt` but for its last token."""
    first = len(prompt) - 1
    a, b = (reader.next_logits(caches, first, prompt[-1]) for caches in (hot, cold))
    max_abs, kl = _max_abs(a, b), _kl(b, a)
    for index in range(GREEDY_TOKENS):
        token, other = int(np.array(a).argmax()), int(np.array(b).argmax())
        if token != other:
            return Comparison(max_abs, kl, index)
        a, b = (reader.next_logits(caches, first + 1 + index, token) for caches in (hot, cold))
        max_abs = max(max_abs, _max_abs(a, b))
    return Comparison(max_abs, kl, None)


def _max_abs(a: mx.array, b: mx.array) -> float:
    return float(np.abs(np.array(a) - np.array(b)).max())


def _kl(p: mx.array, q: mx.array) -> float:
    """KL divergence in nats of softmax(p) from softmax(q), in float64."""
    log_p, log_q = log_probabilities(p), log_probabilities(q)
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum()))
