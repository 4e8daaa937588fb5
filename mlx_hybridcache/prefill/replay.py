"""Replay: read the tokens that are not restored, slice by slice, taking checkpoints at the cuts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..caches import checkpoint as checkpoints
from ..caches.checkpoint import Checkpoint
from ..caches.layout import Layout
from ..tokens import Tokens
from . import schedule
from .schedule import Grid, Reading


@dataclass(frozen=True, slots=True)
class Route:
    """What to read, `[start, end)`, and the cuts in `(start, end]` to take on the way.

    A slice is one forward. It ends at multiples of its step, and at `pauses`: the cuts of layers
    that cannot hand out a state from inside a forward, and the position where rows begin to be quantized.
    """

    start: int
    end: int
    cuts: tuple[int, ...]
    must_pause: bool
    cuts_every_slice: bool
    quantized_start: int = 0

    def slice_end(self, position: int, step: int, stops: Collection[int] = ()) -> int:
        """Where the slice that begins at `position` ends. `stops` are cuts that came up since."""
        pauses = [*self.cuts, *stops] if self.must_pause else []
        return schedule.slice_end(position, self.end, step, [*pauses, self.quantized_start])

    def cuts_in(self, a: int, b: int, stops: Collection[int] = ()) -> list[int]:
        """The cuts to take in `(a, b]`, ascending."""
        every = {*schedule.cuts_in(self.cuts, a, b), *(cut for cut in stops if a < cut <= b)}
        return sorted(every | {b} if self.cuts_every_slice else every)


def route_of(layout: Layout, grid: Grid, reading: Reading, *, exact: bool) -> Route:
    """How to read `[reading.start, reading.end)` with this model's layers."""
    start, end = reading.start, reading.end
    if exact:
        cuts = schedule.cuts_for_exact(reading, grid)
    elif not layout.needs_snapshots:
        cuts = []  # rows restore anywhere; a cut per slice stores what was read so far
    elif layout.must_pause:
        cuts = schedule.cuts_for_pausing(reading, grid)
    else:
        cuts = schedule.cuts_for(reading, grid)
    every_slice = not exact and (layout.stores_every_slice or not layout.needs_snapshots)
    return Route(start, end, tuple(cuts), layout.must_pause, every_slice, layout.quantized_start)


@dataclass(frozen=True, slots=True)
class Slice:
    """One slice was read, up to `position`; `taken` are the checkpoints crossed, ascending."""

    position: int
    taken: tuple[Checkpoint, ...]


def replay(
    layout: Layout,
    model: Any,
    caches: Sequence[Any],
    tokens: Tokens,
    route: Route,
    *,
    step: Callable[[], int],
    stops: Collection[int],
    afford: Callable[[int, int, list[int]], list[int]],
) -> Iterator[Slice]:
    """Read what the route says of `tokens` (int32, `(n,)`) into `caches`, a slice at a time.

    Before each slice `step()` says how long it may be, `stops` are the cuts that came up meanwhile,
    and `afford(a, b, cuts)` returns the cuts whose bytes there is room for, so that no snapshot
    exists that was not paid for.
    """
    a = route.start
    while a < route.end:
        b = route.slice_end(a, step(), stops)
        cuts = afford(a, b, route.cuts_in(a, b, stops))
        yield Slice(b, _read(layout, model, caches, tokens, (a, b), cuts))
        mx.clear_cache()
        a = b


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
        captured = {
            leaf: [layout.stored(leaf, state) for state in states]
            for leaf, states in snapshots().items()
        }
        del snapshots  # it holds the states that are made small
    # One evaluation for the slice: the caches, the states that the forward passed through, and what
    # it left of the model itself.
    mx.eval(
        [cache.state for cache in caches],
        [s.arrays for taken in captured.values() for s in taken],
        layout.lazy(),
    )
    return tuple(
        checkpoints.take(
            layout, caches, cut, {i: taken[k] for i, taken in captured.items()} if cut < b else None
        )
        for k, cut in enumerate(cuts)
    )
