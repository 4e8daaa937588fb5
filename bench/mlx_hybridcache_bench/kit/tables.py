"""How results are shown: tables for people, JSON for programs, and figures beside their targets."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that was promised. It keeps its target when `value <= target`.

    `counted` figures are facts and the same on every machine; the others are timings, which a busy
    machine can spoil.
    """

    name: str
    value: float
    unit: str
    target: float
    counted: bool

    @property
    def kept(self) -> bool:
        return self.value <= self.target

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "kept": self.kept}


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str = ".0f", scale: float = 1.0) -> str:
        """`90 (85-97)`, or the median alone when all are equal."""
        median, low, high = (format(scale * v, form) for v in (self.median, self.low, self.high))
        return median if low == high else f"{median} ({low}-{high})"

    def as_json(self) -> dict[str, float]:
        """Plain values."""
        return {"median": self.median, "min": self.low, "max": self.high}


def show(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Print a table; all columns but the first are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_figures(console: Console, figures: Sequence[Figure]) -> None:
    """Print each promised number beside its target."""
    rows = [
        (
            figure.name,
            f"{figure.value:.3g} {figure.unit}",
            f"<= {figure.target:g}",
            "counted" if figure.counted else "timed",
            "yes" if figure.kept else "NO",
        )
        for figure in figures
    ]
    show(console, "Figures and targets", ("figure", "measured", "target", "how", "kept"), rows)


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write `result` to a file, if there is one to write to."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def size_text(tokens: int) -> str:
    """`12K` for 12,000, `1,050` for 1,050."""
    return f"{tokens // 1000}K" if tokens % 1000 == 0 else f"{tokens:,}"
