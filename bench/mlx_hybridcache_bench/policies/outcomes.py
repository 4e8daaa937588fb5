"""Each policy on one trace, and the figures that were promised of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from ..kit.tables import Figure
from .baselines import LlamaCpp, MlxLm, Overlaps
from .offline import Clairvoyant, Knows, floor
from .simulate import Simulation, coarse_route, recency
from .sized import Shape
from .traces import TracedRequest, summary

OURS, LRU, GRID, MLX_LM, LLAMA_CPP = "ours", "lru", "grid-8192", "mlx_lm.server", "llama.cpp"
OFFLINE, UNORDERED, PLACES = "clairvoyant", "what, not when", "where, not what"
BASELINES = (LRU, GRID, MLX_LM, LLAMA_CPP)
ONLINE = (OURS, *BASELINES)
BOUNDED = ("agents", "chats")
TARGET_OFFLINE = 1.25


class Server(Protocol):
    """Something that a trace is replayed through."""

    def serve(self, index: int) -> int:
        """Request `index` of its trace; returns the tokens replayed."""
        ...


Policy = Callable[[Sequence[TracedRequest], Overlaps, Shape, int], Server]

POLICIES: dict[str, Policy] = {
    OURS: lambda trace, _, shape, budget: Simulation(trace, shape, budget),
    LRU: lambda trace, _, shape, budget: Simulation(trace, shape, budget, weigh=recency),
    GRID: lambda trace, _, shape, budget: Simulation(
        trace, shape, budget, weigh=recency, route=coarse_route
    ),
    MLX_LM: MlxLm,
    LLAMA_CPP: LlamaCpp,
    OFFLINE: Clairvoyant,
    UNORDERED: partial(Clairvoyant, knows=Knows.UNORDERED),
    PLACES: partial(Clairvoyant, knows=Knows.PLACES),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Tokens replayed on one trace: by policy, one number for each budget."""

    trace: str
    shape: str
    budgets: tuple[int, ...]
    prompt_tokens: int
    floor_tokens: int
    replayed: dict[str, tuple[int, ...]]

    def best_baseline(self, at: int) -> tuple[str, int]:
        """The baseline that replays fewest at budget number `at`, and how many."""
        return min(((name, self.replayed[name][at]) for name in BASELINES), key=lambda x: x[1])

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "trace": self.trace,
            "shape": self.shape,
            "budget_bytes": list(self.budgets),
            "prompt_tokens": self.prompt_tokens,
            "floor_tokens": self.floor_tokens,
            "replayed_tokens": {name: list(each) for name, each in self.replayed.items()},
        }


def measure(
    name: str, trace: Sequence[TracedRequest], shape: Shape, budgets: Sequence[int]
) -> Outcome:
    """Replay a trace with every policy at every budget."""
    overlaps = Overlaps(trace)
    replayed = {
        policy: tuple(
            sum(map(make(trace, overlaps, shape, budget).serve, range(len(trace))))
            for budget in budgets
        )
        for policy, make in POLICIES.items()
    }
    tokens = summary(trace)["prompt_tokens"]
    return Outcome(name, shape.name, tuple(budgets), tokens, floor(trace, overlaps), replayed)


def figures(outcomes: Sequence[Outcome]) -> list[Figure]:
    """The promised ones."""
    beaten = [
        (outcome.replayed[OURS][at], outcome.best_baseline(at)[1])
        for outcome in outcomes
        for at in range(len(outcome.budgets))
    ]
    bounded = [
        outcome.replayed[OURS][at] / outcome.replayed[OFFLINE][at]
        for outcome in outcomes
        if outcome.trace.partition("-seed-")[0] in BOUNDED
        for at in range(len(outcome.budgets))
    ]
    found = [
        Figure("places where a baseline replays fewer", sum(a > b for a, b in beaten), "", 0, True),
        Figure(
            "worst place, ours / least recently used",
            max(
                a / b
                for outcome in outcomes
                for a, b in zip(outcome.replayed[OURS], outcome.replayed[LRU], strict=True)
            ),
            "x",
            1.02,
            True,
        ),
    ]
    if bounded:
        found.append(
            Figure("agents and chats, ours / clairvoyant", max(bounded), "x", TARGET_OFFLINE, True)
        )
    return found
