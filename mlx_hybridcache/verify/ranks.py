"""The proof on several ranks: replies that were restored beside replies of the same group that read everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from ..cache import HybridPromptCache
from ..caches.layout import Layout
from ..errors import HybridCacheError
from ..group.group import Group
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
from .reader import MARGIN, Reader, measured


def verify_on_ranks(
    group: Group,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    step: int = 512,
    exact: bool = False,
    tolerance: float | None = None,
    on_point: Callable[[int, int], None] = lambda done, total: None,
) -> Proof | None:
    """As `verify`, for a model that was split over `group`: every rank calls it, and rank 0 has the proof.

    Caches cannot be handed over there, so greedy replies are compared by all log-probabilities, and a cold one is
    of the same prompt under a salt of its own. Raises `GroupError` where a rank is lost or comes to something else.
    """
    prompts = group.agree([*map(list, prompts)])[0]
    layout = Layout.of(model, step)
    layout.release()
    limits = [each for each in group.agree(layout.slicing_limit) if each is not None]
    found = measured(Reader(model, step), prompts, min(limits, default=None))
    bound = allowed(0.0 if exact else found * MARGIN, tolerance, is_small=False)
    settings = {"exact": exact, **reading(step, None)}
    with HybridPromptCache(model, tokenizer, group=group, **settings) as cache:
        if group.rank:
            cache.follow()
            return None
        for prompt in prompts:
            list(cache.warm(prompt))
        stops, points = list(restore_points(cache, prompts)), []
        for done, (position, prompt) in enumerate(stops):
            points.append(_compared(cache, position, prompt, f"cold {done}"))
            for salt in ("", f"cold {done}"):  # of which the points that are left are not to go
                with suppress(HybridCacheError):
                    cache.drop(prompt, cache_salt=salt)
            on_point(done + 1, len(stops))
    gone = 0 if exact else sum(point.restored != point.position for point in points)
    return Proof(found, bound, tuple(points), gone=gone)


def _compared(cache: HybridPromptCache, position: int, prompt: list[int], salt: str) -> Point:
    tokens, hot, restored = _reply(cache, prompt, "")
    others, cold, none = _reply(cache, prompt, salt)
    assert none == 0, "a salt of its own restores nothing"
    same = next((at for at, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), None)
    until = len(tokens) if same is None else same + 1
    most = max(max_abs(a, b) for a, b in zip(hot[:until], cold[:until], strict=True))
    return Point(position, restored, len(prompt), Comparison(most, kl(cold[0], hot[0]), same))


def _reply(
    cache: HybridPromptCache, prompt: list[int], salt: str
) -> tuple[list[int], list[np.ndarray[Any, Any]], int]:
    """Greedy tokens, the log-probabilities `(vocabulary,)` each was drawn from, and the tokens restored."""
    generation = cache.stream_generate(prompt, GREEDY_TOKENS, cache_salt=salt)
    tokens, logprobs = [], []
    for response in generation:
        tokens.append(response.token)
        logprobs.append(np.array(response.logprobs, np.float32))
    report = generation.report
    assert report is not None
    return tokens, logprobs, report.restored_tokens
