"""Tiny random models in whose batches mlx-lm computes something else than for one sequence alone."""

from collections.abc import Callable

import mlx.nn as nn
import tiny
import tiny_models
from mlx_lm.models import (
    afm7,
    deepseek_v32,
    gemma2,
    glm_moe_dsa,
    gpt_bigcode,
    internlm2,
    minimax_m3_vl,
)

SHAPE = {"num_hidden_layers": 2, **tiny_models.COMMON}

LATENT = {
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "num_key_value_heads": tiny_models.HEADS,
}


def _gemma2(heads: int, kv_heads: int) -> nn.Module:
    shape = {**SHAPE, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return gemma2.Model(
        gemma2.ModelArgs(model_type="gemma2", head_dim=tiny_models.HEAD_DIM, **shape)
    )


def _gpt_bigcode() -> nn.Module:
    return gpt_bigcode.Model(
        gpt_bigcode.ModelArgs(
            model_type="gpt_bigcode",
            n_embd=tiny_models.HIDDEN,
            n_layer=2,
            n_inner=96,
            n_head=tiny_models.HEADS,
            n_positions=512,
            layer_norm_epsilon=1e-6,
            vocab_size=tiny.VOCAB,
        )
    )


def _internlm2_dynamic() -> nn.Module:
    scaling = {"type": "dynamic", "factor": 2.0}
    return internlm2.Model(
        internlm2.ModelArgs(model_type="internlm2", rope_scaling=scaling, **SHAPE)
    )


def _afm7() -> nn.Module:
    return afm7.Model(
        afm7.ModelArgs(
            model_type="afm7",
            vocab_size=tiny.VOCAB,
            hidden_dim=tiny_models.HIDDEN,
            num_layers=3,
            num_kv_reuse_layers=1,
            num_heads=tiny_models.HEADS,
            num_kv_heads=tiny_models.KV_HEADS,
        )
    )


def _deepseek_v32() -> nn.Module:
    args = {**SHAPE, **LATENT, "index_topk": 16}
    return deepseek_v32.Model(deepseek_v32.ModelArgs(**args))


def _glm_moe_dsa() -> nn.Module:
    args = {**SHAPE, **LATENT, "index_topk": 16}
    return glm_moe_dsa.Model(
        glm_moe_dsa.ModelArgs(
            model_type="glm_moe_dsa",
            routed_scaling_factor=1.0,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=True,
            n_group=1,
            topk_group=1,
            moe_layer_freq=1,
            max_position_embeddings=2048,
            attention_bias=False,
            rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
            **args,
        )
    )


def _minimax_m3_vl() -> nn.Module:
    text = {
        **SHAPE,
        "intermediate_size": 32,
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": tiny_models.HEAD_DIM,
        "index_n_heads": tiny_models.KV_HEADS,
        "index_head_dim": 16,
        "index_block_size": 8,
        "index_topk_blocks": 2,
        "layer_types": ["full_attention", "sparse_attention"],
    }
    return minimax_m3_vl.Model(minimax_m3_vl.ModelArgs(text_config=text))


ODD: dict[str, Callable[[], nn.Module]] = {
    "gemma2, as many replies as key-value heads": lambda: _gemma2(4, 2),
    "gemma2, other head counts": lambda: _gemma2(8, 4),
    "gpt_bigcode": _gpt_bigcode,
    "internlm2, dynamic RoPE": _internlm2_dynamic,
    "afm7": _afm7,
    "deepseek_v32": _deepseek_v32,
    "glm_moe_dsa": _glm_moe_dsa,
    "minimax_m3_vl": _minimax_m3_vl,
}


def build(name: str) -> nn.Module:
    """A new model of that kind; the same weights every time."""
    return tiny.made(ODD[name])
