"""What a full store costs the worker for each request, by how much it holds.

A store is filled with payloads that only have sizes, in one of three shapes, and is full then: what comes
next must push something out. Times are the thread's own CPU time, so that a busy machine hardly shows.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from rich.console import Console

from mlx_hybridcache.store.store import Store
from mlx_hybridcache.tokens import Namespace, Tokens

from ..kit.tables import Figure, show
from ..policies.sized import SizedCheckpoint, SizedRows

SIZES = (100, 1_000, 10_000, 50_000)
ROW_BYTES, STATE_BYTES = 1_000, 100_000
RUN_TOKENS = 32
SYSTEM_TOKENS = 100
DEEP = 25
LONGEST = 2_000
TURNED_OVER = 20
TARGET_SIZE, TARGET_RATIO, TARGET_SAVE_MS = 10_000, 1.5, 3.8
SPACE = Namespace("bench")

SizedStore: TypeAlias = Store[SizedRows, SizedCheckpoint]

Spent = list[float]


@dataclass(frozen=True, slots=True)
class Filled:
    """One store with so many nodes. Milliseconds of the thread's time for each call, of every round."""

    shape: str
    nodes: int
    publish_ms: Spent = field(default_factory=list)
    save_ms: Spent = field(default_factory=list)
    afford_ms: Spent = field(default_factory=list)
    evictions: list[int] = field(default_factory=list)

    def calls(self) -> dict[str, Spent]:
        """By their names."""
        return {
            "publish": self.publish_ms,
            "evicting save": self.save_ms,
            "afford": self.afford_ms,
        }

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "shape": self.shape,
            "nodes": self.nodes,
            "rounds": len(self.save_ms),
            "evictions_per_round": statistics.mean(self.evictions),
            "ms": {name: _quartiles(spent) for name, spent in self.calls().items()},
        }


@dataclass(frozen=True, slots=True)
class Stored:
    """All stores that were measured."""

    stores: tuple[Filled, ...]

    def figures(self) -> list[Figure]:
        """The promised ones: what is stored does not show in what a call costs."""
        by_size = {(each.shape, each.nodes): each for each in self.stores}
        found = []
        for shape in ("flat", "deep"):
            few, many = by_size.get((shape, SIZES[0])), by_size.get((shape, TARGET_SIZE))
            if few is None or many is None:
                continue
            for name, spent in many.calls().items():
                ratio = statistics.median(spent) / statistics.median(few.calls()[name])
                title = f"{shape}: {name} at {TARGET_SIZE:,} nodes / at {SIZES[0]}"
                found.append(Figure(title, ratio, "x", TARGET_RATIO, False))
            title = f"{shape}: evicting save at {TARGET_SIZE:,} nodes"
            ms = statistics.median(many.save_ms)
            found.append(Figure(title, ms, "ms", TARGET_SAVE_MS, False))
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"stores": [each.as_json() for each in self.stores]}

    def show(self, console: Console) -> None:
        """Print it."""
        show(
            console,
            "A full store: thread CPU in ms a call, median (quartiles)",
            ("shape", "nodes", "publish", "evicting save", "afford", "evicted a round"),
            [
                (
                    each.shape,
                    f"{each.nodes:,}",
                    *(
                        "{1:.3f} ({0:.3f} to {2:.3f})".format(*_quartiles(spent))
                        for spent in each.calls().values()
                    ),
                    f"{statistics.mean(each.evictions):.1f}",
                )
                for each in self.stores
            ],
        )


def measure_stored(sizes: Sequence[int], *, rounds: int, seed: int = 1162) -> Stored:
    """Fill stores of every shape with so many nodes, and measure `rounds` requests to each."""
    return Stored(
        tuple(
            _measured(shape, size, rounds, seed)
            for shape in SHAPES
            for size in sizes
            if shape != "one path" or size <= LONGEST
        )
    )


def _measured(shape: str, size: int, rounds: int, seed: int) -> Filled:
    """A small store is filled anew before what comes has taken the place of what was there."""
    draw, generator = random.Random(seed), np.random.default_rng(seed)
    filled = Filled(shape, size)
    while left := rounds - len(filled.save_ms):
        store, last = _full(shape, size, generator)
        for _ in range(min(left, max(1, size // TURNED_OVER))):
            goes_on = last[0] if shape == "flat" else draw.choice(last)
            begins = SYSTEM_TOKENS if shape == "flat" else len(goes_on)
            prompt, other = (_on(generator, goes_on[:begins]) for _ in range(2))
            _measure(store, prompt, other, filled)
    return filled


def _full(shape: str, size: int, generator: np.random.Generator) -> tuple[SizedStore, list[Tokens]]:
    """A store that is full, and the ends of its conversations; the first is the system prompt if flat."""
    store: SizedStore = Store(1 << 50, needs_checkpoints=True)
    last: list[Tokens] = []
    for prompt in SHAPES[shape](generator, size):
        store.tick()
        _save(store, prompt)
        if last and len(last[-1]) < len(prompt) and shape != "flat":
            last[-1] = prompt
        else:
            last.append(prompt)
    store.shrink(1)
    _publish(store)
    store.budget.limit(store.budget.used_bytes)
    gc.collect()
    return store, last


def _measure(store: SizedStore, prompt: Tokens, other: Tokens, filled: Filled) -> None:
    before = store.evictions
    store.tick()
    filled.save_ms.append(_spent(partial(_save, store, prompt)))
    filled.evictions.append(store.evictions - before)
    filled.publish_ms.append(_spent(partial(_publish, store)))
    cuts: list[int] = []
    filled.afford_ms.append(_spent(partial(_afford, store, other, cuts)))
    for cut in cuts:  # it is full again
        _save(store, other[:cut])
    _publish(store)


def _flat(generator: np.random.Generator, size: int) -> Iterator[Tokens]:
    """Short conversations behind one system prompt."""
    system = _on(generator, np.empty(0, np.int32), SYSTEM_TOKENS)
    yield system
    for _ in range(size - 1):
        yield _on(generator, system)


def _deep(generator: np.random.Generator, size: int) -> Iterator[Tokens]:
    """Conversations of twenty-five checkpoints each."""
    for _ in range(size // DEEP):
        yield from _one_path(generator, DEEP)


def _one_path(generator: np.random.Generator, size: int) -> Iterator[Tokens]:
    """One conversation of so many checkpoints."""
    whole = _on(generator, np.empty(0, np.int32), size * RUN_TOKENS)
    for end in range(RUN_TOKENS, len(whole) + 1, RUN_TOKENS):
        yield whole[:end]


SHAPES: dict[str, Callable[[np.random.Generator, int], Iterator[Tokens]]] = {
    "flat": _flat,
    "deep": _deep,
    "one path": _one_path,
}


def _on(generator: np.random.Generator, prompt: Tokens, tokens: int = RUN_TOKENS) -> Tokens:
    more = generator.integers(0, 1 << 30, tokens, dtype=np.int32)
    return np.concatenate([prompt, more])


def _save(store: SizedStore, prompt: Tokens) -> None:
    end = len(prompt)
    is_stored = store.save(
        SPACE,
        prompt,
        lambda start: SizedRows(start, end, ROW_BYTES),
        SizedCheckpoint(end, STATE_BYTES),
        rows_nbytes=_weigh,
        is_end=True,
    )
    assert is_stored


def _weigh(start: int, end: int) -> int:
    return (end - start) * ROW_BYTES


def _afford(store: SizedStore, prompt: Tokens, kept: list[int]) -> None:
    cuts = [len(prompt) - RUN_TOKENS // 2, len(prompt) - 1]
    kept += store.afford(
        SPACE, prompt, cuts, branch_points=(), rows_nbytes=_weigh, snapshot_bytes=STATE_BYTES
    )


def _publish(store: SizedStore) -> None:
    store.stats()
    store.outlines(0.0)


def _spent(call: Callable[[], object]) -> float:
    began = time.thread_time()
    call()
    return 1e3 * (time.thread_time() - began)


def _quartiles(spent: Spent) -> list[float]:
    return [float(x) for x in np.quantile(spent, [0.25, 0.5, 0.75])]
