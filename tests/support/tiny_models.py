"""The shapes of the tiny models, of every family the cache meets, in mlx-lm's own classes."""

import math
from collections.abc import Callable
from typing import Any

import mlx.nn as nn
from mlx_lm.models import (
    deepseek_v3,
    falcon_h1,
    gemma3_text,
    gpt_oss,
    granitemoehybrid,
    jamba,
    llama,
    llama4,
    mamba2,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    recurrent_gemma,
)

VOCAB = 160
"""Vocabulary size of every tiny model."""

WINDOW = 32
"""Tokens that a sliding or chunked attention layer of a tiny model sees."""

HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16

COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
}

GATED_DELTA: dict[str, Any] = {
    "num_hidden_layers": 3,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 3,
    "max_position_embeddings": 32768,
    "head_dim": HEAD_DIM,
}
"""Two recurrent layers under one of attention: two can be mistaken for each other, and a third takes as long as each of them."""

OF_FOUR: dict[str, Any] = {**GATED_DELTA, "num_hidden_layers": 4, "full_attention_interval": 4}
"""The same with one layer of attention in four, as Qwen's own."""

EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


def _qwen3_next(shape: dict[str, Any] = GATED_DELTA) -> nn.Module:
    return qwen3_next.Model(
        qwen3_next.ModelArgs(
            model_type="qwen3_next",
            shared_expert_intermediate_size=32,
            mlp_only_layers=[],
            rope_theta=10000.0,
            partial_rotary_factor=0.25,
            **COMMON,
            **shape,
            **EXPERTS,
        )
    )


def _qwen3_5(shape: dict[str, Any] = GATED_DELTA) -> nn.Module:
    text = {"model_type": "qwen3_5_text", **COMMON, **shape}
    return qwen3_5.Model(qwen3_5.ModelArgs(model_type="qwen3_5", text_config=text))


def _qwen3_5_moe(shape: dict[str, Any] = GATED_DELTA) -> nn.Module:
    text = {
        "model_type": "qwen3_5_moe_text",
        "shared_expert_intermediate_size": 32,
        **COMMON,
        **shape,
        **EXPERTS,
    }
    return qwen3_5_moe.Model(qwen3_5_moe.ModelArgs(model_type="qwen3_5_moe", text_config=text))


def _qwen3() -> nn.Module:
    return qwen3.Model(
        qwen3.ModelArgs(
            model_type="qwen3",
            num_hidden_layers=2,
            max_position_embeddings=32768,
            head_dim=HEAD_DIM,
            tie_word_embeddings=True,
            rope_theta=10000.0,
            **COMMON,
        )
    )


def _qwen3_moe() -> nn.Module:
    return qwen3_moe.Model(
        qwen3_moe.ModelArgs(
            model_type="qwen3_moe",
            num_hidden_layers=2,
            max_position_embeddings=32768,
            head_dim=HEAD_DIM,
            tie_word_embeddings=False,
            rope_theta=10000.0,
            mlp_only_layers=[],
            **COMMON,
            **EXPERTS,
        )
    )


def _llama(rope_scaling: dict[str, Any] | None = None) -> nn.Module:
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            num_hidden_layers=2,
            max_position_embeddings=32768,
            rope_scaling=rope_scaling,
            **COMMON,
        )
    )


def _llama_llama3() -> nn.Module:
    return _llama(
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    )


def _llama_yarn() -> nn.Module:
    return _llama({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})


def _gemma3_text() -> nn.Module:
    return gemma3_text.Model(
        gemma3_text.ModelArgs(
            model_type="gemma3_text",
            num_hidden_layers=4,
            head_dim=HEAD_DIM,
            query_pre_attn_scalar=HEAD_DIM,
            sliding_window=WINDOW,
            sliding_window_pattern=2,
            **COMMON,
        )
    )


def _recurrent_gemma() -> nn.Module:
    return recurrent_gemma.Model(
        recurrent_gemma.ModelArgs(
            model_type="recurrent_gemma",
            attention_bias=False,
            conv1d_width=4,
            logits_soft_cap=30.0,
            num_hidden_layers=3,
            rope_theta=10000.0,
            attention_window_size=WINDOW,
            block_types=["recurrent", "recurrent", "attention"],
            **{**COMMON, "num_key_value_heads": 1},
        )
    )


def _jamba() -> nn.Module:
    return jamba.Model(
        jamba.ModelArgs(
            model_type="jamba",
            num_hidden_layers=4,
            attn_layer_offset=2,
            attn_layer_period=4,
            expert_layer_offset=1,
            expert_layer_period=2,
            mamba_d_conv=4,
            mamba_d_state=8,
            mamba_expand=2,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=32768,
            **COMMON,
        )
    )


def _falcon_h1() -> nn.Module:
    return falcon_h1.Model(
        falcon_h1.ModelArgs(
            num_hidden_layers=2,
            head_dim=HEAD_DIM,
            mamba_d_head=16,
            mamba_d_ssm=64,
            mamba_d_state=16,
            mamba_n_heads=4,
            mamba_n_groups=1,
            max_position_embeddings=32768,
            rope_theta=10000.0,
            # The default shrinks logits 25-fold, and every difference with them.
            lm_head_multiplier=1.0,
            **COMMON,
        )
    )


def _mamba2() -> nn.Module:
    return mamba2.Model(
        mamba2.ModelArgs(
            model_type="mamba2",
            num_heads=8,
            head_dim=16,
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=128,
            state_size=16,
            num_hidden_layers=3,
            layer_norm_epsilon=1e-5,
            conv_kernel=4,
            n_groups=1,
            use_bias=False,
            use_conv_bias=True,
            tie_word_embeddings=True,
            time_step_limit=(0.0, math.inf),
            time_step_rank="auto",
        )
    )


def _granitemoehybrid() -> nn.Module:
    return granitemoehybrid.Model(
        granitemoehybrid.ModelArgs(
            model_type="granitemoehybrid",
            num_hidden_layers=4,
            max_position_embeddings=32768,
            attention_bias=False,
            embedding_multiplier=1.0,
            attention_multiplier=HEAD_DIM**-0.5,
            logits_scaling=1.0,
            residual_multiplier=1.0,
            layer_types=["mamba", "mamba", "attention", "mamba"],
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=32,
            mamba_n_heads=8,
            mamba_d_head=16,
            mamba_proj_bias=False,
            mamba_d_state=16,
            mamba_d_conv=4,
            mamba_n_groups=1,
            mamba_conv_bias=True,
            **COMMON,
        )
    )


def _gpt_oss() -> nn.Module:
    return gpt_oss.Model(
        gpt_oss.ModelArgs(
            num_hidden_layers=4,
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=HEAD_DIM,
            sliding_window=WINDOW,
            rope_theta=10000,
            **COMMON,
        )
    )


def _llama4() -> nn.Module:
    text = {
        "attention_bias": False,
        "attention_chunk_size": WINDOW,
        "head_dim": HEAD_DIM,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 96,
        "max_position_embeddings": 32768,
        "model_type": "llama4_text",
        "num_experts_per_tok": 1,
        "num_hidden_layers": 4,
        "num_local_experts": 4,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "use_qk_norm": True,
        **COMMON,
    }
    return llama4.Model(llama4.ModelArgs(text_config=text, model_type="llama4"))


def _deepseek_v3() -> nn.Module:
    return deepseek_v3.Model(
        deepseek_v3.ModelArgs(
            num_hidden_layers=2,
            moe_intermediate_size=32,
            n_shared_experts=1,
            n_routed_experts=4,
            num_experts_per_tok=2,
            kv_lora_rank=32,
            q_lora_rank=32,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            first_k_dense_replace=1,
            **{**COMMON, "num_key_value_heads": HEADS},
        )
    )


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "qwen3_next": _qwen3_next,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "llama": _llama,
    "llama_llama3": _llama_llama3,
    "llama_yarn": _llama_yarn,
    "gemma3_text": _gemma3_text,
    "recurrent_gemma": _recurrent_gemma,
    "jamba": _jamba,
    "falcon_h1": _falcon_h1,
    "mamba2": _mamba2,
    "granitemoehybrid": _granitemoehybrid,
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
    "deepseek_v3": _deepseek_v3,
}

LARGER: dict[str, Callable[[], nn.Module]] = {
    "qwen3_next": lambda: _qwen3_next(OF_FOUR),
    "qwen3_5": lambda: _qwen3_5(OF_FOUR),
    "qwen3_5_moe": lambda: _qwen3_5_moe(OF_FOUR),
}
"""For who spreads layers over ranks, or tells what a family's own are."""
