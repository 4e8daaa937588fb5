"""A trial's figures for people: tables, sentences, and both as Markdown for a checkpoint's card."""

from __future__ import annotations

from .arms import RANDOM
from .measure import QUANTIZED, Compared
from .trial import Trial
from .verdict import percent

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Title, columns, rows."""


def tables(found: Trial) -> list[Table]:
    """The figures for people: each arm beside the original, then flips and replies by pair."""
    readings = found.readings
    texts = readings.texts
    beside = [(name, *_beside(arm)) for name, arm in readings.arms.items()]
    columns = ("arm", "perplexity", "change (95 %)", "KL, nats", "top-k", "outside", "greedy")
    names = tuple(readings.arms)
    flips = [
        (pair, *(_cell(by_arm[name].flips.swapped, by_arm[name].flips.inside) for name in names))
        for pair, by_arm in readings.seen.items()
    ]
    replies = [
        (pair, *(f"{by_arm[name].routed} / {by_arm[name].replies}" for name in names))
        for pair, by_arm in readings.seen.items()
    ]
    chosen = next(iter(readings.arms.values())).flips.chosen
    return [
        (f"Beside the original, {texts} texts, {readings.tokens:,} tokens", columns, beside),
        (
            f"Choices that change hot against cold, of {chosen:,} (those inside groups)",
            ("read hot with", *names),
            flips,
        ),
        (
            f"Texts of {texts} routed alike / with the same reply of {readings.reply_tokens} tokens",
            ("read hot with", *names),
            replies,
        ),
    ]


def sentences(found: Trial) -> list[str]:
    """What no table says: the control, the rows alone, and the verdict last."""
    said = []
    control = found.readings.arms.get(RANDOM)
    if control is not None and len(control.changes) > 1:
        said.append(
            f"Control: random groups of the same sizes change perplexity by {percent(control.change)} "
            f"(single draws {min(control.changes):+.2%} to {max(control.changes):+.2%})."
        )
    if found.groups:
        left = found.ties
        said.append(
            f"Rows alone: {left.unequal:,} of {left.compared:,} scores of equal rows are unequal on this "
            f"device; plain mlx-lm would leave {left.tokens_left:,} of {left.texts:,} tokens to ties "
            f"({left.left:,} of {left.tokens:,} choices of a layer)."
        )
    if not found.has_rounder:
        said.append(
            f"Not measured: {QUANTIZED}, for a model that is quantized already, or not asked for."
        )
    return [*said, f"Verdict: {found.verdict.sentence}"]


def _beside(arm: Compared) -> tuple[str, ...]:
    return (
        f"{arm.perplexity:.4g}",
        f"{arm.change.mean:+.3%} ({arm.change.low:+.3%} to {arm.change.high:+.3%})",
        f"{arm.divergence:.2g}",
        f"{arm.top_k:.2%}",
        f"{arm.flips.outside:,}",
        f"{arm.greedy:.2%}",
    )


def _cell(swapped: int, inside: int) -> str:
    return f"{swapped:,} ({inside:,})"


def markdown(found: Trial) -> str:
    """A section for the card."""
    lines = ["", "## Measured", "", f"{found.verdict.sentence}", ""]
    for title, columns, rows in tables(found):
        lines += [f"{title}:", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines.append("")
    lines += [*sentences(found)[:-1], ""]
    return "\n".join(lines)
