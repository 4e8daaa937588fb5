"""Discovery: the calibration tokens through the model once, and what each layer's experts have in common.

One forward reads all calibration tokens, and every MoE layer is examined at the moment in which the
forward meets it, with the inputs that it gets. Before and behind it nothing is kept but the hidden
states, so memory is that of one layer's activations however many layers there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ...errors import RouterError, SettingError
from ..defaults import MIN_TOKENS, RELATIVE_ERROR, SIMILARITY
from ..families import MoeLayer, moe_layers
from ..in_memory import make_patch
from ..patch import Group, Patch
from ..select import Routing, listen
from . import agreement
from .agreement import Agreement, Pair, Work, candidates, confirmed, similar_scores, spread
from .experts import Bank, LayerBank, NullBank, expert_parameters, null_logits
from .groups import make_groups, usage

Method = Literal["outputs", "scores"]

COSINE = 0.99
"""The second condition of `outputs`, beside the relative error: smallest cosine at the 95th percentile (5 % may be below)."""

CHUNK = 1024
"""Tokens that a block reads at a time: what bounds the memory of its experts' activations."""


@dataclass(frozen=True, slots=True)
class LayerFindings:
    """What one layer showed. Seconds are wall time, `peak_bytes` what MLX took beside what it held before."""

    name: str
    experts: int
    top_k: int
    groups: int
    members: int  # experts in groups
    unseen: int  # experts left alone: too few held-out tokens were routed to them
    null_members: int  # experts in groups, by the same procedure, in the null model's layer
    candidates: int  # pairs that were looked at closely
    confirmed: int  # pairs that agreed
    largest_error: float  # the distance of the pair furthest apart inside a group
    expert_parameters: int  # numbers in the weights of one expert
    expert_tokens: int  # runs of one expert on one token, the forward's own not counted
    pairs: int  # pairs of experts whose fingerprints, or scores, were compared
    forward_seconds: float  # up to and through this layer, from the one before
    compare_seconds: float
    null_seconds: float
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.forward_seconds + self.compare_seconds + self.null_seconds


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
        """Experts that were left alone because too few held-out tokens were routed to them."""
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


@dataclass(frozen=True, slots=True)
class _Settings:
    method: Method
    threshold: float
    min_tokens: int
    seed: int


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

    Raises `RouterError` as `moe_layers` does and for a model that this device cannot run, `SettingError` for rows of different lengths or fewer
    than two, for another method, and for `min_tokens` below 1.
    """
    settings = _checked(method, threshold, min_tokens, seed, tokens)
    layers = moe_layers(model)
    batch = mx.array(np.asarray(tokens, np.int32))
    examined = _Examined(settings, (len(tokens), len(tokens[0])), len(layers), on_layer)
    began = time.perf_counter()
    _read(model, batch, layers, examined)
    return Discovery(
        make_patch(model, examined.groups, method=method),
        method,
        settings.threshold,
        min_tokens,
        tokens=batch.size,
        held_out_tokens=int(examined.held_out.sum()),
        seconds=time.perf_counter() - began,
        layers=tuple(examined.findings),
    )


def _checked(
    method: Method,
    threshold: float | None,
    min_tokens: int,
    seed: int,
    tokens: Sequence[Sequence[int]],
) -> _Settings:
    if method not in ("outputs", "scores"):
        raise SettingError(f"{method!r} is no method of discovery; there are outputs and scores.")
    if len(tokens) < 2 or len({len(row) for row in tokens}) != 1 or not tokens[0]:
        raise SettingError("Calibration needs two or more rows of tokens, all of one length.")
    if min_tokens < 1:
        raise SettingError("min_tokens must be at least 1: what no token tells is not known.")
    if threshold is None:
        threshold = RELATIVE_ERROR if method == "outputs" else SIMILARITY
    return _Settings(method, threshold, min_tokens, seed)


def _read(model: Any, batch: mx.array, layers: list[MoeLayer], examined: _Examined) -> None:
    """One forward, in which every layer is examined."""
    with listen(layers, examined.hear, block=examined.block):
        try:
            model(batch)  # its logits stay lazy: each layer was evaluated as it was met
        except (RuntimeError, ValueError) as error:  # MLX's own
            raise RouterError(
                f"The model cannot be run on this device, so its experts cannot be compared: {error} "
                "(MLX's CPU backend runs experts in float32 or quantized only.)"
            ) from error
    missing = [layer.name for layer in layers if layer.name not in examined.groups]
    if missing:
        raise RouterError(
            f"A forward does not reach {', '.join(missing)}; what its experts do cannot be seen."
        )


class _Examined:
    """Takes each block's call in hand: runs it in chunks, looks at its experts, passes its output on."""

    def __init__(
        self,
        settings: _Settings,
        shape: tuple[int, int],
        layers: int,
        on_layer: Callable[[LayerFindings, int], None] | None,
    ):
        self.settings = settings
        self.layers = layers
        self.on_layer = on_layer
        self.held_out = np.repeat(np.arange(shape[0]) % 2 == 1, shape[1])
        self.groups: dict[str, tuple[Group, ...]] = {}
        self.findings: list[LayerFindings] = []
        self._heard: list[Routing] = []
        self._since = time.perf_counter()
        self._held = 0

    def hear(self, routing: Routing) -> None:
        self._heard.append(routing)

    def block(self, layer: MoeLayer, own: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        flat = x.reshape(1, -1, x.shape[-1])
        mx.eval(flat)
        mx.reset_peak_memory()
        self._held = mx.get_active_memory()
        outputs, logits, chosen = [], [], []
        for start in range(0, flat.shape[1], CHUNK):
            outputs.append(own(flat[:, start : start + CHUNK]))
            heard = self._heard.pop()
            logits.append(heard.logits.astype(mx.float32))
            chosen.append(heard.chosen.astype(mx.int32))
            mx.eval(outputs[-1], logits[-1], chosen[-1])
        output = mx.concatenate(outputs, axis=1).reshape(*x.shape[:-1], -1)
        mx.eval(output)
        if layer.name not in self.groups:
            self._examine(
                layer,
                flat[0],
                mx.concatenate(logits),
                np.array(mx.concatenate(chosen)).astype(np.int64),
            )
        self._since = time.perf_counter()
        return output

    def _examine(
        self, layer: MoeLayer, x: mx.array, logits: mx.array, chosen: npt.NDArray[np.int64]
    ) -> None:
        settings, work = self.settings, Work()
        seed = settings.seed + layer.index
        met = time.perf_counter()
        unseen, agreement = self._compare(layer, LayerBank(layer), x, logits, chosen, seed, work)
        groups = make_groups(agreement.pairs, chosen, layer.count)
        compared = time.perf_counter()
        null_groups = self._null_groups(layer, x, seed)
        done = time.perf_counter()
        inside = [
            distance
            for pair, distance in agreement.pairs.items()
            if any(set(pair) <= set(group.members) for group in groups)
        ]
        self.groups[layer.name] = groups
        self.findings.append(
            LayerFindings(
                layer.name,
                layer.count,
                layer.top_k,
                groups=len(groups),
                members=sum(len(group.members) for group in groups),
                unseen=unseen,
                null_members=sum(len(group.members) for group in null_groups),
                candidates=agreement.candidates,
                confirmed=len(agreement.pairs),
                largest_error=max(inside, default=0.0),
                expert_parameters=expert_parameters(layer),
                expert_tokens=work.expert_tokens,
                pairs=work.pairs,
                forward_seconds=met - self._since,
                compare_seconds=compared - met,
                null_seconds=done - compared,
                peak_bytes=mx.get_peak_memory() - self._held,
            )
        )
        if self.on_layer is not None:
            self.on_layer(self.findings[-1], self.layers)

    def _null_groups(self, layer: MoeLayer, x: mx.array, seed: int) -> tuple[Group, ...]:
        """Its routing comes from a router of its own; the scales of both are the layer's."""
        logits = null_logits(layer, x, seed)
        best = mx.argpartition(logits, kth=-layer.top_k, axis=-1)[:, -layer.top_k :]
        chosen = np.array(best).astype(np.int64)
        bank = NullBank(layer, seed)
        _, agreement = self._compare(layer, bank, x, logits, chosen, seed, Work())
        return make_groups(agreement.pairs, chosen, layer.count)

    def _compare(
        self,
        layer: MoeLayer,
        bank: Bank,
        x: mx.array,
        logits: mx.array,
        chosen: npt.NDArray[np.int64],
        seed: int,
        work: Work,
    ) -> tuple[int, Agreement]:
        """How many experts too few held-out tokens were routed to, and which of the others agree."""
        settings, held_out = self.settings, np.flatnonzero(self.held_out)
        used = usage(chosen[held_out], layer.count)
        eligible = np.flatnonzero(used >= settings.min_tokens).tolist()
        unseen = layer.count - len(eligible)
        if settings.method == "scores":
            found = similar_scores(logits, layer.family.scores, eligible, settings.threshold, work)
            allowed = set(_within(layer, list(found.pairs)))
            found.pairs = {pair: far for pair, far in found.pairs.items() if pair in allowed}
            return unseen, found
        probes = x[mx.array(spread(np.flatnonzero(~self.held_out), agreement.PROBES))]
        loose = max(agreement.LOOSE, 2 * settings.threshold)
        pairs = _within(layer, candidates(bank, probes, eligible, loose, seed, work))
        involved = {expert for pair in pairs for expert in pair}
        routed = {expert: held_out[(chosen[held_out] == expert).any(axis=1)] for expert in involved}
        return unseen, confirmed(bank, x, routed, pairs, settings.threshold, COSINE, work)


def _within(layer: MoeLayer, pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs inside one routing group: where whole groups are dropped, two experts of different
    groups with one score would still not be chosen alike.
    """
    size = layer.count // layer.routing_groups
    return [(low, high) for low, high in pairs if low // size == high // size]


def random_groups(model: Any, patch: Patch, seed: int = 0) -> Patch:
    """A patch with as many groups of the same sizes and caps in each layer, of experts drawn at random.

    A control: what it does to a model is what grouping does when nothing is known about the experts.
    """
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[Group]] = {}
    for layer in patch.layers:
        experts = generator.permutation(layer.experts).tolist()
        for group in layer.groups:
            members = tuple(sorted(experts[: len(group.members)]))
            representative = members[int(generator.integers(len(members)))]
            drawn.setdefault(layer.name, []).append(Group(members, representative, group.cap))
            experts = experts[len(members) :]
    return make_patch(model, drawn, method="random")
