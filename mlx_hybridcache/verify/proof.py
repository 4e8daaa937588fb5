"""What a proof comes to: every restore point, and how hot compares with cold there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..cache import HybridPromptCache
from ..caches.quantizing.precision import Precision
from ..decode.store_check import log_probabilities

GREEDY_TOKENS = 8
AnyArray = mx.array | np.ndarray[Any, Any]

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

    In `quantized_layers` layers rows were quantized. `gone` points were no longer there to be restored, so that
    nothing is proved of them.
    """

    probe: float
    allowed: float
    points: tuple[Point, ...]
    quantized_layers: int = 0
    gone: int = 0

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
        """Whether every point was restored and is within what is allowed, and there was one."""
        return bool(self.points) and not self.gone and self.worst <= self.allowed


def reading(step: int, precision: Precision | None) -> dict[str, Any]:
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


def allowed(by_probe: float, tolerance: float | None, *, is_small: bool) -> float:
    """The largest difference that passes; without a tolerance any does beside a smaller store."""
    if tolerance is not None:
        return tolerance
    return math.inf if is_small else by_probe


def restore_points(
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


def max_abs(a: AnyArray, b: AnyArray) -> float:
    """The largest difference of two arrays of one shape."""
    return float(np.abs(np.array(a) - np.array(b)).max())


def kl(p: AnyArray, q: AnyArray) -> float:
    """KL divergence in nats of softmax(p) from softmax(q), in float64."""
    log_p, log_q = log_probabilities(p), log_probabilities(q)
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum()))
