"""`bench project`: time to first token to expect on a machine whose cold speed is known. A projection.

What is read again comes from the real store, schedule and policy, run with payloads that only have
sizes; what that costs, from the machine's cold times and the engine's measured own work.
"""

from __future__ import annotations

import argparse
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_hybridcache.caches.layout import Layout
from mlx_hybridcache.errors import SettingError
from mlx_hybridcache.planning.unloaded_model import describe
from mlx_hybridcache.prefill import replay as replays
from mlx_hybridcache.prefill.schedule import Grid, Reading
from mlx_hybridcache.sizes import format_bytes, parse_bytes
from mlx_hybridcache.tokens import Tokens

from .machine import machine, one_line
from .project_costs import Costs, Speed, costs, read_cold
from .project_scenarios import COLD, SCENES, Scene
from .simulate import GRID, SHAPES, Cuts, Shape, Simulation, our_cuts
from .tables import show, write_json
from .traces import Asked
from .workloads import Chance

SIZES = (12_000, 30_000, 60_000, 120_000)

ISSUE_1162 = {12_000: 12.4, 30_000: 28.7, 60_000: 71.6}
"""Seconds that LM Studio took on a Mac Studio with 128 GB for Qwen3-Next-80B in 8 bits, cold and hot
alike, April 2026 (mlx-lm issue 1162, which has no figure at 120,000)."""

ISSUE_1162_SOURCE = (
    "mlx-lm issue 1162: a Mac Studio with 128 GB, Qwen3-Next-80B in 8 bits, LM Studio"
)
ISSUE_1162_WEIGHTS = 84_600_000_000

BANDWIDTH = "546GB"
"""A second, of the slowest Mac Studio that comes with 128 GB (M4 Max, Apple's specifications)."""

SHORT = 100
BEHIND = f"{SHORT} tokens behind a cold one"
SEED = 1162


@dataclass(frozen=True, slots=True)
class Target:
    """The model whose requests are projected: what its caches weigh, where it is cut, its weights."""

    shape: Shape
    cuts: Cuts
    weights_bytes: int


class Watched(Simulation):
    """A simulation that tells what its last request was spared and what it took.

    `slices` are `[a, b)`, the last token's forward left out; `saved` counts checkpoints on the way.
    """

    restored: int
    saved: int

    def serve(self, index: int) -> int:
        """As ever; returns the tokens replayed."""
        self.saved, self._ends = 0, list[int]()
        self._tokens = len(self.trace[index].tokens)
        replayed = super().serve(index)
        self.restored = self._tokens - replayed
        if replayed > 1 and not self._ends:
            raise SettingError(
                f"A prompt of {self._tokens:,} tokens does not fit into the cache's "
                f"{format_bytes(self.store.budget_bytes)}. Name a larger --memory-budget, or smaller "
                "--sizes."
            )
        return replayed

    @property
    def slices(self) -> list[tuple[int, int]]:
        return list(zip([self.restored, *self._ends], self._ends, strict=False))

    def _afford(self, tokens: Tokens, b: int, cuts: list[int], parted: Container[int]) -> list[int]:
        self._ends.append(b)  # this is asked once for each slice
        return super()._afford(tokens, b, cuts, parted)

    def _save(self, tokens: Tokens, *more: Any, **options: Any) -> bool:
        is_stored = super()._save(tokens, *more, **options)
        self.saved += is_stored and len(tokens) < self._tokens  # beyond it lies the reply's end
        return is_stored


@dataclass(frozen=True, slots=True)
class Projected:
    """One scenario at one size. Tokens, bytes and seconds; the scenario's last request."""

    scenario: str
    size: int
    prompt_tokens: int
    restored_tokens: int
    replayed_tokens: int
    forwards: int
    checkpoints: int
    restored_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Projection:
    """Turns what a request was spared and what it took into seconds."""

    speed: Speed
    costs: Costs
    target: Target
    bandwidth: int
    budget_bytes: int

    @property
    def forward_seconds(self) -> float:
        """The least that a forward takes, however short: all weights are read once."""
        return self.target.weights_bytes / self.bandwidth

    def scene(self, scene: Scene, size: int) -> Projected:
        """The last request of a scenario with prompts of about `size` tokens."""
        trace = scene.asks(Chance(SEED), size)
        simulation = Watched(trace, self.target.shape, self.budget_bytes, cuts=self.target.cuts)
        seconds, replayed = [], 0
        for index, asked in enumerate(trace):
            replayed = simulation.serve(index)
            last = index == len(trace) - 1
            seconds.append(self.seconds(asked, simulation, scene.from_disk and last))
        work, asked = simulation, trace[-1]
        return Projected(
            scenario=scene.name,
            size=size,
            prompt_tokens=len(asked.tokens),
            restored_tokens=work.restored,
            replayed_tokens=replayed,
            forwards=len(work.slices) + 1,
            checkpoints=work.saved,
            restored_bytes=self.restored_bytes(work),
            seconds=sum(seconds) if scene.adds_up else seconds[-1],
        )

    def seconds(self, asked: Asked, work: Watched, from_disk: bool) -> float:
        """One request alone: tokenize, restore, read, save on the way, and the last token's forward."""
        shape, own = self.target.shape, self.costs
        rows = sum(b - a for a, b in work.slices) * shape.row_bytes
        saved = rows + work.saved * shape.checkpoint_bytes
        move = own.promote if from_disk else own.restore
        return (
            own.tokenize * len(asked.tokens)
            + move * self.restored_bytes(work)
            + sum(self.slice_seconds(a, b) for a, b in work.slices)
            + own.save * saved
            + self.forward_seconds
        )

    def restored_bytes(self, work: Watched) -> int:
        """What is copied for a restore; nothing when nothing was found."""
        return self.target.shape.prefix_bytes(work.restored) if work.restored else 0

    def slice_seconds(self, start: int, end: int) -> float:
        """One forward over `[start, end)`."""
        return max(self.forward_seconds, self.speed.seconds(start, end))

    def cold_seconds(self, size: int) -> float:
        """As it was measured; by the fit where it was not."""
        return self.speed.measured.get(size, self.speed.seconds(0, size))

    def behind(self, size: int) -> Projected:
        """A short request that comes when the last whole slice of a cold prompt has just begun."""
        wait = self.slice_seconds(max(0, size - GRID.step), size)
        own = self.slice_seconds(0, SHORT) + self.forward_seconds + self.costs.tokenize * SHORT
        return Projected(BEHIND, size, SHORT, 0, SHORT, 2, 0, 0, wait + own)

    def all(self, sizes: Sequence[int]) -> list[Projected]:
        """Every scenario at every size."""
        found = [self.scene(scene, size) for scene in SCENES for size in sizes]
        return [*found, *map(self.behind, sizes)]

    def assumptions(self, source: str) -> list[str]:
        """What the figures rest on."""
        speed, own, shape = self.speed, self.costs, self.target.shape
        times = ", ".join(f"{n:,}: {t:g} s" for n, t in sorted(speed.measured.items()))
        cold = f"Cold times: {source} ({times}), as they are, with nothing saved on the way."
        fit = (
            f"Between and beyond them: {speed.linear * 1e3:.3g} ms a token and "
            f"{speed.quadratic * 1e9:.3g} ns times the square of the length, fitted to them; the fit "
            f"misses them by {speed.worst_miss:.0%} at most. Columns beyond them are marked *."
        )
        forward = (
            f"A forward takes at least {self.forward_seconds:.3g} s, however short: "
            f"{format_bytes(self.target.weights_bytes)} of weights are read once at "
            f"{self.bandwidth / 1e9:g} GB a second. A single token of a mixture of experts reads far "
            "less."
        )
        engine = (
            f"The engine's own work: restoring {1 / own.restore / 1e9:.2g} GB a second, saving "
            f"{1 / own.save / 1e9:.2g}, promoting from disk {1 / own.promote / 1e9:.2g}, measured on "
            f"{one_line(dict(own.machine))} ({'; '.join(own.sources)}). If that is not the machine of "
            "the cold times, run `bench overhead` and `bench disk` there."
        )
        tokenizing = (
            f"Tokenizing: {own.tokenize * 1e6:.2g} us a token, this machine, the bundled tokenizer. "
            "HTTP and matching (about 1 ms) are left out."
        )
        shapes = (
            f"Shapes: {shape.name}, {format_bytes(shape.row_bytes)} a token, "
            f"{format_bytes(shape.checkpoint_bytes)} a checkpoint; budget "
            f"{format_bytes(self.budget_bytes)}. Nobody else asks meanwhile."
        )
        restart = "After a restart: everything was written before it, and the model is loaded."
        return [cold, fit, forward, engine, tokenizing, shapes, restart]


def target_of(path_or_repo: str | None) -> Target:
    """The model in a directory, by its configuration; Qwen3-Next-80B in 8 bits when none is named.

    Raises `ModelError`, and `SettingError` for a model without checkpoints.
    """
    if path_or_repo is None:
        return Target(SHAPES["qwen3-next-80b"], our_cuts, ISSUE_1162_WEIGHTS)
    model = describe(path_or_repo)
    layout = Layout.traced(model.model)
    if not layout.snapshot_bytes:
        raise SettingError(
            f"{path_or_repo} ({model.family}) restores at any token, so a projection would be trivial: "
            "what is new is read. Name a hybrid model."
        )
    grid = Grid(alignment=layout.alignment)

    def cuts(reading: Reading) -> Sequence[int]:
        return replays.plan(layout, grid, reading, exact=False).cuts

    shape = replace(
        SHAPES["qwen3-next-80b"],
        name=model.name,
        row_bytes=layout.row_bytes,
        checkpoint_bytes=layout.snapshot_bytes,
    )
    return Target(shape, cuts, model.weights_bytes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench project`."""
    add = parser.add_argument
    add(
        "--cold",
        action="append",
        metavar="TOKENS=SECONDS",
        help="time to first token of a cold prompt, measured (default: those of mlx-lm issue 1162)",
    )
    add("--source", metavar="TEXT", help="where those times were measured, for the output")
    add(
        "--like",
        metavar="MODEL",
        help="directory, or owner/name, of the model (default: Qwen3-Next-80B in 8 bits)",
    )
    add(
        "--bandwidth",
        default=BANDWIDTH,
        metavar="SIZE",
        help="memory read in a second (%(default)s)",
    )
    add("--memory-budget", default="16GB", metavar="SIZE", help="of the cache (%(default)s)")
    add(
        "--sizes",
        type=int,
        nargs="+",
        default=list(SIZES),
        metavar="TOKENS",
        help="of prompts (12000 30000 60000 120000)",
    )
    add(
        "--overhead",
        type=Path,
        metavar="FILE",
        help="what `bench overhead --json` wrote on that machine",
    )
    add("--disk", type=Path, metavar="FILE", help="what `bench disk --json` wrote on that machine")
    add(
        "--measure-tokens",
        type=int,
        default=6_000,
        help="prompt for what is not given (6000, 1 GiB)",
    )
    add("--pairs", type=int, default=3, help="measurements of what is not given (3)")
    parser.set_defaults(model=None)


def run(args: argparse.Namespace, console: Console) -> int:
    """Project, print, write."""
    if args.cold and args.source is None:
        args.source = "given on the command line"
    speed = Speed.fitted(read_cold(args.cold) if args.cold else ISSUE_1162)
    if min(args.sizes) < 1_000:
        raise SettingError(
            f"--sizes {min(args.sizes)}: scenarios need prompts of 1,000 tokens or more."
        )
    target = target_of(args.like)
    with console.status("measuring what was not given"):
        own = costs(args.overhead, args.disk, tokens=args.measure_tokens, pairs=args.pairs)
    projection = Projection(
        speed, own, target, parse_bytes(args.bandwidth), parse_bytes(args.memory_budget)
    )
    source = args.source or ISSUE_1162_SOURCE
    rows = projection.all(args.sizes)
    show_projection(console, projection, rows, args.sizes)
    for line in projection.assumptions(source):
        console.print(f"- {line}", highlight=False, markup=False, soft_wrap=True)
    write_json(
        args.json,
        {
            "command": "project",
            "is_projection": True,
            "machine": machine(),
            "cold_source": source,
            "cold_seconds": {str(n): projection.cold_seconds(n) for n in args.sizes},
            "measured_cold_seconds": {str(n): t for n, t in speed.measured.items()},
            "assumptions": projection.assumptions(source),
            "rows": [asdict(row) for row in rows],
        },
    )
    return 0


def show_projection(
    console: Console, projection: Projection, rows: Sequence[Projected], sizes: Sequence[int]
) -> None:
    """Two tables: seconds, and the tokens that they come from."""
    marks = {size: "" if projection.speed.is_known(size) else "*" for size in sizes}
    columns = ["", *(f"{size:,}{marks[size]}" for size in sizes)]
    names = list(dict.fromkeys(row.scenario for row in rows))
    by_place = {(row.scenario, row.size): row for row in rows}
    cold = [COLD.name, *(f"{projection.cold_seconds(size):.1f}" for size in sizes)]
    seconds = [[name, *(_brief(by_place[name, size].seconds) for size in sizes)] for name in names]
    show(
        console,
        "PROJECTION, not a measurement: seconds to the first token by prompt length",
        columns,
        [cold, *seconds],
    )
    replayed = [
        [name, *(f"{by_place[name, size].replayed_tokens:,}" for size in sizes)] for name in names
    ]
    show(console, "Tokens read again, counted by the real store and schedule", columns, replayed)


def _brief(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.2f}"
