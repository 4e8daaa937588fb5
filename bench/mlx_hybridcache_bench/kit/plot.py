"""Lines over context length, as a PNG. Needs matplotlib, from the `bench` extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen
from matplotlib.axes import Axes


def plot_lines(path: Path, title: str, lines: dict[str, list[tuple[int, float]]]) -> None:
    """Write `lines`, name -> (context tokens, tokens per second)."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    draw_lines(axes, lines)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("tokens per second")
    axes.set_title(title)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_lines(axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw `lines`, name -> points, with both axes logarithmic.

    Names that share their beginning up to the comma share a colour; the second of them is dashed
    with hollow points.
    """
    colours: dict[str, str] = {}
    for name, points in lines.items():
        family = name.rpartition(",")[0]
        dashed = family in colours
        colour = colours.setdefault(family, f"C{len(colours)}")
        x, y = zip(*points, strict=True)
        (line,) = axes.plot(x, y, "--" if dashed else "-", color=colour, marker="o", label=name)
        if dashed:
            line.set_markerfacecolor("none")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
