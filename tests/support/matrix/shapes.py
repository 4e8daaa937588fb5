"""Tiny models of whatever mlx-lm has, made from the fields of its own argument classes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import pkgutil
import sys
import types
from collections.abc import Iterator
from typing import Any, get_type_hints

import mlx.nn as nn
import mlx_lm.models
import tiny
import tiny_models
from odd_models import families

from matrix.overrides import OVERRIDES, TEXT

WINDOW = 32
HEADS = 4
KV_HEADS = 2

NAMED: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "num_vocab", "vocab_size_per_layer_input"), tiny.VOCAB),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "hidden_dim", "model_dim"), 64),
    **dict.fromkeys(("block_dim", "kv_channels"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_hidden_size"), 96),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("ff_intermediate_size", "block_ff_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), HEADS),
    **dict.fromkeys(("num_query_heads", "linear_num_value_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), KV_HEADS),
    **dict.fromkeys(("linear_num_key_heads", "num_attention_groups"), KV_HEADS),
    **dict.fromkeys(("head_dim", "global_head_dim", "hidden_size_per_head"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("v_head_dim", "qk_nope_head_dim", "index_head_dim"), 16),
    "query_pre_attn_scalar": 16,
    "qk_rope_head_dim": 8,
    **dict.fromkeys(("rotary_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("index_n_heads", "o_groups"), 2),
    "index_topk": 16,
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "share_expert_dim"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "moe_num_experts": 4,
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("moe_k", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("n_group", "topk_group", "decoder_sparse_step", "moe_layer_freq"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("sliding_window", "attention_window_size", "sliding_window_size"), WINDOW),
    **dict.fromkeys(("window_size", "loop_window_size", "attention_chunk_size"), WINDOW),
    "sliding_window_pattern": 2,
    **dict.fromkeys(("mamba_d_conv", "conv_kernel", "linear_conv_kernel_dim"), 4),
    **dict.fromkeys(("short_conv_kernel_size", "conv1d_width", "conv_window"), 4),
    "conv_L_cache": 3,
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 16),
    **dict.fromkeys(("n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    "mamba_expand": 2,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "model_max_length"), 4096),
    **dict.fromkeys(("n_ctx", "block_size"), 4096),
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "rope_local_base_freq"), 10000.0),
    **dict.fromkeys(("rms_norm_eps", "norm_eps", "layernorm_epsilon"), 1e-6),
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon"), 1e-6),
    "mlp_only_layers": [],
    "time_step_rank": "auto",
    "time_step_limit": (0.0, 100.0),
    **dict.fromkeys(("hidden_act", "hidden_activation"), "silu"),
    "topk_method": "noaux_tc",
    **dict.fromkeys(("scoring_func", "score_function"), "sigmoid"),
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
}
"""What a field is, by its name, in whichever family: small, but with groups of heads, experts and windows."""

BUILT = {
    **{name: tiny_models.ARCHITECTURES[name] for name in tiny_models.ARCHITECTURES},
    **tiny_models.LARGER,
    **families.BUILDERS,
    "nemotron-nas": families.BUILDERS["nemotron_nas"],
}
"""Families that other tests have a tiny model of, which is taken."""

DERIVED = ("llama", "internlm2")
"""Those of them whose own here has more kinds of layers, or none of their trait."""

OF_TYPE: dict[Any, Any] = {bool: False, float: 1.0}
"""What a field without default is that no name above has."""


def modules() -> list[str]:
    """The modules of mlx-lm that are families, by name."""
    names = (info.name for info in pkgutil.iter_modules(mlx_lm.models.__path__))
    return [name for name in names if name != "cache" and _is_family(name)]


def _is_family(name: str) -> bool:
    module = module_of(name)
    return hasattr(module, "Model") and hasattr(module, "ModelArgs")


@functools.cache
def module_of(name: str) -> types.ModuleType:
    """The module, where need be without the package that it asks for and does not use."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(f"mlx_lm.models.{name}")
    except SystemExit:
        sys.modules["hf_olmo"] = types.ModuleType("hf_olmo")
        return importlib.import_module(f"mlx_lm.models.{name}")


def arguments(family: str) -> Any:
    """The arguments of its tiny model."""
    module = module_of(family)
    values = {**derived(module.ModelArgs), "model_type": family, **OVERRIDES.get(family, {})}
    if family in TEXT:
        inner, name = TEXT[family]
        args = getattr(module_of(inner), name)
        text = {**derived(args), "model_type": inner, **OVERRIDES.get(inner, {})}
        values["text_config"] = {**text, **OVERRIDES.get(family, {}).get("text_config", {})}
    return module.ModelArgs(**values)


def derived(args: type) -> dict[str, Any]:
    """A value for each field that has a known name, and for each that has no default."""
    return dict(_values(args))


def _values(args: type) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(args)
    for each in dataclasses.fields(args):
        missing = dataclasses.MISSING
        required = each.default is missing and each.default_factory is missing
        if each.name in NAMED and (required or NAMED[each.name] is not None):
            if each.name != "tie_word_embeddings" or required:
                yield each.name, NAMED[each.name]
        elif required and hints[each.name] in OF_TYPE:
            yield each.name, OF_TYPE[hints[each.name]]


def build(family: str) -> nn.Module:
    """A new tiny model; the same weights every time."""
    if family in BUILT and family not in DERIVED:
        return tiny.made(BUILT[family])
    return tiny.made(lambda: module_of(family).Model(arguments(family)))
