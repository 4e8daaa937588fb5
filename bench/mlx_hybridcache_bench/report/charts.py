"""The pictures of a run: TTFT over length, by scenario, under several clients, and memory."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import floor, log10
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..kit.plot import draw_lines
from ..kit.tables import Spread, size_text
from ..serving.crowd import IDENTICAL, SHORT_BEHIND_LONG
from ..serving.scenarios import AGAIN, COLD
from .results import Measured, Results
from .sheet import results_of, sizes_in, ttft
from .summary import REPEAT, hot_steps, shares_memory

COLOURS = ("#2f7fd0", "#d9660a", "#1f9d55", "#b0559f", "#8a6d3b", "#5b6ee1")
"""Of a middle brightness, which a white page and a dark one both carry."""

INK, FAINT = "#010203", "#040506"
"""Stand for the colour of the page's text until the picture is part of a page."""

STYLE: Any = {
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.88",
    "legend.frameon": False,
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "ttft",
}
ON_PAGE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    "grid.color": FAINT,
}
WIDTH, HEIGHT = 4.4, 3.4
"""Inches; at 72 points to an inch a phone shows them nearly at full size."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One picture: the name of its file, its title, what it shows in words, and how it is drawn."""

    name: str
    title: str
    words: str
    height: float
    draw: Callable[[Axes], None]

    def png(self, directory: Path) -> Path:
        """Write it as a picture of its own."""
        path = directory / f"{self.name}.png"
        with mpl.rc_context(STYLE):
            figure = self._figure()
            # Above the legend: Matplotlib makes no room for a title of the whole figure there.
            figure.legends[0].set_title(self.title)
            figure.savefig(path, dpi=160)
        return path

    def svg(self) -> str:
        """As part of a page: its lines and words have the colour of the page's text."""
        written = io.StringIO()
        with mpl.rc_context({**STYLE, **ON_PAGE}):
            self._figure().savefig(written, format="svg", transparent=True)
        return _embedded(written.getvalue(), self.name)

    def _figure(self) -> Figure:
        figure = Figure(figsize=(WIDTH, self.height), layout="constrained")
        self.draw(figure.subplots())
        return figure


def charts(results: Results) -> list[Chart]:
    """Those that there are figures for."""
    servers = [each for each in results.servers if each.requests]
    found: list[Chart] = []
    if bars := _one_size(servers):
        words = "Median time to first token of one length of prompt: new, again, and with another ending."
        found.append(_bars("ttft-by-length", "TTFT, cold and hot", words, bars, servers))
    elif lines := _lines(servers):
        words = "Time to first token over the length of the prompt, cold and repeated."
        found.append(
            Chart("ttft-by-length", "TTFT by prompt length", words, HEIGHT, _lengths(lines))
        )
    if bars := _scenario_bars(servers):
        words = "Median time to first token of what a cache can answer, by scenario."
        title = "TTFT of hot requests by scenario"
        found.append(_bars("ttft-by-scenario", title, words, bars, servers))
    if bars := _crowd_bars(servers):
        words = "Seconds for one client alone and for several at once."
        title = "Several clients at once"
        found.append(_bars("several-clients", title, words, bars, servers))
    if bars := _memory_bars(servers, shared=shares_memory(results)):
        words = "Memory of each server when warm, at its peak, and what the system lost."
        if len(bars) == 2:
            words = "Memory of each server's process when warm and at its peak."
        found.append(_bars("memory", "Memory", words, bars, servers, unit="GiB"))
    return found


Bars = dict[str, list[Spread | None]]


def _lines(servers: list[Measured]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for server in servers:
        for step, name in ((COLD, "cold"), (AGAIN, "hot")):
            points = [
                (float(size), spread.median)
                for size in sizes_in(results_of(server, REPEAT))
                if (
                    spread := server.spread(
                        ttft, scenario=REPEAT, size=size, steps=frozenset({step})
                    )
                )
            ]
            if points:
                found[f"{server.name}, {name}"] = points
    return found


def _one_size(servers: list[Measured]) -> Bars:
    """Where there is no line to draw: three kinds of request, whose times differ most."""
    sizes = {size for server in servers for size in sizes_in(results_of(server, REPEAT))}
    if len(sizes) != 1:
        return {}
    (size,) = sizes
    kinds = {
        f"new prompt of {size_text(size)}": (REPEAT, frozenset({COLD})),
        "the same again": (REPEAT, frozenset({AGAIN})),
        "another ending": ("changed-ending", hot_steps("changed-ending")),
    }
    bars: Bars = {
        title: [
            server.spread(ttft, scenario=scenario, size=size, steps=steps) for server in servers
        ]
        for title, (scenario, steps) in kinds.items()
    }
    return {title: spreads for title, spreads in bars.items() if any(spreads)}


def _lengths(lines: dict[str, list[tuple[float, float]]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        draw_lines(axes, lines)
        sizes = sorted({size for points in lines.values() for size, _ in points})
        axes.set_xticks(sizes, [size_text(int(size)) for size in sizes], minor=False)
        axes.xaxis.minorticks_off()
        axes.set_xlabel("prompt (tokens)")
        _in_seconds(axes.yaxis)
        _legend(axes)

    return draw


def _scenario_bars(servers: list[Measured]) -> Bars:
    found: Bars = {}
    names = dict.fromkeys(each.scenario for server in servers for each in server.requests)
    for name in names:
        sizes = [sizes_in(results_of(server, name)) for server in servers]
        size = min((each[0] for each in sizes if each), default=0)
        spreads = [
            server.spread(ttft, scenario=name, size=size, steps=hot_steps(name))
            for server in servers
        ]
        if any(spreads):
            found[name] = spreads
    return found


def _crowd_bars(servers: list[Measured]) -> Bars:
    lines = {
        "one alone": (IDENTICAL, "alone_seconds"),
        "identical, at once": (IDENTICAL, "at_once_seconds"),
        "short, alone": (SHORT_BEHIND_LONG, "alone_ttft_seconds"),
        "short, behind long": (SHORT_BEHIND_LONG, "behind_ttft_seconds"),
    }
    bars = {
        title: [server.situation(situation, value) for server in servers]
        for title, (situation, value) in lines.items()
    }
    return {title: spreads for title, spreads in bars.items() if any(spreads)}


def _memory_bars(servers: list[Measured], *, shared: bool) -> Bars:
    lines = {"when warm": "warm_bytes", "at its peak": "peak_bytes"}
    if not shared:
        lines["system lost"] = "system_bytes"
    if not any(server.memory for server in servers):
        return {}
    return {
        title: [
            Spread.of([getattr(server.memory, value) / 1024**3]) if server.memory else None
            for server in servers
        ]
        for title, value in lines.items()
    }


def _bars(
    name: str,
    title: str,
    words: str,
    bars: Bars,
    servers: list[Measured],
    unit: str = "",
) -> Chart:
    """Horizontal bars with their spread: seconds on a logarithmic axis, or a `unit` from zero."""
    thick = 0.8 / len(servers)

    def draw(axes: Axes) -> None:
        for number, server in enumerate(servers):
            _draw_server(axes, bars, server, number, thick, unit)
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        if unit:
            axes.set_xlabel(unit)
        else:
            axes.set_xscale("log")
            times = [each for spreads in bars.values() for each in spreads if each]
            first = floor(log10(min(each.low for each in times) * 0.999))
            longest = max(each.high for each in times)
            axes.set_xlim(10.0**first, longest * 4)  # with room for what stands behind it
            _in_seconds(axes.xaxis)
        _legend(axes)

    height = 1.1 + len(bars) * max(0.28, 0.16 * len(servers))
    return Chart(name, title, words, max(2.2, height), draw)


def _draw_server(
    axes: Axes, bars: Bars, server: Measured, number: int, thick: float, unit: str
) -> None:
    """The bars of one server, each with its time."""
    count = len(next(iter(bars.values())))
    spreads = [(at, each[number]) for at, each in enumerate(bars.values())]
    known = [(at, spread) for at, spread in spreads if spread]
    places = [at + (number - (count - 1) / 2) * thick for at, _ in known]
    medians = [spread.median for _, spread in known]
    low = [spread.median - spread.low for _, spread in known]
    high = [spread.high - spread.median for _, spread in known]
    axes.barh(
        places,
        medians,
        height=0.9 * thick,
        color=COLOURS[number % len(COLOURS)],
        label=server.name,
        xerr=(low, high) if any(low) or any(high) else None,
        error_kw={"ecolor": "0.5", "elinewidth": 1},
    )
    for place, spread in zip(places, (spread for _, spread in known), strict=True):
        text = f"{spread.median:.2f}" if unit else _short(spread.median)
        axes.annotate(
            text,
            (spread.high, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )


def _in_seconds(axis: Axis) -> None:
    """`10 ms`, `1 s`, `100 s` instead of powers of ten: one for each decade."""
    axis.set_major_locator(LogLocator(base=10, numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda seconds, _: _short(seconds)))
    axis.set_minor_formatter(NullFormatter())


def _short(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def _legend(axes: Axes) -> None:
    figure = axes.figure
    assert isinstance(figure, Figure), "charts have no figures within figures"
    figure.legend(
        loc="outside upper left", ncols=2, fontsize="small", columnspacing=1, alignment="left"
    )


def _embedded(svg: str, name: str) -> str:
    """A picture that may stand beside others in one page, and asks nobody for anything."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(INK, "currentColor")
    return svg.replace(f"stroke: {FAINT}", "stroke: currentColor; stroke-opacity: 0.15")
