"""What handing over to the disk thread costs the worker thread, at the shapes of a large model.

Everything that the disk tier does on the worker thread for one segment is counted: choosing it, its
keys, the views of its arrays, its place in the queue; and when it is written, what is done about that.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from mlx_hybridcache import HybridPromptCache

from ..kit.paired import tidy
from ..kit.standin import SHAPES, VOCABULARY, StandIn
from ..kit.tables import Figure, show

TARGET_MS = 1.0
FLUSH_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Taken:
    """Of one segment: `wall_seconds` on the worker thread, and `cpu_seconds` that it worked itself.

    What lies between the two it waited for the interpreter, for MLX, or for other programs.
    """

    kind: str
    wall_seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class HandOff:
    """Every segment of all runs."""

    shapes: str
    tokens: int
    handed: tuple[Taken, ...]
    done: tuple[Taken, ...]

    def figures(self) -> list[Figure]:
        """The promised ones."""
        wall = sorted(1000 * each.wall_seconds for each in self.handed)
        cpu = sorted(1000 * each.cpu_seconds for each in self.handed)
        lost = len(self.handed) - len(self.done)
        return [
            Figure("segments handed over and never heard of again", lost, "", 0, True),
            Figure("hand-off, median", _at(wall, 0.5), "ms", TARGET_MS, False),
            Figure("hand-off, 95th percentile", _at(wall, 0.95), "ms", TARGET_MS, False),
            Figure("hand-off, 95th, processor time", _at(cpu, 0.95), "ms", TARGET_MS, False),
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "shapes": self.shapes,
            "tokens": self.tokens,
            "segments": len(self.handed),
            "handed": [_plain(each) for each in self.handed],
            "done": [_plain(each) for each in self.done],
        }

    def show(self, console: Console) -> None:
        """Print it."""
        rows = []
        for title, taken in (("handed over", self.handed), ("when written", self.done)):
            for kind in ("rows", "state"):
                of_kind = [each for each in taken if each.kind == kind]
                wall = sorted(1000 * each.wall_seconds for each in of_kind)
                cpu = sorted(1000 * each.cpu_seconds for each in of_kind)
                if of_kind:
                    rows.append(
                        (
                            f"{kind} {title}",
                            str(len(of_kind)),
                            *(f"{_at(wall, part):.2f}" for part in (0.5, 0.95, 1.0)),
                            *(f"{_at(cpu, part):.2f}" for part in (0.5, 0.95, 1.0)),
                        )
                    )
        show(
            console,
            f"The worker thread, milliseconds per segment: {self.shapes} shapes, "
            f"prompts of {self.tokens:,} tokens",
            ("", "segments", "median", "95th", "max", "cpu median", "95th", "max"),
            rows,
        )


def _at(ordered: list[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def _plain(taken: Taken) -> dict[str, Any]:
    return {
        "kind": taken.kind,
        "wall_seconds": taken.wall_seconds,
        "cpu_seconds": taken.cpu_seconds,
    }


def measure_handoff(shapes: str, tokens: int, *, runs: int, seed: int = 1162) -> HandOff:
    """`runs` prompts, each read cold into a cache that writes them behind, after one unmeasured."""
    generator = random.Random(seed)
    with (
        tempfile.TemporaryDirectory() as directory,
        HybridPromptCache(
            StandIn(SHAPES[shapes]), memory_budget="1TiB", cache_dir=directory
        ) as cache,
    ):
        clock = _Clock(cache.engine.tiers.disk)
        for number in range(1 + runs):
            prompt = [generator.randrange(VOCABULARY) for _ in range(tokens)]
            cache.prefill(prompt).release()
            assert cache.flush(FLUSH_SECONDS), "the disk is too slow for this measurement"
            if number == 0:
                clock.handed.clear()
                clock.done.clear()
            cache.clear()
            tidy()
    return HandOff(shapes, tokens, tuple(clock.handed), tuple(clock.done))


class _Clock:
    """Measures a disk tier from within: it stands around what the worker thread calls there.

    Handing over happens within being done with another one, so what lies inside is taken off.
    """

    def __init__(self, tier: Any) -> None:
        self.handed: list[Taken] = []
        self.done: list[Taken] = []
        self._pending = (0.0, 0.0)
        self._inside = (0.0, 0.0)
        self._kind = ""
        writes = tier.write_behind
        writes.next_due = self._around(writes.next_due)
        writes.hand_over = self._around(writes.hand_over)
        self._write = tier.thread.write
        tier.thread.write = self._written

    def _around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begun = _now()
            try:
                return call(*args)
            finally:
                spent = _since(begun)
                self._pending = _sum(self._pending, spent)
                self._inside = _sum(self._inside, spent)
                if self._kind:
                    self.handed.append(Taken(self._kind, *self._pending))
                    self._pending, self._kind = (0.0, 0.0), ""

        return timed

    def _written(self, transfer: Any, *args: Any, **options: Any) -> None:
        """A segment goes: this is within a hand-over."""
        kind, done = transfer.parts[0][0].kind, transfer.done
        self._kind = kind

        def timed(transfer: Any) -> None:
            self._inside = (0.0, 0.0)
            begun = _now()
            done(transfer)
            wall, cpu = _since(begun)
            self.done.append(Taken(kind, wall - self._inside[0], cpu - self._inside[1]))

        transfer.done = timed
        self._write(transfer, *args, **options)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


def _since(begun: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = _now()
    return wall - begun[0], cpu - begun[1]


def _sum(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] + b[0], a[1] + b[1]
