"""The oracle: what a model says without any cache, held against every place the cache restores.

The reference knows nothing of the library: mlx-lm's own caches, the whole history read in slices.
"""

import copy
import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import tiny
import tiny_models
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.tokens import TurnMarks

STEP = 64
"""Prefill step of the tests, in tokens, so that a prompt of a few hundred has several slices."""

OPENER = 7
"""The token id that opens a turn. `prompt` never draws it."""

TAIL = tiny.random_tokens(12, seed=77)
"""What is read behind the end of every history: a checkpoint there must go on rightly too."""

FED = 12
"""Tokens read behind each restore point; a window's length more where a layer has a window."""

ROUNDING = 1e-4
"""Largest difference of two logits where the design demands equal readings but not equal bits."""

OTHER_DEVICES = 1e-2
"""The same on a device that computes a row differently in another chunk, outside exact mode."""

SETTINGS: dict[str, Any] = {
    "memory_budget": "64MB",
    "memory_reserve": 0,
    "prefill_step_size": STEP,
    "checkpoint_every": STEP,
    "checkpoint_min_step": 16,
}
"""Small steps, a grid cut at every one, the early cuts at 16 and 32."""

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Point:
    """One restore point: the position, and how far the logits behind it are off at most."""

    position: int
    difference: float


def new_cache(model: nn.Module, *, paused: bool = False, **settings: Any) -> HybridPromptCache:
    """A cache with the tests' small steps; `paused` takes the capture hook away."""
    cache = HybridPromptCache(model, **{**SETTINGS, **settings})
    cache.engine.prefill.marks = TurnMarks(frozenset({OPENER}))
    if paused:
        cache.engine.prefill.layout = without_hook(cache.engine.layout)
    return cache


def without_hook(layout: Any) -> Any:
    """The same layout for a model whose family has no capture hook."""
    return replace(layout, hook=None)


def prompt(length: int, seed: int, openers: Iterable[int] = ()) -> list[int]:
    """`length` random tokens in which a turn opens at exactly the given positions."""
    tokens = [token + (token == OPENER) for token in tiny.random_tokens(length, seed)]
    for at in openers:
        tokens[at] = OPENER
    return tokens


def cold_logits(model: nn.Module, history: Sequence[int], step: int = STEP) -> Array:
    """Logits `(len(history), VOCAB)` at every position, from plain caches read in slices."""
    return np.concatenate(list(_slices(model, make_prompt_cache(model), history, step)))


def _slices(
    model: nn.Module, caches: list[Any], history: Sequence[int], step: int
) -> Iterator[Array]:
    for start in range(0, len(history), step):
        logits = model(mx.array([history[start : start + step]]), cache=caches)
        mx.eval(logits, [cache.state for cache in caches])
        yield np.array(logits[0])


class Colds:
    """The cold runs of one model. A run that begins with whole slices of an earlier one reads the rest."""

    def __init__(self, step: int):
        self.step = step
        self._behind: dict[tuple[int, ...], tuple[list[Any], list[Array]]] = {}
        self._whole: dict[tuple[int, ...], Array] = {}

    def logits(self, model: nn.Module, history: Sequence[int]) -> Array:
        """As `cold_logits`."""
        if (key := tuple(history)) not in self._whole:
            self._whole[key] = self._read(model, history)
        return self._whole[key]

    def _read(self, model: nn.Module, history: Sequence[int]) -> Array:
        at = len(history) // self.step * self.step
        while at and tuple(history[:at]) not in self._behind:
            at -= self.step
        caches, parts = self._behind[tuple(history[:at])] if at else ([], [])
        caches, parts = copy.deepcopy(caches) or make_prompt_cache(model), [*parts]
        for part in _slices(model, caches, history[at:], self.step):
            parts.append(part)
            at += len(part)
            if at % self.step == 0:
                self._behind[tuple(history[:at])] = copy.deepcopy(caches), [*parts]
        return np.concatenate(parts)


@functools.lru_cache(maxsize=32)
def _shared_colds(name: str, step: int) -> Colds:
    return Colds(step)


def colds_of(model: nn.Module, step: int) -> Colds:
    """Those of a model that this process shares outlive the test."""
    for name, shared in tiny.SHARED.items():
        if shared is model:
            return _shared_colds(name, step)
    return Colds(step)


def check(
    cache: HybridPromptCache,
    histories: Sequence[Sequence[int]],
    *,
    positions: Iterable[int] | None = None,
    singly: bool = False,
) -> list[Point]:
    """Restore every point that the cache holds, read on, and compare with cold, bit for bit.

    `histories` are the token lists that were read; a checkpoint of any other tokens is an error. A
    model that rows alone restore has no checkpoints: there the points are those of the histories'
    `positions`, every 23rd one and the ends by default. `singly` reads on one token at a time.
    """
    has_window = any(hasattr(kind, "size") for kind in cache.engine.layout.kinds)
    fed = FED + has_window * tiny_models.WINDOW
    step = cache.engine.prefill.grid.step
    points: list[Point] = []
    model, colds = cache.engine.model, colds_of(cache.engine.model, step)
    for history, at in _points(cache, histories, positions):
        whole = _with_tail(history, step)
        cold = colds.logits(model, whole)
        ready = cache.restore(whole[: at + 1], max_tokens=2 * fed)
        assert (ready.position, ready.rest) == (at, [whole[at]]), f"{at} was not restored"
        rest = whole[at : at + fed]
        hot = _read_on(model, ready.prompt_cache, rest, step=1 if singly else fed)
        ready.release()
        points.append(Point(at, distance(hot, cold[at : at + len(rest)])))
    return points


def distance(one: Array, other: Array) -> float:
    """The largest difference of two arrays of logits; zero for equal bits only, NaN is infinite."""
    assert one.shape == other.shape
    if np.array_equal(one.view(np.uint32), other.view(np.uint32)):
        return 0.0
    return float(max(np.nan_to_num(np.abs(one - other), nan=np.inf).max(), np.finfo(float).tiny))


def agree(one: mx.array, other: mx.array, rounding: float = 0.0) -> bool:
    """Whether two vectors are equal as far as the device promises equal bits, and the model to `rounding`."""
    return distance(np.array(one), np.array(other)) <= _noise(rounding)


def worst(points: Iterable[Point]) -> float:
    """The largest difference of all; asking for none at all is an error."""
    return max(point.difference for point in points)


def assert_equal_bits(points: Sequence[Point]) -> None:
    """Every point agrees with cold to the last bit, on a device that can promise it."""
    off = [point for point in points if point.difference > _noise(0.0)]
    assert points
    assert not off, f"{len(off)} of {len(points)} restore points differ: {off[:8]}"


def assert_same_reading(points: Sequence[Point]) -> None:
    """Every point agrees with cold within rounding, where bits are not promised."""
    off = [point for point in points if point.difference > _noise(ROUNDING)]
    assert points
    assert not off, f"{len(off)} of {len(points)} restore points differ: {off[:8]}"


def _noise(allowed: float) -> float:
    return allowed if tiny.device_is_split_invariant() else OTHER_DEVICES


def _points(
    cache: HybridPromptCache,
    histories: Sequence[Sequence[int]],
    positions: Iterable[int] | None,
) -> list[tuple[Sequence[int], int]]:
    """Every restore point with a history that it belongs to."""
    if cache.engine.layout.needs_snapshots:
        return [(_owner(histories, tokens), len(tokens)) for tokens in cache.checkpoints()]
    points = []
    for history in histories:
        stored = cache.lookup([*history, *TAIL]).matched_tokens
        ends = {1, 2, stored - 1, stored}
        wanted = set(positions) if positions is not None else {*range(23, stored, 23), *ends}
        points += [(history, at) for at in sorted(wanted) if 0 < at <= stored]
    return points


def _owner(histories: Sequence[Sequence[int]], tokens: list[int]) -> Sequence[int]:
    for history in histories:
        if list(history[: len(tokens)]) == tokens:
            return history
    raise AssertionError(f"a checkpoint of {len(tokens)} tokens that nobody asked for")


def _with_tail(history: Sequence[int], step: int) -> list[int]:
    """The history and what follows it; no slice of it is a single token, which may round otherwise."""
    whole = [*history, *TAIL]
    return whole[:-1] if len(whole) % step == 1 else whole


def _read_on(model: nn.Module, caches: list[Any], rest: Sequence[int], step: int) -> Array:
    parts = []
    for start in range(0, len(rest), step):
        logits = model(mx.array([rest[start : start + step]]), cache=caches)
        mx.eval(logits, [cache.state for cache in caches])
        parts.append(np.array(logits[0]))
    return np.concatenate(parts)


@contextmanager
def forwards(model: nn.Module) -> Iterator[list[int]]:
    """The lengths of the slices that the model's own `__call__` is given meanwhile."""
    lengths: list[int] = []
    kind = type(model)  # which a cache may change meanwhile
    original = kind.__call__

    def counted(self: nn.Module, inputs: mx.array, *args: Any, **options: Any) -> mx.array:
        lengths.append(inputs.shape[1])
        return original(self, inputs, *args, **options)

    kind.__call__ = counted
    try:
        yield lengths
    finally:
        kind.__call__ = original


def read(cache: HybridPromptCache, tokens: Sequence[int]) -> list[int]:
    """Let the cache read a prompt, and give what it read: the prompt less its last token."""
    cache.prefill(tokens, max_tokens=1).release()
    return list(tokens[:-1])


def decode(cache: HybridPromptCache, tokens: Sequence[int], count: int) -> list[int]:
    """Read a prompt, decode greedily one token at a time, save the end; gives what was read."""
    ready = cache.prefill(tokens, max_tokens=count + 1)
    history, feed = list(tokens[: ready.position]), ready.rest
    for _ in range(count + 1):
        logits = cache.engine.model(mx.array([feed]), cache=ready.prompt_cache)
        history, feed = [*history, *feed], [int(logits[0, -1].argmax().item())]
    cache.save(history, ready.prompt_cache)
    ready.release()
    return history


def reply_logits(cache: HybridPromptCache, tokens: Sequence[int], count: int = 6) -> Array:
    """Logits `(count, VOCAB)` of a greedy reply to a prompt read through the cache."""
    ready = cache.prefill(tokens, max_tokens=count)
    feed, steps = ready.rest, []
    for _ in range(count):
        logits = cache.engine.model(mx.array([feed]), cache=ready.prompt_cache)[:, -1]
        mx.eval(logits, [each.state for each in ready.prompt_cache])
        steps.append(np.array(logits[0]))
        feed = [int(logits.argmax().item())]
    ready.release()
    return np.stack(steps)


def never_ending(logprobs: mx.array) -> mx.array:
    """A sampler: the likeliest token but the one that ends a reply, the last of the vocabulary."""
    return logprobs[..., :-1].argmax(axis=-1)


@functools.cache
def word_tokenizer() -> TokenizerWrapper:
    """A real tokenizer of `VOCAB` words, "t0" to "t159"; the last one ends a reply."""
    words = {f"t{token}": token for token in range(tiny.VOCAB)}
    inner = Tokenizer(WordLevel(words, unk_token="t0"))
    inner.pre_tokenizer = WhitespaceSplit()
    last = f"t{tiny.VOCAB - 1}"
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=last))


@contextmanager
def batch_sizes(model: nn.Module) -> Iterator[list[int]]:
    """How many rows each one-token forward of the model's own `__call__` has meanwhile."""
    sizes: list[int] = []
    kind = type(model)  # which a cache may change meanwhile
    original = kind.__call__

    def counted(self: nn.Module, inputs: mx.array, *args: Any, **options: Any) -> mx.array:
        if inputs.shape[1] == 1:
            sizes.append(inputs.shape[0])
        return original(self, inputs, *args, **options)

    kind.__call__ = counted
    try:
        yield sizes
    finally:
        kind.__call__ = original
