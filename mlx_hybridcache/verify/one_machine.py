"""The proof on one machine: caches that were restored beside caches that read everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..cache import HybridPromptCache
from ..caches.layout import Layout
from ..caches.quantizing.precision import Precision
from .proof import (
    GREEDY_TOKENS,
    Comparison,
    Point,
    Proof,
    allowed,
    kl,
    max_abs,
    reading,
    restore_points,
)
from .reader import MARGIN, Caches, Reader, measured


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
    found = measured(reader, prompts, layout.slicing_limit)
    small = {"store_kv": store_kv, "store_state": store_state}
    bound = allowed(0.0 if exact else found * MARGIN, tolerance, is_small=any(small.values()))
    settings = {"exact": exact, **small, **reading(step, precision)}
    with HybridPromptCache(model, **settings) as cache:
        for prompt in prompts:
            cache.prefill(prompt).release()
        stops = list(restore_points(cache, prompts))
        points = []
        for done, (position, prompt) in enumerate(stops):
            points.append(_compare(reader, cache, position, prompt, settings))
            on_point(done + 1, len(stops))
    return Proof(found, bound, tuple(points), len(layout.quantized))


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
    most, apart = max_abs(a, b), kl(b, a)
    for index in range(GREEDY_TOKENS):
        token, other = int(np.array(a).argmax()), int(np.array(b).argmax())
        if token != other:
            return Comparison(most, apart, index)
        a, b = (reader.next_logits(caches, first + 1 + index, token) for caches in (hot, cold))
        most = max(most, max_abs(a, b))
    return Comparison(most, apart, None)
