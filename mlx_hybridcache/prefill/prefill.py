"""Prefill: what was not restored of a prompt is read, and every checkpoint on the way is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..caches.layout import Layout
from ..caches.live import LiveCaches
from ..request.request import Request
from ..store.match import AnyFound
from ..tiers import Tiers
from ..tokens import TurnMarks
from ..worker.turns import PAUSE, Load, Pause
from .replay import Route, replay, route_of
from .schedule import Grid, Reading, branch_points, lasting


@dataclass(eq=False)
class Prefill:
    """Reads the prompts of one model, a slice a turn. While others wait for a turn slices are shorter.

    `route` says what to read and where to take checkpoints.
    """

    model: Any
    layout: Layout
    grid: Grid
    marks: TurnMarks
    tiers: Tiers
    load: Load
    route: Callable[..., Route] = route_of

    def read(self, request: Request, live: LiveCaches, found: AnyFound) -> Iterator[Pause]:
        """All but the last token into `live`, which stand where `found` says."""
        for _ in self._slices(request, live, found):
            try:
                yield PAUSE
            except BaseException:  # left between two slices, where all layers agree
                self.tiers.save_end(request, live, request.tokens[: live.position])
                raise

    def _slices(self, request: Request, live: LiveCaches, found: AnyFound) -> Iterator[None]:
        tokens, account = request.tokens, request.account
        reading = Reading(
            start=found.position,
            end=len(tokens) - 1,
            turn_starts=self.marks.starts(tokens),
            branch=found.match.matched,
            boundaries=request.boundaries,
        )
        branches = branch_points(reading, self.grid, is_inside=found.is_inside)
        request.on_progress(found.position, len(tokens))
        request.advance(found.position)
        slices = replay(
            self.layout,
            self.model,
            live.caches,
            tokens,
            self.route(self.layout, self.grid, reading, exact=request.exact),
            step=lambda: self._step(request),
            stops=account.stops,
            afford=lambda a, b, cuts: self.tiers.afford(
                request, live, b, cuts, branches, lasting(cuts, b, request.lifetimes)
            ),
        )
        for read in slices:
            account.forwards += 1
            live.position, left = read.position, [*read.taken]
            del read  # what the store lets go of again must not be held from here
            live.settle([each.position for each in left])
            while left:
                at = left[0].position
                is_end, is_branch_point = at == reading.end, at in branches
                self.tiers.save(
                    request, live, left.pop(0), is_end=is_end, is_branch_point=is_branch_point
                )
            self.tiers.hold(request, live.position)
            live.materialize()
            request.advance(live.position)
            request.on_progress(live.position, len(tokens))
            yield

    def _step(self, request: Request) -> int:
        """How long the next slice may be, in tokens."""
        whole = request.exact or not self.load.is_shared
        return self.grid.step if whole else self.grid.shared_step
