"""A checkpoint as the policy sees it, in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_hybridcache.store.eviction.policy import INTERIOR, weights


@dataclass(frozen=True, slots=True)
class Candidate:
    """One checkpoint that could go: what `weights` and `Weights.worth` are given of it."""

    gap_tokens: int
    below_tokens: int
    to_end_tokens: int
    freed_bytes: int
    age_ticks: int
    idle_ticks: int
    returns: int
    goes_on: bool = False
    interior: float = INTERIOR

    @property
    def worth(self) -> float:
        """Tokens of replay that a byte of it can be expected to save now."""
        lasting = weights(
            self.gap_tokens,
            self.below_tokens,
            self.to_end_tokens,
            self.freed_bytes,
            self.returns,
            self.goes_on,
        )
        return lasting.worth(self.age_ticks, self.idle_ticks, self.interior)

    @property
    def likelihood(self) -> float:
        """How likely the next request is to resume here, in the likelihood of resuming at an end just made."""
        return self.worth * max(self.freed_bytes, 1) / self.gap_tokens


def least_useful(candidates: Sequence[Candidate]) -> int:
    """The index of the one worth least; of several alike the first."""
    return min(range(len(candidates)), key=lambda i: candidates[i].worth)
