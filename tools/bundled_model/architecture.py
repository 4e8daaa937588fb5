"""The bundled model's shape, and a fresh copy of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import qwen3_next
from tokenizers import Tokenizer

from .tokenizer import END_OF_TEXT, TURN_END, VOCABULARY

# Every linear layer reads a multiple of 64 features, so that it quantizes in groups of 64. Two
# recurrent heads: on a CPU reading a prompt costs a loop over tokens and its projections.
SHAPE: dict[str, Any] = {
    "model_type": "qwen3_next",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "attention_bias": False,
    "partial_rotary_factor": 0.25,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 131072,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
}

RESIDUAL_SCALE = 0.15


def fresh_model(seed: int) -> qwen3_next.Model:
    """A model of `SHAPE` with float32 parameters drawn from `seed`."""
    mx.random.seed(seed)
    model = qwen3_next.Model(qwen3_next.ModelArgs.from_dict(SHAPE))
    rng = np.random.default_rng(seed)
    heads = SHAPE["linear_num_value_heads"]
    for layer in model.layers:
        writes = [layer.mlp.switch_mlp.down_proj, layer.mlp.shared_expert.down_proj]
        if layer.is_linear:
            mixer = layer.linear_attn
            # mlx-lm's own values make a state forget within a token or two. As in Mamba-2
            # (arXiv 2405.21060), time steps start between 0.001 and 0.1.
            dt = np.exp(rng.uniform(math.log(1e-3), math.log(1e-1), heads))
            mixer.dt_bias = mx.array((dt + np.log(-np.expm1(-dt))).astype(np.float32))
            mixer.A_log = mx.array(np.log(rng.uniform(1, 16, heads)).astype(np.float32))
            writes.append(mixer.out_proj)
        else:
            writes.append(layer.self_attn.o_proj)
        # Layers begin as small corrections: at full size the first drowns the embeddings. Lookups
        # alone stood at a loss of 1.09 after 50 steps, against 1.44 at full size.
        for linear in writes:
            linear.weight = linear.weight * RESIDUAL_SCALE
    mx.eval(model.parameters())
    return model


def write_config(directory: Path) -> None:
    """Write config.json and generation_config.json; the tokenizer must be there already."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ends = [tokenizer.token_to_id(TURN_END), tokenizer.token_to_id(END_OF_TEXT)]
    config = {
        "architectures": ["Qwen3NextForCausalLM"],
        **SHAPE,
        "hidden_act": "silu",
        "dtype": "float32",
        "eos_token_id": ends,
        "pad_token_id": ends[1],
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"eos_token_id": ends, "pad_token_id": ends[1], "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
