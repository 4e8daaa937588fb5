"""What to keep: pure functions over numbers.

A checkpoint is worth the tokens that would have to be replayed without it, the more so the more
recently it was used, per byte that its removal would free. The rule follows Marconi (arXiv
2411.19379: compute saved per byte) and llama.cpp's issue 25023 (first in, first out loses the early
anchors).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """One checkpoint that could go. Tokens, bytes and ticks of the store's logical clock.

    `gap_tokens` is the distance to the nearest checkpoint above it (the beginning counts as one),
    `freed_bytes` what its removal frees, rows included that nothing else needs. `is_anchor` marks
    prompt ends and branch points, which go last.
    """

    gap_tokens: int
    freed_bytes: int
    age_ticks: int
    is_anchor: bool


def utility(candidate: Candidate) -> float:
    """Tokens of replay that a byte of this checkpoint saves, weighed by recency."""
    return candidate.gap_tokens / (1 + candidate.age_ticks) / max(candidate.freed_bytes, 1)


def least_useful(candidates: Sequence[Candidate]) -> int:
    """The index of the one to remove first: interior before anchors, then the least useful."""
    return min(
        range(len(candidates)), key=lambda i: (candidates[i].is_anchor, utility(candidates[i]))
    )
