"""Groups by layer and flips by arm, as a PNG. Needs matplotlib, from the `bench` extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen
from matplotlib.ticker import MaxNLocator

from mlx_hybridcache.router.trial.arms import CANONICALIZED, FIXED, ORIGINAL, RANDOM

from .models import Tried

COLOURS = {ORIGINAL: "C0", CANONICALIZED: "C1", RANDOM: "C2", FIXED: "C3"}


def plot_tried(path: Path, tried: Sequence[Tried]) -> None:
    """A row of two pictures for each model: its layers' experts, its arms' flips by pair of readings.

    Flips are shares of all choices; of each bar the dark part is inside groups, the light one outside.
    """
    figure, axes = plt.subplots(
        len(tried),
        2,
        figsize=(11, 3 * len(tried)),
        layout="constrained",
        squeeze=False,
        gridspec_kw={"width_ratios": (2, 3)},
    )
    for (left, right), each in zip(axes, tried, strict=True):
        _layers(left, each)
        _flips(right, each)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _layers(axes: Any, tried: Tried) -> None:
    found = tried.discovery.patch.layers
    places = range(len(found))
    axes.bar(places, [layer.experts for layer in found], color="0.9", label="experts")
    axes.bar(places, [layer.members for layer in found], color="C0", label="in groups")
    axes.plot(places, [len(layer.groups) for layer in found], "o", color="k", label="groups")
    null = [layer.null_members for layer in tried.discovery.layers]
    axes.plot(places, null, "_", color="C3", markersize=16, label="in groups, null model")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(
        0, 1.4 * max(layer.experts for layer in found)
    )  # the legend stands above the bars
    axes.set_xlabel("MoE layer")
    axes.set_title(tried.name, loc="left", fontsize="medium")
    axes.legend(fontsize="x-small", loc="upper right", ncols=2)


def _flips(axes: Any, tried: Tried) -> None:
    readings = tried.trial.readings
    width = 0.8 / len(readings.arms)
    for index, arm in enumerate(readings.arms):
        places = [at + index * width for at in range(len(readings.seen))]
        flips = [by_arm[arm].flips for by_arm in readings.seen.values()]
        inside = [100 * each.inside / each.chosen for each in flips]
        outside = [100 * each.outside / each.chosen for each in flips]
        axes.bar(places, inside, width, color=COLOURS[arm], label=arm)
        axes.bar(places, outside, width, bottom=inside, color=COLOURS[arm], alpha=0.4)
    axes.set_xticks(
        [at + width * (len(readings.arms) - 1) / 2 for at in range(len(readings.seen))],
        list(readings.seen),
        fontsize="x-small",
    )
    axes.set_ylabel("choices that change, %")
    axes.set_ylim(0, max(1e-3, 1.35 * axes.get_ylim()[1]))
    axes.legend(
        fontsize="x-small", loc="upper left", title="dark: inside groups", title_fontsize="x-small"
    )
