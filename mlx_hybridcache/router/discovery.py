"""Discovery: the calibration tokens through the model once, and what each layer's experts have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .patch import Patch

Method = Literal["outputs", "scores"]

RELATIVE_ERROR = 0.05
"""Default threshold of `outputs`: largest relative error at the 95th percentile."""

COSINE = 0.99
"""The second condition of `outputs`: smallest cosine at the 95th percentile (5 % may be below)."""

SIMILARITY = 0.7
"""Default threshold of `scores`, as published: smallest cosine of two experts' scores over tokens."""

MIN_TOKENS = 8
"""Held-out tokens that must be routed to an expert; with fewer it is left alone."""


@dataclass(frozen=True, slots=True)
class LayerFindings:
    """What one layer showed. Everything is counted; seconds are wall time, bytes MLX's peak."""

    name: str
    experts: int
    top_k: int
    groups: int
    members: int  # experts in groups
    unseen: int  # experts left alone: too few calibration tokens were routed to them
    null_members: int  # experts in groups, by the same procedure, in the null model's layer
    candidates: int  # pairs that were looked at closely
    confirmed: int  # pairs that agreed
    largest_error: float  # relative error at the 95th percentile, the worst pair inside a group
    seconds: float
    null_seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Discovery:
    """A patch and how it was found."""

    patch: Patch
    method: Method
    threshold: float
    min_tokens: int
    tokens: int
    held_out_tokens: int
    seconds: float
    layers: tuple[LayerFindings, ...]

    @property
    def coverage(self) -> float:
        """Share of all experts that are in groups."""
        return self.patch.coverage

    @property
    def null_coverage(self) -> float:
        """The same share in the null model: same shapes, independent random experts and routers."""
        return sum(layer.null_members for layer in self.layers) / self.patch.experts

    @property
    def unseen(self) -> int:
        """Experts that were left alone because too few calibration tokens were routed to them."""
        return sum(layer.unseen for layer in self.layers)

    def as_json(self) -> dict[str, Any]:
        """Everything but the patch, for the report."""
        found = asdict(self)
        del found["patch"]
        return found | {
            "coverage": self.coverage,
            "null_coverage": self.null_coverage,
            "unseen": self.unseen,
        }


def discover(
    model: Any,
    tokens: Sequence[Sequence[int]],
    *,
    method: Method = "outputs",
    threshold: float | None = None,
    min_tokens: int = MIN_TOKENS,
    seed: int = 0,
    on_layer: Callable[[LayerFindings, int], None] | None = None,
) -> Discovery:
    """Find experts that compute the same function. Does not change `model`.

    `tokens` are rows of one length (`calibration_tokens` makes them); the even ones find, the odd ones
    are held out and confirm. `threshold` is of the method's own kind. `on_layer` hears of each layer as
    it is done, and how many there are.

    Raises `RouterError` as `moe_layers` does.
    """
    raise NotImplementedError


def random_groups(model: Any, patch: Patch, seed: int = 0) -> Patch:
    """A patch with as many groups of the same sizes and caps in each layer, of experts drawn at random.

    A control: what it does to a model is what grouping does when nothing is known about the experts.
    """
    raise NotImplementedError
