"""Small random models of mlx-lm's own classes, for what the bundled model cannot show."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3, qwen3_moe, qwen3_next

VOCABULARY = 2048

_COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}

_EXPERTS: dict[str, Any] = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}


def random_qwen3_moe() -> nn.Module:
    """A Qwen3-MoE of 4 layers, 16 experts, 4 of them at a time, float32."""
    return _made(
        qwen3_moe.Model(
            qwen3_moe.ModelArgs(model_type="qwen3_moe", num_hidden_layers=4, **_COMMON, **_EXPERTS)
        )
    )


def random_qwen3() -> nn.Module:
    """A dense Qwen3 of 4 layers, float32."""
    return _made(qwen3.Model(qwen3.ModelArgs(model_type="qwen3", num_hidden_layers=4, **_COMMON)))


def wide_qwen3() -> nn.Module:
    """A dense Qwen3 of 4 layers with 2 key-value heads of 64, bfloat16."""
    wide = {**_COMMON, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    model = qwen3.Model(
        qwen3.ModelArgs(model_type="qwen3", num_hidden_layers=4, **{**wide, "head_dim": 64})
    )
    model.set_dtype(mx.bfloat16)
    return _made(model)


def smallest_qwen3_next() -> nn.Module:
    """A Qwen3-Next of one Gated-DeltaNet and one attention layer: for counting, not for timing."""
    small = {**_COMMON, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16}
    return _made(
        qwen3_next.Model(
            qwen3_next.ModelArgs(
                model_type="qwen3_next",
                num_hidden_layers=2,
                full_attention_interval=2,
                linear_num_value_heads=2,
                linear_num_key_heads=1,
                linear_key_head_dim=16,
                linear_value_head_dim=16,
                linear_conv_kernel_dim=4,
                shared_expert_intermediate_size=32,
                partial_rotary_factor=0.25,
                **{**small, "vocab_size": 256},
                **{**_EXPERTS, "num_experts": 2, "num_experts_per_tok": 1},
            )
        )
    )


def _made(model: nn.Module) -> nn.Module:
    model.eval()
    mx.eval(model.parameters())
    return model
