"""Reading texts in the ways that real serving has, and writing down which experts were chosen.

A router sees other last bits when a prompt is sliced otherwise, when others are read beside it, when
arithmetic is rounder. Each way of reading is given here by numbers, so that any two can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from ..families import MoeLayer
from ..select import Routing, listen

GRID = 512
"""Tokens of a slice where nothing else is said, as the first cuts of the schedule have it."""


@dataclass(frozen=True, slots=True)
class Way:
    """How texts are read."""

    step: int = GRID
    """Tokens of a slice."""
    singly: int = 0
    """The last so many tokens one at a time, as decoding reads them."""
    rows: int = 1
    """Texts at once."""
    rounded: bool = False
    """Whether what enters and leaves each MoE block, and its router's logits, are rounded to bfloat16."""
    noise: float = 0.0
    """Standard deviation of what is added to each of a token's router logits, relative to the spread
    (standard deviation) of these. It depends on position, length and rows of the slice in which the token
    is read and on nothing else, as the rounding of a GPU's kernels does; every expert has its own."""

    def slices(self, length: int) -> list[tuple[int, int]]:
        """`[a, b)` of every forward over `length` tokens."""
        whole = length - min(self.singly, length)
        sliced = [(a, min(a + self.step, whole)) for a in range(0, whole, self.step)]
        return sliced + [(at, at + 1) for at in range(whole, length)]


@dataclass(frozen=True, slots=True)
class Observation:
    """What a model made of one text of T tokens."""

    logits: mx.array | None
    """(T, V), as the model gives them; None where they were not to be kept."""
    likeliest: NDArray[np.integer[Any]]
    """(T,): the likeliest next token at each position."""
    selected: tuple[NDArray[np.integer[Any]], ...]
    """For each MoE layer the experts chosen, (T, k)."""
    reply: tuple[int, ...]
    """The likeliest tokens that follow."""


def read(
    model: Any,
    layers: Sequence[MoeLayer],
    texts: Sequence[Sequence[int]],
    way: Way,
    *,
    reply_tokens: int = 0,
    on_routing: Callable[[Routing], None] = lambda routing: None,
) -> list[Observation]:
    """Read `texts`, all of one length, from empty caches; go on greedily for `reply_tokens`.

    Texts are read `way.rows` at once, the last ones together with the first again where they are too few.
    `on_routing` hears of every forward over them, not of the reply's.
    """
    found: list[Observation] = []
    for start in range(0, len(texts), way.rows):
        part = [list(texts[(start + row) % len(texts)]) for row in range(way.rows)]
        found += _Together(model, layers, way, on_routing).read(part, reply_tokens)
    return found[: len(texts)]


@dataclass(slots=True)
class _Together:
    """Texts that share each forward."""

    model: Any
    layers: Sequence[MoeLayer]
    way: Way
    on_routing: Callable[[Routing], None]
    at: int = 0
    rows: int = 0
    is_reply: bool = False
    chosen: dict[int, list[NDArray[np.integer[Any]]]] = field(default_factory=dict)

    def read(self, texts: list[list[int]], reply_tokens: int) -> list[Observation]:
        tokens, self.rows = mx.array(texts), len(texts)
        caches = make_prompt_cache(self.model)
        changes: dict[str, Any] = {}
        if self.way.noise or self.way.rounded:
            changes["logits"] = self._logits
        if self.way.rounded:
            changes["block"] = lambda layer, run, x: _rounded(run(_rounded(x)))
        with listen(self.layers, self._hear, **changes):
            slices = self.way.slices(tokens.shape[1])
            parts = [self._forward(caches, a, tokens[:, a:b]) for a, b in slices]
            reply = self._write(caches, tokens.shape[1], parts[-1][:, -1:], reply_tokens)
        logits = mx.concatenate(parts, axis=1)
        likeliest = np.array(logits.argmax(axis=-1))
        selected = [np.concatenate(self.chosen[layer.index], axis=1) for layer in self.layers]
        return [
            Observation(
                logits[row],
                likeliest[row],
                tuple(each[row] for each in selected),
                tuple(reply[row]),
            )
            for row in range(self.rows)
        ]

    def _forward(self, caches: list[Any], at: int, tokens: mx.array) -> mx.array:
        self.at = at
        logits: mx.array = self.model(tokens, cache=caches)
        mx.eval(logits, [cache.state for cache in caches])
        return logits

    def _write(
        self, caches: list[Any], at: int, last: mx.array, reply_tokens: int
    ) -> list[list[int]]:
        """The likeliest tokens, one at a time, for each row."""
        self.is_reply = True
        written: list[list[int]] = [[] for _ in range(self.rows)]
        for step in range(reply_tokens):
            likeliest = last.argmax(axis=-1)
            for row, token in zip(written, np.array(likeliest[:, 0]), strict=True):
                row.append(int(token))
            if step + 1 < reply_tokens:
                last = self._forward(caches, at + step, likeliest)
        return written

    def _hear(self, routing: Routing) -> None:
        if self.is_reply:
            return
        chosen = np.array(routing.chosen).reshape(self.rows, -1, routing.chosen.shape[-1])
        self.chosen.setdefault(routing.layer.index, []).append(chosen)
        self.on_routing(routing)

    def _logits(self, layer: MoeLayer, logits: mx.array) -> mx.array:
        if self.way.noise:
            spread = logits.astype(mx.float32).std(axis=-1, keepdims=True)
            length = logits.size // (logits.shape[-1] * self.rows)
            key = mx.random.key(_seed(layer.index, self.at, length, self.rows))
            noise = mx.random.normal(logits.shape, key=key)
            logits = logits + (self.way.noise * spread * noise).astype(logits.dtype)
        return _rounded(logits) if self.way.rounded else logits


def _rounded(array: mx.array) -> mx.array:
    return array.astype(mx.bfloat16).astype(array.dtype)


def _seed(*numbers: int) -> int:
    """One number of several, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
