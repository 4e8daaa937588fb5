"""What the names of a family's fields do not tell: kinds of layers in a row, and the arguments of its parts."""

from __future__ import annotations

from typing import Any

MIXED = ["sliding_attention", "full_attention"]
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LLAMA_4 = {
    "rope_theta": 10000.0,
    "rope_type": "default",
    "type": "default",
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 64,
}
BY_KIND = {kind: {"rope_theta": 10000.0, "rope_type": "default"} for kind in MIXED}
LATENT = {"num_key_value_heads": 4}
CONVOLUTION = {"layer_types": ["conv", "full_attention"], "conv_bias": False}
RECURRENT = {"head_dim": 16, "layer_group_size": 2, "num_hidden_layers": 4}

OVERRIDES: dict[str, dict[str, Any]] = {
    "afm7": {"num_layers": 3, "num_kv_reuse_layers": 1},
    "afmoe": {"layer_types": MIXED},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "bailing_hybrid": {**RECURRENT, **LATENT, "group_norm_size": 2},
    "bailing_moe_linear": {**RECURRENT, "group_norm_size": 2},
    "bailing_moe_v3": RECURRENT,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"rope_scaling": YARN, **LATENT},
    "deepseek_v32": LATENT,
    "deepseek_v41": {
        "num_hidden_layers": 4,
        "sliding_window": 16,
        "compress_ratios": (0, 4, 4, 0),
        "kv_source_layer_ids": (1,),
        "index_source_layer_ids": (1,),
        "rms_norm_eps": 1e-6,
    },
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": MIXED, "is_moe_layer": [False, True]},
    "gear": {"num_hidden_layers": 3, "layer_types": ["conv_mixer", *MIXED]},
    "gemma4_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": MIXED * 3,
        "rope_parameters": None,
    },
    "glm_moe_dsa": LATENT,
    "hunyuan": {
        "num_hidden_layers": 4,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "alpha": 2.0, "factor": 1.0},
    },
    "hunyuan_v1_dense": {
        "rope_scaling": {"type": "dynamic", "alpha": 2.0, "factor": 1.0, "beta_fast": 32}
    },
    "deepseek_v3": LATENT,
    "kimi_vl": {"text_config": LATENT},
    "kimi_linear": {
        **LATENT,
        "num_hidden_layers": 2,
        "linear_attn_config": {
            "full_attn_layers": [2],
            "kda_layers": [1],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
        },
    },
    "laguna": {"layer_types": ["full_attention", "sliding_attention"]},
    "lfm2": {**CONVOLUTION, "block_multiple_of": 8, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": CONVOLUTION,
    "llama": {"layer_types": MIXED, "sliding_window": 32},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 1,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "mellum": {"layer_types": MIXED, "rope_parameters": BY_KIND},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0],
        "moe_layer_freq": [0, 1],
        "routed_scaling_factor": 1.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
        "partial_rotary_factor": 0.5,
    },
    "minicpm": {"dim_model_base": 64},
    "minicpm3": {
        "dim_model_base": 64,
        "rope_scaling": {
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
        },
    },
    "ministral3": {"layer_types": MIXED, "rope_parameters": LLAMA_4},
    "mistral4": {"rope_parameters": {**LLAMA_4, "type": "default"}, **LATENT},
    "muse_glimmer": {"num_hidden_layers": 4},
    "muse_spark": {
        "text_config": {
            "layer_rope_theta": [10000.0] * 2,
            "layer_types": MIXED,
            "moe_hidden_size": 32,
            "num_shared_experts": 0,
        }
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "moe"],
        "num_hidden_layers": 4,
        "routed_scaling_factor": 1.0,
    },
    "olmo": {"mlp_hidden_size": 192, "embedding_size": 160},
    "olmo3": {"layer_types": MIXED},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "openelm": {
        "num_transformer_layers": 2,
        "ffn_dim_divisor": 8,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 1.5],
    },
    # It writes into the logits of fixed tokens, far behind a small vocabulary.
    "phi3small": {"dense_attention_every_n_layers": 2, "vocab_size": 100352},
    "plamo": {"n_shared_head": 2},
    "prism_hadamard_qwen35": {
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {
                "path": "model.layers.0.mlp.down_proj",
                "embedding": False,
                "dtype": "float16",
                "block": 512,
            }
        ],
        "text_config": {"num_hidden_layers": 4, "intermediate_size": 512, "num_experts": 0},
    },
    "qwen": {"kv_channels": 16},
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "spark2_5": {"hidden_act": "gelu", "layer_types": MIXED, "rope_parameters": BY_KIND},
    "step3p5": {"layer_types": ["full_attention", "sliding_attention"]},
    "youtu_llm": LATENT,
}
"""Family (or the family that its text part is) -> arguments that take precedence over those by name."""

TEXT: dict[str, tuple[str, str]] = {
    "gemma3": ("gemma3_text", "ModelArgs"),
    "gemma4": ("gemma4_text", "ModelArgs"),
    "kimi_k25": ("deepseek_v3", "ModelArgs"),
    "kimi_vl": ("kimi_vl", "TextArgs"),
    "lfm2-vl": ("lfm2", "ModelArgs"),
    "mistral3": ("ministral3", "ModelArgs"),
    "muse_spark": ("muse_spark", "TextArgs"),
    "pixtral": ("llama", "ModelArgs"),
    "prism_hadamard_qwen35": ("qwen3_5", "TextModelArgs"),
    "qwen2_vl": ("qwen2", "ModelArgs"),
    "qwen3_vl": ("qwen3", "ModelArgs"),
    "qwen3_vl_moe": ("qwen3_moe", "ModelArgs"),
}
"""Family with a text part -> the module and the class of the part's arguments."""
