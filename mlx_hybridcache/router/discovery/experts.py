"""Running experts on their own: a layer's, and a null model's, which are random and nobody's copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..families import MoeLayer

EXPERTS_AT_ONCE = 32
"""Experts that run, or are drawn, at a time: what bounds the memory of outputs and of random weights."""

SAMPLED_EXPERTS = 8
"""Experts whose weights tell a null model how large its own are to be."""


class Bank(Protocol):
    """Experts that can be run."""

    count: int

    def outputs(self, x: mx.array, experts: Sequence[int]) -> mx.array:
        """(T, D) -> (T, n, D), float32: what each of the n experts makes of every token."""


class LayerBank:
    """A layer's own experts."""

    def __init__(self, layer: MoeLayer):
        self.count = layer.count
        self.module = layer.experts
        self.before = _before(layer)

    def outputs(self, x: mx.array, experts: Sequence[int]) -> mx.array:
        """(T, D) -> (T, n, D), float32."""
        return _run(self.module, self.before(x), np.asarray(experts))


class NullBank:
    """Random experts of a layer's shapes, dtypes and sizes of weights, independent of one another.

    Drawn from `seed` a block at a time and forgotten, so that they take no more memory than a block.
    """

    def __init__(self, layer: MoeLayer, seed: int):
        self.count = layer.count
        self.layer = layer
        self.before = _before(layer)
        self.seed = seed

    def outputs(self, x: mx.array, experts: Sequence[int]) -> mx.array:
        """(T, D) -> (T, n, D), float32."""
        x, wanted = self.before(x), np.asarray(experts)
        found = mx.zeros((x.shape[0], len(wanted), 0))
        parts: dict[int, mx.array] = {}
        for block in sorted(set((wanted // EXPERTS_AT_ONCE).tolist())):
            at = np.flatnonzero(wanted // EXPERTS_AT_ONCE == block)
            module = self._drawn(block)
            found = _run(module, x, wanted[at] - block * EXPERTS_AT_ONCE)
            mx.eval(found)
            parts |= {int(i): found[:, j] for j, i in enumerate(at)}
        return mx.stack([parts[i] for i in range(len(wanted))], axis=1)

    def _drawn(self, block: int) -> Any:
        count = min(EXPERTS_AT_ONCE, self.count - block * EXPERTS_AT_ONCE)
        keys = iter(mx.random.split(mx.random.key(self.seed * 8191 + block), 16))
        return _redrawn(self.layer.experts, count, lambda: next(keys))


def null_logits(layer: MoeLayer, x: mx.array, seed: int) -> mx.array:
    """(T, D) -> (T, E), float32: what a random router of the layer's shape and size gives."""
    rows = router_rows(layer)
    drawn = mx.random.normal(rows.shape, key=mx.random.key(seed * 8191 + 8190))
    return x.astype(mx.float32) @ (drawn * mx.std(rows)).T


def expert_parameters(layer: MoeLayer) -> int:
    """How many numbers the weights of one expert have, whatever they are held in."""
    total = 0
    for module in layer.experts.modules():
        if isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            total += module.input_dims * module.output_dims
    return total


def router_rows(layer: MoeLayer) -> mx.array:
    """The router's weight, (E, D), float32, whatever it is held in."""
    router = layer.router
    if isinstance(router, nn.QuantizedLinear):
        rows = mx.dequantize(
            router.weight,
            router.scales,
            router.get("biases"),
            router.group_size,
            router.bits,
            mode=router.mode,
        )
        return rows.astype(mx.float32)
    return mx.array(router.weight).astype(mx.float32)


def _before(layer: MoeLayer) -> Callable[[mx.array], mx.array]:
    projection = layer.block.get(layer.family.before) if layer.family.before else None
    return (lambda x: x) if projection is None else projection


def _run(module: Any, x: mx.array, experts: np.ndarray[Any, Any]) -> mx.array:
    indices = mx.broadcast_to(mx.array(experts.astype(np.uint32)), (x.shape[0], len(experts)))
    return mx.array(module(x, indices)).astype(mx.float32)


def _redrawn(module: Any, count: int, key: Callable[[], mx.array]) -> Any:
    """A copy of `module` with `count` random experts in it; `module` stays as it is."""
    made = copy.copy(module)
    for name, child in module.items():
        if isinstance(child, nn.Module):
            dict.__setitem__(made, name, _redrawn(child, count, key))
    if isinstance(module, SwitchLinear | QuantizedSwitchLinear):
        for name, array in _random_weights(module, count, key).items():
            setattr(made, name, array)
    return made


def _random_weights(
    module: Any, count: int, key: Callable[[], mx.array]
) -> dict[str, mx.array | None]:
    step = max(1, module.weight.shape[0] // SAMPLED_EXPERTS)
    sample = {name: array[::step] for name, array in module.items() if isinstance(array, mx.array)}
    drawn: dict[str, mx.array | None] = {}
    if "bias" in sample:
        bias = sample["bias"].astype(mx.float32)
        noise = mx.random.normal((count, *bias.shape[1:]), key=key())
        drawn["bias"] = (bias.mean() + mx.std(bias) * noise).astype(sample["bias"].dtype)
    weight = sample["weight"]
    if isinstance(module, SwitchLinear):
        noise = mx.random.normal((count, *weight.shape[1:]), key=key())
        drawn["weight"] = (noise * mx.std(weight.astype(mx.float32))).astype(weight.dtype)
        return drawn
    how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    if module.get("global_scale") is None:
        plain = mx.dequantize(weight, sample["scales"], sample.get("biases"), **how)
        size, shape = mx.std(plain.astype(mx.float32)), plain.shape[1:]
    else:  # what is packed says little about the size then; directions are what is compared
        size, shape = mx.array(module.input_dims**-0.5), (module.output_dims, module.input_dims)
        drawn["global_scale"] = None
    noise = mx.random.normal((count, *shape), key=key()) * size
    dtype = sample["scales"].dtype if module.mode == "affine" else mx.float32
    quantized = mx.quantize(noise.astype(dtype), **how)
    drawn |= dict(zip(("weight", "scales", "biases"), (*quantized, None)[:3], strict=True))
    return drawn
