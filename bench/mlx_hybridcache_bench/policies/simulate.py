"""A trace replayed through the library's tiers, schedule, replay and policy, with a model of sizes only.

Requests come one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar, cast

from mlx_hybridcache.caches.layout import Layout
from mlx_hybridcache.caches.memory import MemoryStore
from mlx_hybridcache.errors import BudgetError
from mlx_hybridcache.prefill.prefill import Prefill
from mlx_hybridcache.prefill.replay import Route, route_of
from mlx_hybridcache.prefill.schedule import Grid, Reading
from mlx_hybridcache.request.request import Account
from mlx_hybridcache.request.sharing import Sharing
from mlx_hybridcache.store.eviction.policy import Weights, weights
from mlx_hybridcache.store.eviction.values import Weigh
from mlx_hybridcache.store.store import Store
from mlx_hybridcache.tokens import Namespace, Tokens, TurnMarks
from mlx_hybridcache.worker.turns import Load

from .sized import Shape, SizedLayout, SizedModel, SizedRequest, SizedTiers
from .traces import TracedRequest

SPACE = Namespace("trace")
GRID = Grid()
COARSE = 8192

RouteOf = Callable[..., Route]
"""As `mlx_hybridcache.prefill.replay.route_of`."""

T = TypeVar("T")


def recency(*_: int) -> Weights:
    """Least recently used goes first, and nothing else counts."""
    return Weights(1.0, 0.0, 0.0)


def coarse_route(layout: Layout, grid: Grid, reading: Reading, *, exact: bool) -> Route:
    """Checkpoints every 8,192 tokens and at the prompt's end."""
    wanted = {*range(COARSE, reading.end, COARSE), reading.end}
    cuts = tuple(sorted(cut for cut in wanted if cut > reading.start))
    return Route(reading.start, reading.end, cuts, must_pause=False, cuts_every_slice=False)


class Marks:
    """Where turns start in the request that is served, as its trace says."""

    def __init__(self) -> None:
        self.turns: tuple[int, ...] = ()

    def starts(self, tokens: Tokens) -> tuple[int, ...]:
        """As `TurnMarks.starts`."""
        return self.turns


class Simulation:
    """Both tiers' code over one memory of a budget, through which a trace is replayed."""

    def __init__(
        self,
        trace: Sequence[TracedRequest],
        shape: Shape,
        budget_bytes: int,
        *,
        weigh: Weigh = weights,
        route: RouteOf = route_of,
    ) -> None:
        self.trace = trace
        self.store: MemoryStore = Store(budget_bytes, needs_checkpoints=True, weigh=weigh)
        self.account = Account()  # of the last request
        layout, model = SizedLayout.of_shape(shape), SizedModel()
        sharing = Sharing("trace", layout, GRID.step, GRID.every, exact=False)
        self._tiers = SizedTiers(model, layout, sharing, self.store)
        self._marks = Marks()
        marks = cast("TurnMarks", self._marks)
        self._prefill = Prefill(model, layout, GRID, marks, self._tiers, Load(), route)

    def serve(self, index: int) -> int:
        """Request `index` of the trace, as the engine treats it; returns the tokens replayed."""
        asked = self.trace[index]
        request = SizedRequest(asked.tokens, SPACE, asked.reply_tokens)
        self.account, self._marks.turns = request.account, tuple(asked.turns)
        live = self._tiers.live(request)
        try:
            found = _last(self._tiers.resume(request, live))
            for _ in self._prefill.read(request, live, found):
                pass  # nobody else has a turn
            if asked.keeps_reply:
                live.caches[0].position = len(asked.history)
                self._tiers.save_end(request, live, asked.history)
        except BudgetError:
            return len(asked.tokens)  # served by nobody at this budget, counted as read in full
        finally:
            live.release()
        return len(asked.tokens) - found.position


def _last(turns: Generator[Any, None, T]) -> T:
    """What they return, nobody else having a turn."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return cast("T", end.value)
