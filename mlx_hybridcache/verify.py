"""The proof for any model on any device: every restore point against a cold run.

First the device is probed: the same prompt read cold with different slices. Where all of them give
the same bits, hot must equal cold bit for bit everywhere. Where the shape of a slice changes the last
bits (Metal), the probe's largest difference is the bound in the default mode, and exact mode must
still be bit-equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .cache import HybridPromptCache
from .caches.layout import Layout, fresh_caches
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
    """The whole proof: the probe's largest difference, what was allowed, and every point."""

    probe: float
    allowed: float
    points: tuple[Point, ...]

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


def read(model: Any, caches: Caches, tokens: list[int], step: int) -> None:
    """Read `tokens` into `caches` in slices of `step`, as mlx-lm does."""
    for start in range(0, len(tokens), step):
        model(mx.array([tokens[start : start + step]]), cache=caches)
        mx.eval([cache.state for cache in caches])


def next_logits(model: Any, caches: Caches, token: int) -> mx.array:
    """Logits, float32 `(vocabulary,)`, behind one more token."""
    logits = model(mx.array([[token]]), cache=caches)[0, -1].astype(mx.float32)
    mx.eval(logits)
    return logits  # type: ignore[no-any-return]


def probe(model: Any, tokens: list[int], step: int) -> float:
    """The largest logit difference between cold runs that slice the same prompt differently."""
    reference: mx.array | None = None
    worst = 0.0
    for size in (step, *sorted({max(1, step // 2), max(1, step // 4), 37, 7})):
        caches = fresh_caches(model)
        read(model, caches, tokens[:-1], size)
        logits = next_logits(model, caches, tokens[-1])
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
    store_kv: int | None = None,
    store_state: str | None = None,
    on_point: Callable[[int, int], None] = lambda done, total: None,
) -> Proof:
    """Read `prompts` through a cache, then compare every restore point with a cold run.

    `tolerance` overrides what the probe allows; in exact mode nothing but equality is. With a smaller
    store (`store_kv`, `store_state`) the points show what that costs, and anything is allowed.
    """
    # Beyond its limit even cold runs differ by their slices, which says nothing about the device.
    layout = Layout.of(model, step)
    layout.release()
    limit = layout.slicing_limit
    measured = probe(model, max(prompts, key=len)[:limit], step) if limit != 0 else 0.0
    small = {"store_kv": store_kv, "store_state": store_state}
    allowed = _allowed(0.0 if exact else measured * MARGIN, tolerance, is_small=any(small.values()))
    settings: dict[str, Any] = {
        "prefill_step_size": step,
        "checkpoint_every": step,
        "checkpoint_min_step": max(1, step // 4),
        "exact": exact,
        **small,
    }
    with HybridPromptCache(model, **settings) as cache:
        for prompt in prompts:
            cache.prefill(prompt).release()
        stops = list(_restore_points(cache, prompts))
        points = []
        for done, (position, prompt) in enumerate(stops):
            points.append(_compare(model, cache, position, prompt, settings))
            on_point(done + 1, len(stops))
    return Proof(measured, allowed, tuple(points))


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
    model: Any,
    cache: HybridPromptCache,
    position: int,
    prompt: list[int],
    settings: dict[str, Any],
) -> Point:
    step = settings["prefill_step_size"]
    if settings["exact"]:
        hot = cache.prefill(prompt)
        with HybridPromptCache(model, **settings) as empty:
            cold = list(empty.prefill(prompt).prompt_cache)
    else:
        hot = cache.restore(prompt)  # stores nothing, so each point is compared as it was saved
        read(model, hot.prompt_cache, hot.rest[:-1], step)
        cold = fresh_caches(model)
        read(model, cold, prompt[:-1], step)
    difference = compare(model, hot.prompt_cache, cold, prompt[-1])
    hot.release()
    return Point(position, hot.report.restored_tokens, len(prompt), difference)


def compare(model: Any, hot: Caches, cold: Caches, last: int) -> Comparison:
    """Logits and greedy replies of two sets of caches that stand before the token `last`."""
    a, b = next_logits(model, hot, last), next_logits(model, cold, last)
    max_abs, kl = _max_abs(a, b), _kl(b, a)
    for index in range(GREEDY_TOKENS):
        token, other = int(np.array(a).argmax()), int(np.array(b).argmax())
        if token != other:
            return Comparison(max_abs, kl, index)
        a, b = next_logits(model, hot, token), next_logits(model, cold, token)
        max_abs = max(max_abs, _max_abs(a, b))
    return Comparison(max_abs, kl, None)


def _max_abs(a: mx.array, b: mx.array) -> float:
    return float(np.abs(np.array(a) - np.array(b)).max())


def _kl(p: mx.array, q: mx.array) -> float:
    """KL divergence in nats of softmax(p) from softmax(q), in float64."""
    log_p, log_q = log_probabilities(p), log_probabilities(q)
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum()))
