"""What training reads when, and how fast it learns then.

Found by trying: among everything else thousands of steps taught only the forms of replies. A
stage that holds nothing but one kind of lookup teaches it within a few hundred steps, and it
stays. Learning rates restart with such a stage, as in SGDR (Loshchilov and Hutter 2017, arXiv
1608.03983); the second cosine was cut short by the third.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """What batches hold from one step to another."""

    until: int  # first step of the next stage
    pool: str  # of dialogues: "lookups", "functions" or "dialogues", which is all kinds
    buckets: dict[int, float]  # length of a row in tokens: share of the steps
    text_share: float  # of the rows


@dataclass(frozen=True, slots=True)
class Cosine:
    """A learning rate that falls from `top` at `start` towards 3 % of it at `end`."""

    start: int
    end: int
    top: float


STEPS = 6000
WARM_UP = 100  # steps of linear rise in front of the first cosine
FINAL_SHARE = 0.03
STAGES = (
    Stage(300, "lookups", {64: 1.0}, 0.0),
    Stage(700, "dialogues", {64: 0.5, 128: 0.5}, 0.25),
    Stage(4000, "dialogues", {64: 0.15, 128: 0.25, 256: 0.3, 512: 0.2, 1024: 0.1}, 0.25),
    Stage(4500, "functions", {128: 0.3, 256: 0.7}, 0.0),
    Stage(STEPS, "dialogues", {64: 0.1, 128: 0.2, 256: 0.35, 512: 0.25, 1024: 0.1}, 0.35),
)
COSINES = (Cosine(WARM_UP, 2600, 3e-3), Cosine(2600, 5200, 2.1e-3), Cosine(4000, STEPS, 2.4e-3))


def stage_at(step: int) -> Stage:
    """The stage that a step belongs to; the last one goes on for ever."""
    return next((stage for stage in STAGES if step < stage.until), STAGES[-1])


def rate_at(step: int) -> float:
    """Learning rate of a step."""
    if step < WARM_UP:
        return COSINES[0].top * (step + 1) / WARM_UP
    cosine = [c for c in COSINES if c.start <= step][-1]
    done = min(1.0, (step - cosine.start) / (cosine.end - cosine.start))
    share = 0.5 * (1 + math.cos(math.pi * done))
    return cosine.top * (FINAL_SHARE + (1 - FINAL_SHARE) * share)
