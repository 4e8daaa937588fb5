"""Models in which some experts are copies of others, in ways that change what they compute or do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import tiny
import tiny_models
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import qwen3_moe
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.router import MoeLayer, moe_layers

Weights = dict[str, np.ndarray[Any, Any]]
"""One expert's gate_proj (H, D), up_proj (H, D) and down_proj (D, H)."""


def noise(size: float) -> Callable[[Weights], Weights]:
    """Every weight off by about `size` of its matrix's standard deviation."""

    def noisy(weights: Weights) -> Weights:
        rng = np.random.default_rng(7)
        return {
            name: (w + size * w.std() * rng.standard_normal(w.shape)).astype(np.float32)
            for name, w in weights.items()
        }

    return noisy


def exact(weights: Weights) -> Weights:
    """The same numbers."""
    return weights


def flipped_signs(weights: Weights) -> Weights:
    """Every second hidden unit with the other sign, and its reader too: the same function."""
    up, down = weights["up_proj"].copy(), weights["down_proj"].copy()
    up[::2] *= -1
    down[:, ::2] *= -1
    return weights | {"up_proj": up, "down_proj": down}


def scaled(weights: Weights) -> Weights:
    """Hidden units eight times as large, read an eighth as strongly: the same function."""
    return weights | {"up_proj": weights["up_proj"] * 8, "down_proj": weights["down_proj"] / 8}


def shuffled(weights: Weights) -> Weights:
    """The hidden units in another order: the same function."""
    order = np.random.default_rng(3).permutation(len(weights["up_proj"]))
    return {name: w[:, order] if name == "down_proj" else w[order] for name, w in weights.items()}


def negated(weights: Weights) -> Weights:
    """The output with the other sign: another function."""
    return weights | {"down_proj": -weights["down_proj"]}


def doubled(weights: Weights) -> Weights:
    """Twice the output: another function, though its direction is the same."""
    return weights | {"down_proj": weights["down_proj"] * 2}


Copies = Mapping[int, tuple[int, Callable[[Weights], Weights]]]
"""Expert -> the expert it becomes a copy of, and how."""


def plant(layer: MoeLayer, copies: Copies, *, row_noise: float = 1e-3) -> None:
    """Make experts of `layer` copies of others; their router rows follow, up to `row_noise`."""
    rng = np.random.default_rng(layer.index)
    projections = {name: layer.experts[name] for name in ("gate_proj", "up_proj", "down_proj")}
    arrays = {name: np.array(module.weight) for name, module in projections.items()}
    rows = np.array(layer.router.weight)
    for copy, (source, change) in copies.items():
        changed = change({name: array[source].copy() for name, array in arrays.items()})
        for name, weight in changed.items():
            arrays[name][copy] = weight
        off = row_noise * rows.std() * rng.standard_normal(rows.shape[1])
        rows[copy] = rows[source] + off
    for name, module in projections.items():
        module.weight = mx.array(arrays[name])
    layer.router.weight = mx.array(rows)


def clone(layer: MoeLayer, copies: Mapping[int, int]) -> None:
    """Make experts exact copies of others, with all their tensors and router rows, whatever the family."""
    for module in layer.experts.modules():
        if isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            for array in module.values():
                if isinstance(array, mx.array):
                    _copy_rows(array, copies)
    for array in layer.tensors().values():
        _copy_rows(array, copies)


def _copy_rows(array: mx.array, copies: Mapping[int, int]) -> None:
    for copy, source in copies.items():
        array[copy] = array[source]


def bundled(copies: Mapping[int, Copies] | None = None) -> Any:
    """A bundled model of one's own, with copies planted by layer."""
    model = mlx_lm.load(str(BUNDLED_MODEL))[0]
    for layer in moe_layers(model):
        plant(layer, (copies or {}).get(layer.index, {}))
    return model


def random_model(experts: int = 64, *, top_k: int = 4, layers: int = 2, seed: int = 5) -> Any:
    """A tiny random Qwen3-MoE with many experts."""
    args = (
        tiny_models.COMMON
        | tiny_models.EXPERTS
        | {"num_experts": experts, "num_experts_per_tok": top_k}
    )
    mx.random.seed(seed)
    model = qwen3_moe.Model(
        qwen3_moe.ModelArgs(
            model_type="qwen3_moe",
            num_hidden_layers=layers,
            max_position_embeddings=32768,
            head_dim=tiny_models.HEAD_DIM,
            tie_word_embeddings=False,
            rope_theta=10000.0,
            mlp_only_layers=[],
            **args,
        )
    )
    weights = [
        (name, tiny._weight(name, array)) for name, array in tree_flatten(model.parameters())
    ]
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    return model


def random_rows(rows: int, length: int, seed: int = 11) -> list[list[int]]:
    """Calibration rows of random tokens for a tiny model."""
    return [tiny.random_tokens(length, seed + i) for i in range(rows)]
