"""Reading texts in the ways that real serving has, and writing down which experts were chosen.

A router sees other last bits when a prompt is sliced otherwise, when others are read beside it, when
arithmetic is rounder. Each way of reading is given here by numbers, so that any two can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

GRID = 512
"""Tokens of a slice where nothing else is said, as the first cuts of the schedule have it."""


class Routed(Protocol):
    """What is known of one MoE layer: the module that holds the rows and the one that runs experts."""

    @property
    def router(self) -> Any: ...
    @property
    def experts(self) -> Any: ...


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
    """Whether the hidden stream between layers, and the router's logits, are rounded to bfloat16."""
    noise: float = 0.0
    """Standard deviation of what is added to each of a token's router logits, relative to the spread
    (standard deviation) of these. It depends on position, length and rows of the slice in which the token
    is read and on nothing else, as the rounding of a GPU's kernels does; every expert has its own."""

    def slices(self, length: int) -> list[tuple[int, int]]:
        """`[a, b)` of every forward over `length` tokens."""
        singly = min(self.singly, length)
        whole = length - singly
        sliced = [(a, min(a + self.step, whole)) for a in range(0, whole, self.step)]
        return sliced + [(at, at + 1) for at in range(whole, length)]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model made of one text of T tokens."""

    logits: mx.array
    """(T, V), as the model gives them."""
    selected: tuple[NDArray[np.integer[Any]], ...]
    """For each MoE layer the experts chosen, (T, k)."""
    reply: tuple[int, ...]
    """The likeliest tokens that follow."""

    @property
    def likeliest(self) -> NDArray[np.integer[Any]]:
        """(T,): the likeliest next token at each position."""
        return np.array(self.logits.argmax(axis=-1))


def read(
    model: Any,
    routed: Sequence[Routed],
    texts: Sequence[Sequence[int]],
    way: Way,
    *,
    reply_tokens: int = 0,
) -> list[Reading]:
    """Read `texts`, all of one length, from empty caches; go on greedily for `reply_tokens`.

    Texts are read `way.rows` at once, the last ones together with the first again where they are too few.
    """
    found: list[Reading] = []
    for start in range(0, len(texts), way.rows):
        part = [texts[(start + row) % len(texts)] for row in range(way.rows)]
        found += _read_together(model, routed, part, way, reply_tokens)
    return found[: len(texts)]


def _read_together(
    model: Any,
    routed: Sequence[Routed],
    texts: Sequence[Sequence[int]],
    way: Way,
    reply_tokens: int,
) -> list[Reading]:
    tokens, length = mx.array([list(text) for text in texts]), len(texts[0])
    caches = make_prompt_cache(model)
    with _listening(model, routed, way) as heard:

        def forward(a: int, read: mx.array) -> mx.array:
            heard.begin(a)
            logits: mx.array = model(read, cache=caches)
            mx.eval(logits, [cache.state for cache in caches])
            return logits

        parts = [forward(a, tokens[:, a:b]) for a, b in way.slices(length)]
        selected = [np.concatenate(layer, axis=1) for layer in heard.taken()]
        replies, last = [], parts[-1][:, -1:]
        for step in range(reply_tokens):
            likeliest = last.argmax(axis=-1)
            replies.append(np.array(likeliest))
            if step + 1 < reply_tokens:
                last = forward(length + step, likeliest)
    logits = mx.concatenate(parts, axis=1)
    written = np.concatenate(replies, axis=1) if replies else np.zeros((len(texts), 0), np.int64)
    return [
        Reading(logits[row], tuple(layer[row] for layer in selected), tuple(written[row].tolist()))
        for row in range(len(texts))
    ]


@dataclass(slots=True)
class _Heard:
    """What the modules of one reading were given, and where in the text they stand."""

    layers: int
    at: int = 0
    selections: list[list[NDArray[np.integer[Any]]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.selections = [[] for _ in range(self.layers)]

    def begin(self, at: int) -> None:
        """The next forward reads from position `at` on."""
        self.at = at

    def select(self, layer: int, indices: mx.array) -> None:
        self.selections[layer].append(np.array(indices))

    def taken(self) -> list[list[NDArray[np.integer[Any]]]]:
        """The selections so far, (B, L, k) each, by layer and forward."""
        return [list(layer) for layer in self.selections]


@contextmanager
def _listening(model: Any, routed: Sequence[Routed], way: Way) -> Iterator[_Heard]:
    heard = _Heard(len(routed))
    with ExitStack() as stack:
        for index, layer in enumerate(routed):
            stack.enter_context(_choosing(layer.experts, index, heard))
            if way.noise or way.rounded:
                stack.enter_context(_scoring(layer.router, index, heard, way))
        if way.rounded:
            for each in model.layers:
                stack.enter_context(
                    calling(each, lambda original, *a, **o: _round(original(*a, **o)))
                )
        yield heard


def _choosing(experts: nn.Module, index: int, heard: _Heard) -> Any:
    def call(original: Callable[..., Any], x: mx.array, indices: mx.array, *rest: Any) -> Any:
        heard.select(index, indices)
        return original(x, indices, *rest)

    return calling(experts, call)


def _scoring(router: nn.Module, index: int, heard: _Heard, way: Way) -> Any:
    def seed(x: mx.array) -> mx.array:
        return mx.random.key(_seed(index, heard.at, *x.shape[:-1]))

    def linear(original: Callable[..., Any], x: mx.array) -> mx.array:
        logits: mx.array = original(x)
        if way.noise:
            noise = mx.random.normal(logits.shape, key=seed(x))
            logits = logits + (way.noise * _spread(logits) * noise).astype(logits.dtype)
        return _round(logits) if way.rounded else logits

    def matrix(original: Callable[..., Any], x: mx.array) -> Any:
        """A gate that selects shows no logits: rows of its own noise move them as much."""
        x, rows = (_round(x) if way.rounded else x), router.weight
        if way.noise:
            relative = _spread(x @ rows.T) / mx.linalg.norm(
                x.astype(mx.float32), axis=-1, keepdims=True
            )
            noise = mx.random.normal(rows.shape, key=seed(x))
            router.weight = rows + (way.noise * relative.mean() * noise).astype(rows.dtype)
        try:
            return original(x)
        finally:
            router.weight = rows

    is_linear = isinstance(router, nn.Linear | nn.QuantizedLinear)
    return calling(router, linear if is_linear else matrix)


def _spread(logits: mx.array) -> mx.array:
    """(..., 1): the standard deviation of each token's logits."""
    return logits.astype(mx.float32).std(axis=-1, keepdims=True)


def _round(value: Any) -> Any:
    """To bfloat16 and back; of several results the first, which is the hidden stream."""
    if isinstance(value, tuple):
        return (_round(value[0]), *value[1:])
    return value.astype(mx.bfloat16).astype(value.dtype)


def _seed(*numbers: int) -> int:
    """One number of several, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextmanager
def calling(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Let `call(original, ...)` stand in for what one module does, and for no other of its class.

    The module keeps its place, its parameters' names and its attributes, which a wrapper around it
    would change: mlx-lm's loops ask layers what they are.
    """
    plain = type(module)

    def stand_in(self: nn.Module, *args: Any, **options: Any) -> Any:
        def original(*a: Any, **o: Any) -> Any:
            return plain.__call__(self, *a, **o)

        return call(original, *args, **options)

    module.__class__ = type(plain.__name__, (plain,), {"__call__": stand_in})
    try:
        yield
    finally:
        module.__class__ = plain
