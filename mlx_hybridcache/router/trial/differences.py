"""Two readings of the same texts held against each other: selections, log-probabilities, replies.

Numbers only: no model and no MLX, so that what is called a flip or a significant difference can be
checked by eye.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Groups = Sequence[Sequence[int]]
"""Groups of one layer's experts, by index; experts in no group stand alone."""

Selected = NDArray[np.integer[Any]]
"""Experts chosen by one layer: (tokens, k), in any order."""

Floats = NDArray[np.floating[Any]]

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Flips:
    """How many chosen experts changed between two readings. Counts add up over layers and texts."""

    chosen: int
    """Experts chosen in the first reading: tokens x layers x k."""
    swapped: int
    """How many of them the second reading did not choose."""
    inside: int
    """How many of those gave way to a member of their own group."""

    def __add__(self, other: Flips) -> Flips:
        return Flips(
            self.chosen + other.chosen, self.swapped + other.swapped, self.inside + other.inside
        )

    @property
    def outside(self) -> int:
        """Swaps that changed what was computed, however alike the members of a group are."""
        return self.swapped - self.inside

    @property
    def share(self) -> float:
        """Swapped of all chosen, 0 to 1."""
        return self.swapped / self.chosen if self.chosen else 0.0

    @property
    def inside_share(self) -> float | None:
        """Inside of all swapped, 0 to 1; None when nothing was swapped."""
        return self.inside / self.swapped if self.swapped else None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "chosen": self.chosen,
            "swapped": self.swapped,
            "inside": self.inside,
            "share": self.share,
            "inside_share": self.inside_share,
        }


NO_FLIPS = Flips(0, 0, 0)


def flips(first: Selected, second: Selected, groups: Groups) -> Flips:
    """The flips of one layer. `first` and `second` are (tokens, k) over the same tokens.

    An expert that leaves is inside when one of its group that was not chosen before comes: so many
    pairs of each group are counted, whatever else changes.
    """
    top = max((expert for group in groups for expert in group), default=0)
    experts = 1 + max(int(first.max()), int(second.max()), top)
    before, after = _chosen(first, experts), _chosen(second, experts)
    left, came = before & ~after, after & ~before
    inside = 0
    for group in groups:
        members = list(group)
        inside += int(np.minimum(left[:, members].sum(1), came[:, members].sum(1)).sum())
    return Flips(int(before.sum()), int(left.sum()), inside)


def _chosen(selected: Selected, experts: int) -> NDArray[np.bool_]:
    """(tokens, experts): what is chosen, as a mask."""
    mask = np.zeros((len(selected), experts), dtype=np.bool_)
    np.put_along_axis(mask, selected, True, axis=-1)
    return mask


def log_probabilities(logits: Floats) -> NDArray[np.float64]:
    """(..., V): the logarithm of softmax, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def divergence(reference: Floats, other: Floats) -> NDArray[np.float64]:
    """(tokens,): KL(reference || other) in nats, of log-probabilities (tokens, V)."""
    found: NDArray[np.float64] = (np.exp(reference) * (reference - other)).sum(axis=-1)
    return found


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean of paired differences, with its interval at 95 % confidence.

    Differences are taken token by token, so that what is hard to predict for both cancels out. Tokens of
    one text are alike, so texts, not tokens, count as independent (standard errors clustered by text,
    Student's t with one degree of freedom less than there are texts).
    """

    mean: float
    low: float
    high: float
    tokens: int
    texts: int

    @classmethod
    def of(cls, texts: Iterable[Floats]) -> Difference:
        """From the differences of each text's tokens. Needs two texts at least."""
        parts = [np.asarray(text, dtype=np.float64) for text in texts]
        tokens, count = sum(part.size for part in parts), len(parts)
        assert count > 1 and tokens, "an interval needs two texts"
        mean = sum(float(part.sum()) for part in parts) / tokens
        off = sum((float(part.sum()) - part.size * mean) ** 2 for part in parts)
        error = math.sqrt(off * count / (count - 1)) / tokens
        reach = student(CONFIDENCE, count - 1) * error
        return cls(mean, mean - reach, mean + reach, tokens, count)

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "mean": self.mean,
            "low": self.low,
            "high": self.high,
            "tokens": self.tokens,
            "texts": self.texts,
            "significant": self.is_significant,
        }


def perplexity_change(nats: Difference) -> Difference:
    """The relative change of perplexity, from differences of -log p in nats: 0.01 is 1 % more."""
    return Difference(
        math.expm1(nats.mean), math.expm1(nats.low), math.expm1(nats.high), nats.tokens, nats.texts
    )


def student(confidence: float, degrees: int) -> float:
    """The two-sided quantile of Student's t.

    Exact for 1 and 2 degrees of freedom; from 3 on a series in 1 / degrees from the normal quantile
    (Abramowitz and Stegun, 26.7.5), which is 0.1 % off at 3 and 0.001 % at 8.
    """
    p = 0.5 + confidence / 2
    if degrees == 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z, n = NormalDist().inv_cdf(p), degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )
