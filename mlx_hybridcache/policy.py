"""What to keep: pure functions over numbers.

A checkpoint is worth the tokens that would have to be replayed without it, times how likely a prompt
is to come back to where it helps, per byte that its removal would free. The rule follows Marconi
(arXiv 2411.19379: compute saved per byte); that prompts come back to a conversation's end more often
than to its middle follows sparse prefix caching (arXiv 2605.05219), here as a likelihood that falls
with the distance from the end. So a path ends up densely covered near its end and sparsely further
back, and its early anchors do not go first (llama.cpp issue 25023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NEAR_TOKENS = 64
"""Distances from the end below this count as alike."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One checkpoint that could go. Tokens, bytes and ticks of the store's logical clock.

    `gap_tokens` is the distance to the nearest checkpoint above it (the beginning counts as one),
    `below_tokens` to the next one below it (0 at the end of a path), `to_end_tokens` to the deepest
    end of its conversations, `freed_bytes` what its removal frees, rows included that nothing else
    needs. `is_anchor` marks prompt ends and branch points, which go last.
    """

    gap_tokens: int
    below_tokens: int
    to_end_tokens: int
    freed_bytes: int
    age_ticks: int
    is_anchor: bool


def likelihood(candidate: Candidate) -> float:
    """How much of the coming back lands between this checkpoint and the next one below.

    The integral of 1 / (distance from the end + NEAR_TOKENS) over that stretch; 1 for a path's end,
    where repeats and next turns land.
    """
    if candidate.below_tokens == 0:
        return 1.0
    far = candidate.to_end_tokens + NEAR_TOKENS
    return math.log(far / (far - candidate.below_tokens))


def utility(candidate: Candidate) -> float:
    """Tokens of replay that a byte of this checkpoint saves, weighed by likelihood and recency."""
    saved = candidate.gap_tokens * likelihood(candidate) / (1 + candidate.age_ticks)
    return saved / max(candidate.freed_bytes, 1)


def least_useful(candidates: Sequence[Candidate]) -> int:
    """The index of the one to remove first: interior before anchors, then the least useful."""
    return min(
        range(len(candidates)), key=lambda i: (candidates[i].is_anchor, utility(candidates[i]))
    )
