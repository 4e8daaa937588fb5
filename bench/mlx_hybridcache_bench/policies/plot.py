"""Tokens replayed over budget, one panel for each trace, as a PNG. Needs matplotlib, from the `bench` extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen

from .outcomes import Outcome


def plot_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write one panel for each outcome, both axes logarithmic."""
    columns = min(4, len(outcomes))
    lines = -(-len(outcomes) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(4 * columns, 3.2 * lines), layout="constrained", squeeze=False
    )
    for axes, outcome in zip(grid.flat, outcomes, strict=False):
        gigabytes = [budget / 1e9 for budget in outcome.budgets]
        for number, (policy, counts) in enumerate(outcome.replayed.items()):
            share = [100 * count / outcome.prompt_tokens for count in counts]
            style = "k:" if policy == "clairvoyant" else f"C{number}-"
            axes.plot(gigabytes, share, style, marker="o", markersize=3, label=policy)
        axes.axhline(100 * outcome.floor_tokens / outcome.prompt_tokens, color="0.7", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(gigabytes, [f"{each:g}" for each in gigabytes])
        axes.set_title(f"{outcome.trace}, {outcome.shape}", fontsize="medium")
    for axes in grid[:, 0]:
        axes.set_ylabel("% of prompt tokens replayed")
    for axes in grid[-1]:
        axes.set_xlabel("budget (GB)")
    grid.flat[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
