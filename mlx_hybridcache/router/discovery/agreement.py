"""Which pairs of experts agree: by what they compute, or by how their scores move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .experts import EXPERTS_AT_ONCE, Bank

PROBES = 16
"""Tokens on which every expert of a layer is run to find candidates."""

DIRECTIONS = 64
"""Each output is projected onto so many random directions: distances survive that, memory too."""

LOOSE = 0.5
"""Candidates may be this far apart, relatively: several times what any threshold confirms."""

CONFIRMING_TOKENS = 32
"""Held-out tokens of each expert on which it is compared with its candidates."""

PERCENTILE = 95.0

Floats = npt.NDArray[np.float32]
Pair = tuple[int, int]


@dataclass(slots=True)
class Work:
    """What comparing took, in counts that do not depend on the machine."""

    expert_tokens: int = 0  # runs of one expert on one token
    pairs: int = 0  # pairs of experts whose fingerprints, or scores, were compared


@dataclass(slots=True)
class Agreement:
    """Pairs looked at closely and those that agree, with their distance."""

    candidates: int = 0
    pairs: dict[Pair, float] = field(default_factory=dict)


def candidates(
    bank: Bank, probes: mx.array, eligible: Sequence[int], loose: float, seed: int, work: Work
) -> list[Pair]:
    """Pairs of `eligible` experts whose outputs on `probes` (P, D) are at most `loose` apart.

    The distance of two fingerprints over the larger of their norms.
    """
    if len(eligible) < 2:
        return []
    marks = np.concatenate([*_fingerprints(bank, probes, eligible, seed, work)])
    norms = np.linalg.norm(marks, axis=1)
    work.pairs += len(eligible) * (len(eligible) - 1) // 2
    squared = norms[:, None] ** 2 + norms[None] ** 2 - 2.0 * (marks @ marks.T)
    larger = np.maximum(norms[:, None], norms[None])
    near = np.sqrt(np.maximum(squared, 0.0)) <= loose * larger
    rows, columns = np.nonzero(np.triu(near, k=1))
    return [
        (eligible[i], eligible[j]) for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
    ]


def _fingerprints(
    bank: Bank, probes: mx.array, experts: Sequence[int], seed: int, work: Work
) -> Iterator[npt.NDArray[np.float64]]:
    """(n, P * DIRECTIONS) a block of experts: their outputs, projected, one after another."""
    projection: mx.array | None = None
    for start in range(0, len(experts), EXPERTS_AT_ONCE):
        block = experts[start : start + EXPERTS_AT_ONCE]
        outputs = bank.outputs(probes, block)
        if projection is None:
            shape = (outputs.shape[-1], DIRECTIONS)
            projection = mx.random.normal(shape, key=mx.random.key(seed)) * DIRECTIONS**-0.5
        work.expert_tokens += len(block) * probes.shape[0]
        yield np.array((outputs @ projection).swapaxes(0, 1).reshape(len(block), -1), np.float64)


def confirmed(
    bank: Bank,
    x: mx.array,
    routed: dict[int, npt.NDArray[np.int64]],
    found: Sequence[Pair],
    threshold: float,
    cosine: float,
    work: Work,
) -> Agreement:
    """Those of the pairs `found` that agree on held-out tokens routed to either.

    `x` (T, D) are the layer's inputs, `routed` the held-out tokens of each expert. A pair agrees when
    95 % of the tokens have a relative error (the difference over the larger of both outputs) of at most
    `threshold` and 95 % a cosine of at least `cosine`. Its distance is that error.
    """
    partners: dict[int, list[int]] = {}
    for low, high in found:
        partners.setdefault(low, []).append(high)
        partners.setdefault(high, []).append(low)
    errors: dict[Pair, list[Floats]] = {pair: [] for pair in found}
    cosines: dict[Pair, list[Floats]] = {pair: [] for pair in found}
    for expert, others in sorted(partners.items()):
        tokens = spread(routed[expert], CONFIRMING_TOKENS)
        rows = x[mx.array(tokens)]
        own = bank.outputs(rows, [expert])
        work.expert_tokens += len(tokens) * (1 + len(others))
        for start in range(0, len(others), EXPERTS_AT_ONCE):
            block = others[start : start + EXPERTS_AT_ONCE]
            error, alike = (np.array(a) for a in _compared(own, bank.outputs(rows, block)))
            for column, other in enumerate(block):
                pair = (min(expert, other), max(expert, other))
                errors[pair].append(error[:, column])
                cosines[pair].append(alike[:, column])
    agreement = Agreement(len(found))
    for pair in found:
        far = float(np.percentile(np.concatenate(errors[pair]), PERCENTILE))
        near = float(np.percentile(np.concatenate(cosines[pair]), 100.0 - PERCENTILE))
        if far <= threshold and near >= cosine:
            agreement.pairs[pair] = far
    return agreement


def _compared(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """Relative error and cosine along the last axis; of two zeros 0 and 1."""
    norm_a, norm_b = mx.linalg.norm(a, axis=-1), mx.linalg.norm(b, axis=-1)
    tiny = 1e-30
    error = mx.linalg.norm(a - b, axis=-1) / mx.maximum(mx.maximum(norm_a, norm_b), tiny)
    both_zero = mx.maximum(norm_a, norm_b) == 0
    cosine = (a * b).sum(axis=-1) / mx.maximum(norm_a * norm_b, tiny)
    return error, mx.where(both_zero, 1.0, cosine)


def similar_scores(
    logits: mx.array, scoring: str, eligible: Sequence[int], threshold: float, work: Work
) -> Agreement:
    """Pairs of experts whose scores, over the tokens of `logits` (T, E), have a cosine of `threshold`.

    The published calibration: it looks at routers alone, never at what an expert computes.
    """
    logits = logits.astype(mx.float32)
    scores = mx.sigmoid(logits) if scoring == "sigmoid" else mx.softmax(logits, axis=-1)
    columns = scores.T[mx.array(np.asarray(eligible, np.uint32))] if eligible else scores.T[:0]
    columns = columns / mx.maximum(mx.linalg.norm(columns, axis=-1, keepdims=True), 1e-30)
    similar = np.array(columns @ columns.T)
    work.pairs += len(eligible) * (len(eligible) - 1) // 2
    rows, others = np.nonzero(np.triu(similar >= threshold, k=1))
    agreement = Agreement(len(rows))
    for i, j in zip(rows.tolist(), others.tolist(), strict=True):
        agreement.pairs[eligible[i], eligible[j]] = float(1.0 - similar[i, j])
    return agreement


def spread(items: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """At most `count` of `items`, evenly from beginning to end."""
    if len(items) <= count:
        return items
    return items[np.linspace(0, len(items) - 1, count).round().astype(np.int64)]
