"""What equal rows alone do: whether they give equal scores on this device, and which ties they leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..patch import Patch
from ..select import Routing
from .arms import Switched
from .reading import Way, read

SHAPES = (1, 7, 64, 512)
"""Tokens of a slice in which equal rows are looked at."""


@dataclass(frozen=True, slots=True)
class Ties:
    """A patch of the weights alone, under mlx-lm's own selection."""

    tokens: int
    """Tokens times MoE layers that were looked at."""
    left: int
    """How many of them choose between members of one group that have the same score, at the last place:
    by where they stand in memory, and by nothing that the weights say."""
    tokens_left: int
    """Tokens that do so in at least one layer."""
    texts: int
    """Tokens read."""
    compared: int
    """Scores of members compared with that of their group's first member, over all shapes of slices."""
    unequal: int
    """How many of them differ in any bit."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "token_layers": self.tokens,
            "left_to_ties": self.left,
            "tokens": self.texts,
            "tokens_left_to_ties": self.tokens_left,
            "compared_scores": self.compared,
            "unequal_scores": self.unequal,
        }


def ties(model: Switched, patch: Patch, texts: Sequence[Sequence[int]]) -> Ties:
    """Read `texts`, all of one length, with nothing but the rows of `patch`."""
    looked = _Looked(patch)
    length = len(texts[0])
    shapes = sorted({min(shape, length) for shape in SHAPES})
    with model.by(patch, tie_safe=False):
        # Every text once for ties, the first one in each shape for equality.
        read(model.model, model.layers, texts, Way(), on_routing=looked.at_ties)
        for shape in shapes:
            looked.shape_scores(model, texts[0], shape)
    return looked.result(sum(len(text) for text in texts))


class _Looked:
    def __init__(self, patch: Patch) -> None:
        self._groups = {layer.name: [g.members for g in layer.groups] for layer in patch.layers}
        self._left: list[np.ndarray[Any, Any]] = []
        self._layers = len(patch.layers)
        self._compared = 0
        self._unequal = 0

    def at_ties(self, routing: Routing) -> None:
        self._left.append(self._straddled(routing))
        self._equality(routing)

    def shape_scores(self, model: Switched, text: Sequence[int], shape: int) -> None:
        read(model.model, model.layers, [text], Way(step=shape), on_routing=self._equality)

    def _straddled(self, routing: Routing) -> np.ndarray[Any, Any]:
        """(T,): whether the last place is taken by one of several equal members of a group."""
        scores, k = _numbers(routing.scores), routing.chosen.shape[-1]
        last = np.sort(scores, axis=-1)[:, -k][:, None]
        above, equal = (scores > last).sum(-1), scores == last
        contested = above + equal.sum(-1) > k
        inside = np.zeros(len(scores), dtype=bool)
        for members in self._groups[routing.layer.name]:
            inside |= equal[:, list(members)].sum(-1) > 1
        left: np.ndarray[Any, Any] = contested & inside
        return left

    def _equality(self, routing: Routing) -> None:
        logits = _numbers(routing.logits)
        for members in self._groups[routing.layer.name]:
            first, others = logits[:, members[:1]], logits[:, list(members[1:])]
            self._compared += others.size
            self._unequal += int((others != first).sum())

    def result(self, tokens: int) -> Ties:
        by_layer = np.concatenate(self._left) if self._left else np.zeros(0, bool)
        # Forwards come layer by layer; each text's layers are as long as the text.
        return Ties(
            tokens=tokens * self._layers,
            left=int(by_layer.sum()),
            tokens_left=self._tokens_left(),
            texts=tokens,
            compared=self._compared,
            unequal=self._unequal,
        )

    def _tokens_left(self) -> int:
        rounds = range(0, len(self._left), self._layers)
        return sum(int(np.any(self._left[at : at + self._layers], axis=0).sum()) for at in rounds)


def _numbers(array: mx.array) -> np.ndarray[Any, Any]:
    """In float32, which holds every half and bfloat16 exactly."""
    return np.array(array.astype(mx.float32))
