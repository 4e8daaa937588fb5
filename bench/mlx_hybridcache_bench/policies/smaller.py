"""How many conversations a smaller store holds in the budget of a full one, and how many it can.

Each trace is replayed twice through the library's tiers: with rows and states as they are computed, and with rows
of 8 or 4 bits and states of int8. A conversation is held while the last prompt that it asked would be restored nearly
whole. What cannot be passed follows from the shapes: the contents of the full store, its rows and its checkpoints,
weigh so much less in a smaller one, and a request that runs is full in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from rich.console import Console

from mlx_hybridcache.caches.kinds.smaller import StorePrecision
from mlx_hybridcache.tokens import Tokens

from ..kit.tables import Figure, show
from .simulate import SPACE, Simulation
from .sized import Shape
from .traces import TracedRequest

TRACES = ("agents", "chats")
BUDGETS = ("2GB", "4GB")

NEARLY = 0.9
"""The part of a prompt that is restored where its conversation is held."""

EVERY = 10
"""Requests between two counts."""

TARGET = 2.5
"""Times as many conversations as were promised of 8 bits."""


@dataclass(frozen=True, slots=True)
class Held:
    """What one store held, on average over a trace, and the tokens that were replayed."""

    conversations: float
    tokens: float
    checkpoints: float
    replayed: int


@dataclass(frozen=True, slots=True)
class Smaller:
    """One trace at one budget, with a full store and with a smaller one."""

    trace: str
    budget_bytes: int
    shape: Shape
    full: Held
    small: Held

    @property
    def ratio(self) -> float:
        """Conversations in the smaller store for one in the full one."""
        return self.small.conversations / self.full.conversations

    @property
    def same_contents(self) -> float:
        """What the full store held, over what that weighs in the smaller one: the most that making small gives."""
        full, shape = self.full, self.shape
        rows, states = full.tokens, full.checkpoints
        small = rows * shape.stored_row_bytes + states * shape.stored_checkpoint_bytes
        return (rows * shape.row_bytes + states * shape.checkpoint_bytes) / small

    def figure(self) -> Figure:
        """What was promised: the smaller, the better, so it is the share of a budget."""
        name = f"{self.trace}, {self.budget_bytes / 1e9:g} GB: conversations, full / smaller"
        return Figure(name, 1 / self.ratio, "x", 1 / TARGET, True)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "trace": self.trace,
            "budget_bytes": self.budget_bytes,
            "conversations": [self.full.conversations, self.small.conversations],
            "tokens": [self.full.tokens, self.small.tokens],
            "checkpoints": [self.full.checkpoints, self.small.checkpoints],
            "replayed_tokens": [self.full.replayed, self.small.replayed],
            "ratio": self.ratio,
            "same_contents": self.same_contents,
        }


def tokens_for(shape: Shape, times: float) -> float | None:
    """A checkpoint for each so many tokens, or more densely, weighs a `times`-th in a smaller store; None: however."""
    states = shape.checkpoint_bytes - times * shape.stored_checkpoint_bytes
    rows = times * shape.stored_row_bytes - shape.row_bytes
    return states / rows if rows > 0 else None


def joined(seeds: Iterable[Sequence[TracedRequest]]) -> list[TracedRequest]:
    """Traces one after another, whose conversations are others: so that more of them are there than fit."""
    return [
        replace(asked, conversation=f"{number}-{asked.conversation}")
        for number, trace in enumerate(seeds)
        for asked in trace
    ]


def measure(
    name: str,
    trace: Sequence[TracedRequest],
    shape: Shape,
    storing: StorePrecision,
    budget_bytes: int,
) -> Smaller:
    """Replay a trace with either store."""
    small = shape.smaller(storing)
    held = [replayed(trace, each, budget_bytes) for each in (shape, small)]
    return Smaller(name, budget_bytes, small, *held)


def replayed(trace: Sequence[TracedRequest], shape: Shape, budget_bytes: int) -> Held:
    """What the store holds at every tenth request of a trace, but for the sixth in which it is filled."""
    simulation = Simulation(trace, shape, budget_bytes)
    last: dict[str | None, Tokens] = {}
    counts: list[tuple[int, int, int]] = []
    total = 0
    for index, asked in enumerate(trace):
        total += simulation.serve(index)
        last[asked.conversation] = asked.tokens
        if index >= len(trace) // 6 and index % EVERY == 0:
            stats = simulation.store.stats()
            counts.append((_held(simulation, last.values()), stats.tokens, stats.checkpoints))
    conversations, tokens, checkpoints = (fmean(each) for each in zip(*counts, strict=True))
    return Held(conversations, tokens, checkpoints, total)


def _held(simulation: Simulation, prompts: Iterable[Tokens]) -> int:
    """Of how many prompts nearly all would be restored."""
    found = ((simulation.store.find(SPACE, tokens).position, len(tokens)) for tokens in prompts)
    return sum(position >= NEARLY * length for position, length in found)


def show_smaller(console: Console, found: Sequence[Smaller], storing: StorePrecision) -> None:
    """A row for each trace and budget, and the arithmetic of the shapes."""
    rows = [
        (
            each.trace,
            f"{each.budget_bytes / 1e9:g} GB",
            f"{each.full.conversations:.1f}",
            f"{each.small.conversations:.1f}",
            f"{each.ratio:.2f} x",
            f"{each.same_contents:.2f} x",
            f"{each.full.tokens / max(1.0, each.full.checkpoints):,.0f}",
            f"{each.full.replayed / 1e3:,.0f}",
            f"{each.small.replayed / 1e3:,.0f}",
        )
        for each in found
    ]
    columns = ("trace", "budget", "full", "smaller", "more", "most", "tokens a checkpoint")
    show(
        console,
        f"Conversations held, with rows of {storing.kv_bits} bits and int8 states; thousands of tokens replayed",
        (*columns, "replayed, full", "smaller"),
        rows,
    )
    for line in arithmetic(found[0].shape):
        console.print(line, highlight=False)


def arithmetic(shape: Shape) -> list[str]:
    """What the shapes alone say of the most that can be held."""
    rows = shape.row_bytes / shape.stored_row_bytes
    states = shape.checkpoint_bytes / shape.stored_checkpoint_bytes
    spaced = tokens_for(shape, TARGET)
    told = "at any distance" if spaced is None else f"every {spaced:,.0f} tokens or nearer"
    weights = (
        f"{shape.name}: a token's rows weigh {shape.row_bytes:,} bytes and {shape.stored_row_bytes:,} (1/{rows:.2f}), "
        f"a checkpoint {shape.checkpoint_bytes:,} and {shape.stored_checkpoint_bytes:,} (1/{states:.2f})."
    )
    most = (
        f"{TARGET:g} x as much fits where checkpoints lie {told}. `most` is what the full store held over what "
        "that weighs in the smaller one; a request that runs is full in both, which lowers it."
    )
    return [weights, most]
