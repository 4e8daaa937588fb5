"""Forwards, counted: how long the slices are in which prompts are read.

A short forward costs a large MoE nearly as much as a full one, which no CPU shows, so forwards are
counted instead of timed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from rich.console import Console

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.tokens import TurnMarks

from ..kit.models import smallest_qwen3_next
from ..kit.tables import Figure, show

OPENER, WORDS = 255, 255
"""The token that opens a turn, and how many others there are."""

EXTRA = {("cold", True): 2, ("hot", True): 2, ("cold", False): 8, ("hot", False): 5}
"""Forwards allowed beyond one per step, by run and by whether there is a capture hook."""


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt read. `lengths` are tokens per forward, in order, the last token's included."""

    name: str
    hook: bool
    turns: int
    prompt_tokens: int
    replayed_tokens: int
    step: int
    lengths: tuple[int, ...]

    @property
    def bound(self) -> int:
        """The most forwards that this run may take."""
        return -(-self.replayed_tokens // self.step) + EXTRA[self.name, self.hook]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "run": self.name,
            "hook": self.hook,
            "turn_tokens": self.turns,
            "prompt_tokens": self.prompt_tokens,
            "replayed_tokens": self.replayed_tokens,
            "forwards": len(self.lengths),
            "bound": self.bound,
            "lengths": dict(sorted(Counter(self.lengths).items())),
        }


@dataclass(frozen=True, slots=True)
class Slices:
    """All runs."""

    step: int
    runs: tuple[Run, ...]

    def figures(self) -> list[Figure]:
        """The promised one."""
        beyond = max(len(run.lengths) - run.bound for run in self.runs)
        return [Figure("forwards beyond the bound", max(0, beyond), "", 0, True)]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"step": self.step, "runs": [run.as_json() for run in self.runs]}

    def show(self, console: Console) -> None:
        """Print the histogram, one run a line."""
        edges = sorted({1, 64, self.step // 4, self.step - 1, self.step})
        starts = [1, *(edge + 1 for edge in edges[:-1])]
        heads = [
            f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in zip(starts, edges, strict=True)
        ]
        show(
            console,
            f"Forwards by slice length (tokens), step {self.step:,}",
            ("run", "turns", "replayed", "forwards", "bound", *heads),
            [
                (
                    f"{run.name}, {'hook' if run.hook else 'pausing'}",
                    f"{run.turns:,}",
                    f"{run.replayed_tokens:,}",
                    str(len(run.lengths)),
                    str(run.bound),
                    *(
                        str(sum(a <= length <= b for length in run.lengths) or "")
                        for a, b in zip(starts, edges, strict=True)
                    ),
                )
                for run in self.runs
            ],
        )


def measure_slices(*, tokens: int, step: int = 2048, seed: int = 1162) -> Slices:
    """Read prompts of `tokens` without, with a few and with thousands of turn tokens."""
    model = smallest_qwen3_next()
    generator = random.Random(seed)
    runs: list[Run] = []
    for hook in (True, False):
        for turns in (0, 6, tokens // 3):
            prompt = _prompt(generator, tokens, turns)
            # The same conversation with its last third rewritten: shared, contradicted, replayed.
            changed = prompt[: 2 * tokens // 3] + _prompt(generator, tokens // 3 + 1, turns // 3)
            with HybridPromptCache(model, memory_budget="4GiB", prefill_step_size=step) as cache:
                if not hook:
                    cache.engine.prefill.layout = replace(cache.engine.layout, hook=None)
                cache.engine.prefill.marks = TurnMarks(openers=frozenset({OPENER}))
                for name, each in (("cold", prompt), ("hot", changed)):
                    runs.append(_run(model, cache, name, each, hook=hook))
    return Slices(step, tuple(runs))


def _prompt(generator: random.Random, tokens: int, turns: int) -> list[int]:
    prompt = [generator.randrange(WORDS) for _ in range(tokens)]
    for turn in range(turns):
        prompt[turn * tokens // turns] = OPENER
    return prompt


def _run(model: Any, cache: HybridPromptCache, name: str, prompt: list[int], *, hook: bool) -> Run:
    with forwards_of(model) as lengths:
        ready = cache.prefill(prompt, max_tokens=1)
        mx.eval(model(mx.array(ready.rest)[None], cache=ready.prompt_cache))
    assert len(lengths) == ready.report.forwards + 1, "the report counts every forward"
    ready.release()
    return Run(
        name=name,
        hook=hook,
        turns=prompt.count(OPENER),
        prompt_tokens=len(prompt),
        replayed_tokens=ready.report.replayed_tokens,
        step=cache.engine.prefill.grid.step,
        lengths=tuple(lengths),
    )


@contextmanager
def forwards_of(model: Any) -> Iterator[list[int]]:
    """The lengths of the model's forwards, as they happen."""
    lengths: list[int] = []
    original = type(model)

    def counted(self: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
        lengths.append(inputs.shape[1])
        return original.__call__(self, inputs, *args, **kwargs)

    object.__setattr__(
        model, "__class__", type(original.__name__, (original,), {"__call__": counted})
    )
    try:
        yield lengths
    finally:
        object.__setattr__(model, "__class__", original)
