"""One small block of every class in the table of families, built by mlx-lm's own code."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import tiny
from mlx.utils import tree_flatten, tree_unflatten

from mlx_hybridcache.router import FAMILIES, Family, MoeLayer

EXPERTS, TOP_K, HIDDEN = 16, 4, 32

ARGS: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "share_expert_dim": 16,
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_bias": False,
    "norm_topk_prob": True,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_topk": TOP_K,
    "moe_top_k": TOP_K,
    "moe_k": TOP_K,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 1.5,
    "moe_router_scaling_factor": 1.5,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_shared_expert": 1,
    "moe_num_shared_experts": 1,
    "use_mixed_mlp_moe": True,
    "score_function": "sigmoid",
    "score_func": "sigmoid",
    "route_norm": True,
    "route_scale": 1.5,
    "moe_router_activation_func": "sigmoid",
    "moe_renormalize": True,
    "moe_router_enable_expert_bias": True,
    "moe_router_enable_routed_scaling": True,
    "moe_router_enable_shared_expert": True,
    "norm_expert_weight": True,
    "moe_gate_act": "softmax",
    "use_expert_bias": True,
    "moe_latent_size": 16,
    "swiglu_alpha": 1.7,
    "swiglu_limit": 7.0,
    "swiglu_limits": [],
    "swiglu_limits_shared": [],
    "model_dim": HIDDEN,
    "moe_router_logit_softcapping": 0.0,
    "moe_router_score_func": "sigmoid",
    "moe_routed_scaling_factor": 1.5,
}
"""What any of their constructors looks for."""

GROUPED = {"n_group": 4, "num_expert_group": 4, "topk_group": 2}
"""Experts in four routing groups, two of which are dropped for each token."""

OPTIONS: dict[str, dict[str, Any]] = {
    "deepseek_v2.DeepseekV2MoE": {"topk_method": "group_limited_greedy"},
}

NAMES = [name for family in FAMILIES for name in family.blocks]


def family_of(name: str) -> Family:
    """The row that describes it."""
    return next(family for family in FAMILIES if name in family.blocks)


def build(name: str, *, grouped: bool = False) -> MoeLayer:
    """A block with random weights, as a layer; with routing groups where its family has them."""
    module, _, kind = name.partition(".")
    found = importlib.import_module(f"mlx_lm.models.{module}")
    args = SimpleNamespace(
        **{**ARGS, **(GROUPED if grouped else {}), **(OPTIONS.get(name, {}) if grouped else {})}
    )
    mx.random.seed(sum(map(ord, name)))
    positional = {"phixtral": (HIDDEN, 24), "step3p5": (0,)}.get(module, ())
    block = getattr(found, kind)(args, *positional)
    weights = [(path, _weight(path, a)) for path, a in tree_flatten(block.parameters())]
    block.update(tree_unflatten(weights))
    block.eval()
    mx.eval(block.parameters())
    return MoeLayer(0, "block", block, family_of(name))


def _weight(path: str, default: mx.array) -> mx.array:
    return tiny._weight(f"block.{path}", default)
