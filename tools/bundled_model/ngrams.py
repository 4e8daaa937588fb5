"""Unigram and bigram models: what a held-out loss has to beat."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .data import Tokens

PRIORS = (10, 30, 100, 300, 1000)


@dataclass(frozen=True, slots=True)
class NGrams:
    """Counts of the training tokens."""

    alone: Counter[int]
    pairs: Counter[tuple[int, int]]
    total: int
    vocabulary: int

    @classmethod
    def fit(cls, tokens: Sequence[int], vocabulary: int) -> NGrams:
        """Count `tokens`."""
        pairs = Counter(pairwise(tokens))
        return cls(Counter(tokens), pairs, len(tokens), vocabulary)

    def unigram(self, token: int) -> float:
        """Probability with one count added to each token of the vocabulary (Laplace)."""
        return (self.alone[token] + 1) / (self.total + self.vocabulary)

    def bigram(self, before: int, token: int, prior: float) -> float:
        """Probability smoothed with the unigram, which weighs `prior` counts (Dirichlet)."""
        seen = self.pairs[before, token] + prior * self.unigram(token)
        return seen / (self.alone[before] + prior)

    def losses(self, rows: Tokens) -> tuple[float, float]:
        """(unigram, bigram) in nats per token over rows (N, L + 1).

        The bigram gets the prior that suits these very rows best, so that it is not beaten by
        bad smoothing.
        """
        pairs = [p for row in rows.tolist() for p in pairwise(row)]
        alone = -sum(math.log(self.unigram(t)) for _, t in pairs)
        paired = min(-sum(math.log(self.bigram(b, t, prior)) for b, t in pairs) for prior in PRIORS)
        return alone / len(pairs), paired / len(pairs)
