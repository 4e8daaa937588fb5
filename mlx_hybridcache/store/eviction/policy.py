"""What to keep: pure functions over numbers.

A checkpoint is worth the tokens that would have to be replayed without it, times how likely the next
request is to resume there, per byte that its removal would free. The rule follows Marconi
(arXiv 2411.19379: compute saved per byte). The likelihood has three parts, each falling with the
time since it was last confirmed:

* prompts come back to the end of a conversation, where repeats and next turns land;
* further back, the less often the further from the end (sparse prefix caching, arXiv 2605.05219), so that
  a path ends up densely covered near its end and sparsely further back, and keeps its early anchors
  (llama.cpp issue 25023); how often is learnt from where the prompts so far have parted ways (`BranchRate`);
* where prompts have parted ways before they will again, and so they will behind the first turn, which is the
  system prompt where there is one: that counts as one branch before there was any.

Nothing here is told the kind of workload; `mlx-hybridcache bench policies` measures it on eight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

NEAR_TOKENS = 64
"""Distances from the end up to this count as the end: what a changed ending or a stripped `<think>`
resumes. Checkpoints that near replace each other, so that the gap between them decides."""

INTERIOR = 0.03
"""Resuming further back, for each factor of e in distance from the end, in resuming at the end: what is
supposed before anything is known."""

SUPPOSED = 10.0
"""As many requests as that supposition weighs."""

FADING = 0.98
"""What a request weighs, when the next one has come, of what it weighed."""

FACTORS = 5.0
"""Factors of e between the distances that count: 64 tokens to about 10,000."""


@dataclass(slots=True)
class BranchRate:
    """Where prompts have parted ways with what was stored: of so many `requests`, so many `inside`.

    Both fade. Chats with reasoning come back to the end; labelling tasks and documents never do.
    (Sparse prefix caching, arXiv 2605.05219, places by the distribution of overlap depths.)
    """

    requests: float = 0.0
    inside: float = 0.0

    def saw(self, *, is_inside: bool) -> None:
        """One more request was matched."""
        self.requests = FADING * self.requests + 1
        self.inside = FADING * self.inside + is_inside

    @property
    def interior(self) -> float:
        """Resuming further back, for each factor of e in distance, as it seems from what was seen."""
        supposed = INTERIOR * FACTORS * SUPPOSED
        return (supposed + self.inside) / (SUPPOSED + self.requests) / FACTORS


class Weights(NamedTuple):
    """What a checkpoint is worth, as far as that does not change while time passes.

    `at_once` falls with the time since it was taken or restored, `in_passing`, times the likelihood of
    resuming further back and `at_most` so much, with the time since a request last read or wrote behind it.
    """

    at_once: float
    in_passing: float
    at_most: float

    def worth(self, age_ticks: int, idle_ticks: int, interior: float) -> float:
        """What it is worth now: the less, the sooner it goes.

        Ticks are of the store's logical clock: `age_ticks` have passed since it was taken or restored,
        `idle_ticks` since a request last read or wrote behind it. `interior` is how likely resuming
        further back is (`BranchRate.interior`).
        """
        passing = min(self.at_most, self.in_passing * interior)
        return self.at_once / (1 + age_ticks) + passing / (1 + idle_ticks)


def weights(
    gap_tokens: int,
    below_tokens: int,
    to_end_tokens: int,
    freed_bytes: int,
    returns: int,
    goes_on: bool,
) -> Weights:
    """Tokens of replay that a byte of a checkpoint can be expected to save.

    `gap_tokens` is the distance to the nearest checkpoint above it (the beginning counts as one),
    `below_tokens` to the next one below it (0 at the end of a path), `to_end_tokens` to the deepest
    end of its conversations, `freed_bytes` what its removal frees, rows included that nothing else
    needs. `returns` counts the prompts that parted ways here, and begins with one where they can be
    expected to (`schedule.branch_points`). `goes_on` is true while a running request is about to read on
    from it.
    """
    share = gap_tokens / max(freed_bytes, 1)
    seen = math.log2(1 + returns)
    if to_end_tokens <= NEAR_TOKENS and not goes_on:
        return Weights(share * (seen + 1), 0.0, 0.0)
    if goes_on:  # the next one will stand about as far away as the last one
        below_tokens = to_end_tokens = gap_tokens
    # The integral of 1 / distance from the end, over the stretch that this checkpoint serves.
    far = to_end_tokens + NEAR_TOKENS
    return Weights(share * seen, share * math.log(far / (far - below_tokens)), share)
