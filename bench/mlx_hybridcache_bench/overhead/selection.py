"""What selecting by groups of experts costs when decoding, beside the same model selecting as ever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from rich.console import Console

from mlx_hybridcache import models
from mlx_hybridcache.router import MoeLayer, moe_layers
from mlx_hybridcache.router.select import (
    TieSafe,
    bars_of,
    select_through,
    select_tie_safe,
    shared_of,
)

from ..kit.paired import Paired, measure
from ..kit.tables import Figure, show

PROMPT = 64
"""Tokens read before decoding; a reply that grows would cost both ways the same."""

TOKENS_PER_CALL = 4

LARGEST_SHARE = 0.02

CASES = {"a cap in every layer": False, "a cap, and equal rows computed unequally": True}
"""Whether scores are also shared in groups. Groups within their caps add nothing at all."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Each case's measurement: `a` selects as mlx-lm does, `b` with what groups add."""

    layers: int
    cases: dict[str, Paired]

    def figures(self) -> list[Figure]:
        """Share of a decoded token that the selection adds, wall clock, the median of the pairs."""
        return [
            Figure(
                f"decoding, {name}", paired.ratio - 1, "of a token", LARGEST_SHARE, counted=False
            )
            for name, paired in self.cases.items()
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "moe_layers": self.layers,
            "cases": {name: paired.as_json() for name, paired in self.cases.items()},
        }

    def show(self, console: Console) -> None:
        """A row a case."""
        rows = [
            (
                name,
                f"{paired.a_seconds / TOKENS_PER_CALL * 1e3:.3f}",
                f"{paired.b_seconds / TOKENS_PER_CALL * 1e3:.3f}",
                f"{paired.ratio - 1:+.2%}",
                f"{paired.cpu_ratio - 1:+.2%}",
            )
            for name, paired in self.cases.items()
        ]
        title = f"Decoding one token with {self.layers} MoE layers selecting by groups"
        columns = ("case", "mlx-lm ms", "groups ms", "wall clock", "processor time")
        show(console, title, columns, rows)


def measure_selection(path: str, *, pairs: int) -> Selection:
    """Decode with the model at `path`, in turns with and without what selecting by groups adds.

    The operations are those of a patched layer, with groups of one: both ways choose the same experts.
    Otherwise the time of other experts, cached or not, would be counted too. It is one model with one
    reply: two copies of the same model differ by more than is measured here.
    """
    model = models.load(path)[0]
    layers = moe_layers(model)
    found = {}
    for name, shares in CASES.items():
        decode = _decoding(model)
        for layer in layers:
            select_tie_safe(layer, ())  # as mlx-lm does
        plain = _selecting_as_now(layers, decode)
        for layer in layers:
            select_through(layer, _idle(layer.count, shares=shares))
        by_groups = _selecting_as_now(layers, decode)
        found[name] = measure(plain, by_groups, pairs=pairs, warm_up=20)
    return Selection(len(layers), found)


def _selecting_as_now(
    layers: Sequence[MoeLayer], decode: Callable[[], object]
) -> Callable[[], object]:
    """The same call, with all layers selecting as they do now. To let them takes a microsecond."""
    kinds = [(layer.selector, type(layer.selector)) for layer in layers]

    def select_and_decode() -> None:
        for selector, kind in kinds:
            object.__setattr__(selector, "__class__", kind)
        decode()

    return select_and_decode


def _idle(experts: int, *, shares: bool) -> TieSafe:
    own = shared_of(np.arange(experts, dtype=np.uint32)) if shares else None
    return TieSafe(experts, own, bars_of(np.zeros(experts)), None)


def _decoding(model: Any) -> Callable[[], object]:
    """A call that decodes the next few tokens of one reply, greedily."""
    caches = make_prompt_cache(model)
    token = model(mx.array([[*range(5, 5 + PROMPT)]]), cache=caches)[:, -1:].argmax(axis=-1)
    state = [token]

    def decode() -> None:
        for _ in range(TOKENS_PER_CALL):
            state[0] = model(state[0], cache=caches)[:, -1:].argmax(axis=-1)
            mx.eval(state[0])

    return decode
