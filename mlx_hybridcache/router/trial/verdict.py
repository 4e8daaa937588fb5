"""Whether a patch helps on this device, as a sentence that the figures decide."""

from __future__ import annotations

from dataclasses import dataclass

from .arms import CANONICALIZED, ORIGINAL, RANDOM
from .differences import NO_FLIPS, Difference, Flips
from .measure import NOISE, Measurements, Seen

SERVING = "other slices", "beside others"
"""Pairs in which nothing differs but what a server does anyway: a cache must survive these."""

MOST = 0.001
"""Relative change of perplexity that is no change: 0.1 %."""

UNSURE = 0.01
"""Upper end of the interval beyond which too little was read: 1 %."""

LEAST = 0.5
"""Share of the flips that must go for a patch to be worth its while."""

GUESSED = 0.5
"""Share of the coverage that the same procedure may find among independent random experts."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to use the patch, and why, in words."""

    helps: bool
    sentence: str


def verdict(
    readings: Measurements, groups: int, coverages: tuple[float, float] | None = None
) -> Verdict:
    """The verdict on a patch of `groups` groups.

    `coverages` are the shares of experts that discovery grouped in this model and in the null model, 0 to 1.
    """
    if groups == 0:
        changed = _together(readings, ORIGINAL, SERVING)
        return Verdict(
            False,
            "It does not help here: no two experts of this model were found to compute the same, so nothing "
            f"was changed. {changed.swapped:,} of {changed.chosen:,} choices change with the way in which a "
            "prompt is read.",
        )
    arm, control = readings.arms[CANONICALIZED], readings.arms.get(RANDOM)
    doubts = []
    if coverages is not None and coverages[1] >= GUESSED * coverages[0]:
        doubts.append(
            f"the same procedure groups {coverages[1]:.0%} of independent random experts and {coverages[0]:.0%} "
            "of this model's, so that its groups say little about the experts"
        )
    if abs(arm.change.mean) > MOST:
        doubts.append(f"perplexity changes by more than {MOST:.1%} ({percent(arm.change)})")
    elif arm.change.high > UNSURE:
        doubts.append(f"perplexity may rise by {arm.change.high:.1%}; more text would tell")
    if doubts:
        return Verdict(False, f"Do not use it: {', and '.join(doubts)}.")
    helps, said = _flips(readings)
    if control is not None and not (control.change.is_significant and control.change.mean > MOST):
        said += (
            " That perplexity stays the same proves little: random groups of the same sizes do not raise it "
            f"significantly either ({percent(control.change)})."
        )
    return Verdict(helps, said)


def _flips(readings: Measurements) -> tuple[bool, str]:
    before, after = (_together(readings, arm, SERVING) for arm in (ORIGINAL, CANONICALIZED))
    same = f"Perplexity stays the same ({percent(readings.arms[CANONICALIZED].change)})."
    if before.swapped == 0:
        said = (
            "It does not help here: however prompts are sliced and whatever is read beside them, this "
            f"device chooses the same experts (0 of {before.chosen:,} choices change), so a cache loses "
            "nothing to routing."
        )
        return False, f"{said} {_elsewhere(readings)}{same}"
    if before.inside == 0:
        return False, (
            f"It does not help here: {before.swapped:,} of {before.chosen:,} choices change with the way "
            "in which a prompt is read, but none of them inside a group. Exact mode is what helps. "
            + same
        )
    gone = 1 - after.swapped / before.swapped
    what = (
        f"of {before.swapped:,} choices that change with the way in which a prompt is read "
        f"({before.inside:,} inside groups) {after.swapped:,} are left ({after.inside:,} inside groups)"
    )
    without, with_it = (
        sum(each.replies for each in _seen(readings, arm, SERVING))
        for arm in (ORIGINAL, CANONICALIZED)
    )
    total = readings.texts * len(_seen(readings, ORIGINAL, SERVING))
    replies = f"{without} of {total} replies agreed without it, {with_it} do with it"
    if gone < LEAST:
        return False, f"It helps little here: {what}; {replies}. Exact mode does more. {same}"
    if with_it <= without:
        # Experts that are alike give alike: where that is so, which of them was chosen shows in no reply.
        return False, f"It steadies the routing here, but no reply: {what}; {replies}. {same}"
    return True, f"It helps here: {what}; {replies}. {same}"


def _elsewhere(readings: Measurements) -> str:
    """What noise of a known size shows, where the device itself shows nothing."""
    noisy = [pair for pair in readings.seen if pair.startswith(NOISE)][:1]
    if not noisy:
        return ""
    before, after = (_together(readings, arm, noisy) for arm in (ORIGINAL, CANONICALIZED))
    return (
        f"On a device whose rounding moved router logits by {noisy[0].removeprefix(NOISE).strip()} of their "
        f"spread it would leave {after.swapped:,} of {before.swapped:,} changed choices. "
    )


def _together(readings: Measurements, arm: str, pairs: tuple[str, ...] | list[str]) -> Flips:
    return sum((each.flips for each in _seen(readings, arm, pairs)), NO_FLIPS)


def _seen(readings: Measurements, arm: str, pairs: tuple[str, ...] | list[str]) -> list[Seen]:
    return [readings.seen[pair][arm] for pair in pairs if pair in readings.seen]


def percent(change: Difference) -> str:
    """A relative change with its interval."""
    return f"{change.mean:+.3%}, 95 % interval {change.low:+.3%} to {change.high:+.3%}"
