"""Two ways of doing one thing, measured in turns, so that a busy machine is unfair to neither."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Spent:
    """What one call took. Seconds of wall clock, and of processor time over all threads.

    Processor time does not grow while other programs hold the cores, so it is the steadier of the
    two on a shared machine. On a GPU it says little.
    """

    wall_seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Paired:
    """Measurements of two ways, `a` (the reference) and `b`, pair by pair."""

    a: tuple[Spent, ...]
    b: tuple[Spent, ...]

    @property
    def a_seconds(self) -> float:
        """Median wall clock of the reference."""
        return statistics.median(spent.wall_seconds for spent in self.a)

    @property
    def b_seconds(self) -> float:
        """Median wall clock of the other."""
        return statistics.median(spent.wall_seconds for spent in self.b)

    @property
    def ratios(self) -> list[float]:
        """`b / a` of each pair, wall clock."""
        pairs = zip(self.a, self.b, strict=True)
        return [b.wall_seconds / a.wall_seconds for a, b in pairs]

    @property
    def ratio(self) -> float:
        """The median of the pairs' ratios, wall clock."""
        return statistics.median(self.ratios)

    @property
    def cpu_ratio(self) -> float:
        """The median of the pairs' ratios, processor time."""
        pairs = zip(self.a, self.b, strict=True)
        return statistics.median(b.cpu_seconds / max(a.cpu_seconds, 1e-9) for a, b in pairs)

    def as_json(self) -> dict[str, Any]:
        """Plain values: seconds and ratios, with the spread of the pairs."""
        return {
            "pairs": len(self.a),
            "a_seconds": self.a_seconds,
            "b_seconds": self.b_seconds,
            "ratio": self.ratio,
            "ratio_min": min(self.ratios),
            "ratio_max": max(self.ratios),
            "cpu_ratio": self.cpu_ratio,
            "a_wall_seconds": [spent.wall_seconds for spent in self.a],
            "b_wall_seconds": [spent.wall_seconds for spent in self.b],
        }


def measure(
    a: Callable[[], object],
    b: Callable[[], object],
    *,
    pairs: int,
    warm_up: int = 1,
    prepare_a: Callable[[], object] = lambda: None,
    prepare_b: Callable[[], object] = lambda: None,
) -> Paired:
    """Call `a` and `b` in turns, a b, b a, a b, and so on, after `warm_up` unmeasured pairs.

    `prepare_a` and `prepare_b` run before each call and are not measured, nor is the release of
    what the calls return.
    """
    spent_a: list[Spent] = []
    spent_b: list[Spent] = []
    for turn in range(warm_up + pairs):
        ways = [(a, prepare_a, spent_a), (b, prepare_b, spent_b)]
        for call, prepare, spent in ways if turn % 2 == 0 else reversed(ways):
            prepare()
            spent.append(timed(call)[0])
    return Paired(tuple(spent_a[warm_up:]), tuple(spent_b[warm_up:]))


def timed(call: Callable[[], object]) -> tuple[Spent, object]:
    """What one call took and returned."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu), result


def copied(arrays: Sequence[mx.array]) -> list[mx.array]:
    """One plain copy of each, made."""
    copies = [mx.array(each) for each in arrays]
    mx.eval(copies)
    return copies


def tidy() -> None:
    """Give memory that is no longer used back to the system, so that both ways start alike.

    Otherwise whichever frees what it made writes into warm pages the next time, and whichever keeps
    it waits for the system to hand out new ones: a difference of 6 x that says nothing about either.
    """
    gc.collect()
    mx.clear_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others need none
    if trim is not None:
        trim(0)
