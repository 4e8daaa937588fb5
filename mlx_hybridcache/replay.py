"""Replay: read the tokens that are not restored, slice by slice, taking checkpoints at the cuts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from . import checkpoint as checkpoints
from . import schedule
from .checkpoint import Checkpoint
from .layers.adapt import Layout
from .schedule import Grid, Reading
from .tokens import Tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """Slices `[a, b)` to read, each in one forward, and the cuts `(a, b]` to take on the way."""

    slices: tuple[tuple[int, int], ...]
    cuts: tuple[int, ...]


def plan(layout: Layout, grid: Grid, reading: Reading, *, exact: bool) -> Plan:
    """How to read `[reading.start, reading.end)` with this model's layers."""
    start, end = reading.start, reading.end
    if exact:
        cuts = schedule.cuts_for_exact(reading, grid)
    elif not layout.needs_snapshots:
        # Rows restore anywhere; a cut per slice stores what was read so far.
        cuts = [b for _, b in grid.slices(start, end)]
    elif layout.must_pause:
        cuts = schedule.cuts_for_pausing(reading, grid)
    else:
        cuts = schedule.cuts_for(reading, grid)
    if layout.stores_every_slice and not exact:
        cuts = sorted({*cuts, *(b for _, b in grid.slices(start, end))})
    pauses = cuts if layout.must_pause else ()
    return Plan(tuple(schedule.slices_between(grid, start, end, pauses)), tuple(cuts))


@dataclass(frozen=True, slots=True)
class Progress:
    """One slice was read, up to `position`; `taken` are the checkpoints crossed, ascending."""

    position: int
    taken: tuple[Checkpoint, ...]


def replay(
    layout: Layout,
    model: Any,
    caches: Sequence[Any],
    tokens: Tokens,
    plan: Plan,
    afford: Callable[[int, int, list[int]], list[int]],
) -> Iterator[Progress]:
    """Read the plan's slices of `tokens` (int32, `(n,)`) into `caches`, one forward each.

    `afford(a, b, cuts)` is asked before each slice and returns the cuts whose bytes there is room
    for, so that no snapshot exists that was not paid for.
    """
    for a, b in plan.slices:
        cuts = afford(a, b, schedule.cuts_in(plan.cuts, a, b))
        yield Progress(b, _read(layout, model, caches, tokens, (a, b), cuts))
        mx.clear_cache()


def _read(
    layout: Layout,
    model: Any,
    caches: Sequence[Any],
    tokens: Tokens,
    part: tuple[int, int],
    cuts: list[int],
) -> tuple[Checkpoint, ...]:
    """One forward over `[a, b)`, and the checkpoints at `cuts`, which lie in `(a, b]`."""
    a, b = part
    inside = [cut for cut in cuts if cut < b]
    hook = layout.hook
    if hook is None or not inside:
        model(mx.array(tokens[a:b])[None], cache=caches)
        captured = {}
    else:
        with hook.at([cut - a for cut in inside]) as snapshots:
            model(mx.array(tokens[a:b])[None], cache=caches)
        captured = snapshots()
    # One evaluation for the slice: the caches, and the states that the forward passed through.
    mx.eval(
        [cache.state for cache in caches],
        [s.arrays for taken in captured.values() for s in taken],
    )
    return tuple(
        checkpoints.take(
            layout, caches, cut, {i: taken[k] for i, taken in captured.items()} if cut < b else None
        )
        for k, cut in enumerate(cuts)
    )
