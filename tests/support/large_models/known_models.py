"""Configurations of models that are too large to test with, as far as mlx-lm reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_hybridcache_bench.kit.standin import Shapes

_HYBRID: dict[str, Any] = {
    "full_attention_interval": 4,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}

_QWEN3_5: dict[str, Any] = {
    **_HYBRID,
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 248_320,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "dtype": "bfloat16",
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-next-80b": {
        **_HYBRID,
        "model_type": "qwen3_next",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "linear_num_value_heads": 32,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "intermediate_size": 5120,
        "mlp_only_layers": [],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10_000_000,
        "vocab_size": 151_936,
        "dtype": "bfloat16",
    },
    "qwen3.5-35b": {
        "model_type": "qwen3_5_moe",
        "text_config": {
            **_QWEN3_5,
            "hidden_size": 2048,
            "num_hidden_layers": 40,
            "num_attention_heads": 16,
            "linear_num_value_heads": 32,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
        },
    },
    "qwen3.5-122b": {
        "model_type": "qwen3_5_moe",
        "text_config": {
            **_QWEN3_5,
            "hidden_size": 3072,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "linear_num_value_heads": 64,
            "moe_intermediate_size": 1024,
            "shared_expert_intermediate_size": 1024,
        },
    },
}

SHAPES = {
    "qwen3-next-80b": Shapes(),
    "qwen3.5-35b": Shapes(attention_layers=10, recurrent_layers=30),
    "qwen3.5-122b": Shapes(value_heads=64, channels=2 * 16 * 128 + 64 * 128),
}
"""The shapes of their caches, as they were published, for `StandIn` to allocate."""

PARAMETERS = {"qwen3-next-80b": 80e9, "qwen3.5-35b": 35e9, "qwen3.5-122b": 122e9}
"""How many they say they have."""


def directory(path: Path, name: str, **more: Any) -> str:
    """A model directory with nothing but the configuration of `name`."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIGS[name], **more}))
    return str(path)
