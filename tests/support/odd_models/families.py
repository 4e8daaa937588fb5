"""Tiny random models of families whose caches or weights behave in a way of their own.

Each is here for one trait; `TRAITS` names it, `LIMITS` those whose results depend on slices. Built as in `tiny`, but not part of its `FAMILIES`, over which
much of the suite runs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import mlx.nn as nn
import tiny
import tiny_models
from mlx_lm.models import (
    gemma3n,
    internlm2,
    kimi_k3,
    longcat_flash_ngram,
    minimax_m3_vl,
    plamo3,
    qwen3_next,
)

nemotron_nas = importlib.import_module("mlx_lm.models.nemotron-nas")


def _nemotron_nas() -> nn.Module:
    attention = {"n_heads_in_group": 2}
    blocks = [attention, {"replace_with_linear": True}, {"no_op": True}, attention]
    return nemotron_nas.Model(
        nemotron_nas.ModelArgs(
            hidden_size=tiny_models.HIDDEN,
            num_hidden_layers=len(blocks),
            num_attention_heads=tiny_models.HEADS,
            vocab_size=tiny.VOCAB,
            block_configs=[{"attention": each, "ffn": {"ffn_mult": 1.0}} for each in blocks],
        )
    )


def _minimax_m3_vl() -> nn.Module:
    text = {
        **tiny_models.COMMON,
        "head_dim": tiny_models.HEAD_DIM,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sparse_attention_config": {
            "sparse_num_index_heads": 2,
            "sparse_index_dim": 16,
            "sparse_block_size": 16,
            "sparse_topk_blocks": 3,
        },
    }
    return minimax_m3_vl.Model(minimax_m3_vl.ModelArgs(text_config=text))


def _kimi_k3() -> nn.Module:
    text = {
        **tiny_models.COMMON,
        "num_hidden_layers": 4,
        "num_key_value_heads": tiny_models.HEADS,
        "linear_attn_config": {
            "full_attn_layers": [2, 4],
            "kda_layers": [1, 3],
            "num_heads": tiny_models.HEADS,
            "head_dim": tiny_models.HEAD_DIM,
            "short_conv_kernel_size": 4,
        },
        "attn_res_block_size": 2,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 0,
        "v_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    }
    return kimi_k3.Model(kimi_k3.ModelArgs(text_config=text))


def _longcat_flash_ngram() -> nn.Module:
    return longcat_flash_ngram.Model(
        longcat_flash_ngram.ModelArgs(
            model_type="longcat_flash_ngram",
            hidden_size=tiny_models.HIDDEN,
            ffn_hidden_size=96,
            moe_topk=2,
            expert_ffn_hidden_size=32,
            n_routed_experts=4,
            zero_expert_num=1,
            num_layers=2,
            vocab_size=tiny.VOCAB,
            max_position_embeddings=4096,
            num_attention_heads=tiny_models.HEADS,
            kv_lora_rank=32,
            q_lora_rank=32,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            routed_scaling_factor=1.0,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            mla_scale_q_lora=True,
            mla_scale_kv_lora=True,
            ngram_vocab_size_ratio=2,
        )
    )


def _gemma3n() -> nn.Module:
    text = {
        **tiny_models.COMMON,
        "model_type": "gemma3n_text",
        "num_hidden_layers": 4,
        "head_dim": tiny_models.HEAD_DIM,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": tiny.VOCAB,
        "sliding_window": tiny_models.WINDOW,
        "max_position_embeddings": 4096,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 10000.0,
        "final_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 3,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    }
    return gemma3n.Model(gemma3n.ModelArgs(model_type="gemma3n", text_config=text))


DYNAMIC = {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}


def _internlm2() -> nn.Module:
    return internlm2.Model(
        internlm2.ModelArgs(
            model_type="internlm2",
            num_hidden_layers=2,
            max_position_embeddings=LIMITS["internlm2"],
            rope_scaling=DYNAMIC,
            **tiny_models.COMMON,
        )
    )


def _qwen3_next_dynamic() -> nn.Module:
    return qwen3_next.Model(
        qwen3_next.ModelArgs(
            model_type="qwen3_next",
            shared_expert_intermediate_size=32,
            mlp_only_layers=[],
            rope_theta=10000.0,
            rope_scaling=DYNAMIC,
            partial_rotary_factor=1.0,
            **tiny_models.COMMON,
            **{**tiny_models.GATED_DELTA, "max_position_embeddings": LIMITS["qwen3_next_dynamic"]},
            **tiny_models.EXPERTS,
        )
    )


def _plamo3() -> nn.Module:
    return plamo3.Model(
        plamo3.ModelArgs(
            num_hidden_layers=4,
            head_dim=tiny_models.HEAD_DIM,
            window_size=LIMITS["plamo3"],
            sliding_window_pattern=2,
            **tiny_models.COMMON,
        )
    )


LIMITS = {"internlm2": 128, "qwen3_next_dynamic": 100, "plamo3": tiny_models.WINDOW}
"""Tokens beyond which mlx-lm itself computes something else when it slices a prompt otherwise."""

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "nemotron_nas": _nemotron_nas,
    "minimax_m3_vl": _minimax_m3_vl,
    "kimi_k3": _kimi_k3,
    "longcat_flash_ngram": _longcat_flash_ngram,
    "gemma3n": _gemma3n,
    "internlm2": _internlm2,
    "qwen3_next_dynamic": _qwen3_next_dynamic,
    "plamo3": _plamo3,
}

TRAITS = {
    "nemotron_nas": "one layer has a cache that it never fills",
    "minimax_m3_vl": "a cache of keys alone: its values have no width",
    "kimi_k3": "the same, under recurrent layers",
    "longcat_flash_ngram": "a state whose shape grows with the first tokens",
    "gemma3n": "each forward puts new arrays in place of weights",
}


@functools.cache
def build(name: str) -> Any:
    """The one model of that name which this process shares."""
    return tiny.made(BUILDERS[name])
