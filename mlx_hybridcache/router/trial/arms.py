"""The four arms of a measurement, and a model that is switched back and forth between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ...errors import RouterError
from ...models import evaluate
from ..discovery.discover import random_groups
from ..families import MoeLayer, moe_layers
from ..in_memory import applied, apply, make_patch
from ..patch import Group, Patch
from ..select import select_tie_safe
from .reading import GRID, Way

ORIGINAL = "original"
CANONICALIZED = "canonicalized"
RANDOM = "random groups"
FIXED = "fixed slices"

DRAWS = 3
"""Random groupings of the control."""

BITS, GROUP_SIZE = 8, 64
"""What mlx-lm quantizes routers to, and everything else in its largest common form."""


@dataclass(frozen=True)
class Arm:
    """One way to serve a model."""

    name: str
    patches: tuple[Patch | None, ...]
    """What it routes by; several for a control that is drawn several times."""
    is_fixed: bool = False
    """Whether every prompt is read alone and in the same slices, as exact mode does."""

    def way(self, asked: Way) -> Way:
        """How this arm reads what others would read as asked."""
        return replace(asked, step=GRID, singly=0, rows=1) if self.is_fixed else asked


def arms(model: Any, patch: Patch, *, draws: int = DRAWS) -> tuple[Arm, ...]:
    """Original, canonicalized by `patch`, random groups of the same sizes (unless 0), fixed slices."""
    controls = tuple(random_groups(model, patch, seed) for seed in range(draws))
    return (
        Arm(ORIGINAL, (None,)),
        Arm(CANONICALIZED, (patch,)),
        *([Arm(RANDOM, controls)] if controls else []),
        Arm(FIXED, (None,), is_fixed=True),
    )


class Switched:
    """A model that routes by one patch now and by another then. Not for serving.

    What a patch makes of the router is kept, a few rows for each layer; the model itself is checked
    against a patch once. Raises `RouterError` for a model that a patch was applied to.
    """

    def __init__(self, model: Any) -> None:
        if applied(model):
            raise RouterError(
                "This model routes by a patch already. Measure on the model that the patch was made for."
            )
        self.model = model
        self.layers: list[MoeLayer] = moe_layers(model)
        self._plain = self._tensors()
        self._made: dict[tuple[str, bool], dict[str, mx.array]] = {}

    @contextmanager
    def by(self, patch: Patch | None, *, tie_safe: bool = True) -> Iterator[None]:
        """Route by `patch` meanwhile; None is the model as it was.

        Without `tie_safe` only the rows are equal, as in a written checkpoint under plain mlx-lm. Raises
        `RouterError` for a patch of another model.
        """
        if patch is None:
            yield
            return
        try:
            self._enter(patch, tie_safe)
            yield
        finally:
            self._set(self._plain)
            for layer in self.layers:
                select_tie_safe(layer, ())

    def _enter(self, patch: Patch, tie_safe: bool) -> None:
        key = patch.digest, tie_safe
        if key not in self._made:
            apply(self.model, patch, tie_safe=tie_safe)
            object.__setattr__(self.model, "_router_patch", None)  # it is taken back below
            self._made[key] = self._tensors()
            return
        self._set(self._made[key])
        if tie_safe:
            groups = {layer.name: layer.groups for layer in patch.layers}
            for layer in self.layers:
                select_tie_safe(layer, groups[layer.name])

    def _tensors(self) -> dict[str, mx.array]:
        return {name: a for layer in self.layers for name, a in layer.tensors().items()}

    def _set(self, tensors: dict[str, mx.array]) -> None:
        self.model.update(tree_unflatten(list(tensors.items())))


def quantized(model: Any) -> Any | None:
    """The same model with 8-bit weights, routers too, as mlx-lm quantizes; None if it has rounder ones.

    It takes memory of its own: about a quarter of a float32 model's, half of a bfloat16 one's.
    """
    if any(isinstance(module, nn.QuantizedLinear) for module in model.modules()):
        return None
    twin = type(model)(model.args)
    twin.update(model.parameters())
    nn.quantize(
        twin,
        GROUP_SIZE,
        BITS,
        class_predicate=lambda _, module: (
            hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP_SIZE == 0
        ),
    )
    twin.eval()
    evaluate(twin)
    return twin


def regrouped(model: Any, patch: Patch) -> Patch:
    """The groups of `patch` for another copy of its model, whose weights are in another form."""
    groups: dict[str, tuple[Group, ...]] = {layer.name: layer.groups for layer in patch.layers}
    return make_patch(model, groups, method=patch.method)
