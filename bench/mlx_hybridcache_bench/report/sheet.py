"""One table of text, and how figures are written in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..kit.tables import Spread
from .results import Measured, Request


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table. The first column is text, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


def ttft(request: Request) -> float | None:
    """The value that all of this is about."""
    return request.ttft_seconds


def results_of(server: Measured, scenario: str) -> list[Request]:
    """The requests of one scenario."""
    return [each for each in server.requests if each.scenario == scenario]


def sizes_in(requests: Sequence[Request]) -> list[int]:
    """Ascending."""
    return sorted({each.size for each in requests})


def seconds_text(spread: Spread | None) -> str:
    """`62 ms (58-70)`, `12.4 s (12.1-13.0)`; nothing for nothing."""
    if spread is None:
        return ""
    scale, unit = (1000.0, "ms") if spread.median < 1 else (1.0, "s")
    form = (
        ".0f" if unit == "ms" or spread.median >= 100 else ".1f" if spread.median >= 10 else ".2f"
    )
    median, *others = spread.text(form, scale).split(" ")
    return " ".join((median, unit, *others))
