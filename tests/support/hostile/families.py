"""The models of the hostile rounds: one or two layers of every kind that replies and rows can go wrong in."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import tiny
from mlx_lm.models import (
    deepseek_v3,
    deepseek_v41,
    gemma2,
    gemma3_text,
    internlm2,
    llama,
    mamba,
    mamba2,
    qwen3_moe,
    qwen3_next,
    rwkv7,
)

HIDDEN = 32
HEAD_DIM = 8
WINDOW = 16
"""Tokens that the sliding layers see: less than any prompt here."""

SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": tiny.VOCAB,
}

EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "max_position_embeddings": 4096,
    "head_dim": HEAD_DIM,
}


def _mamba2() -> nn.Module:
    return mamba2.Model(
        mamba2.ModelArgs(
            model_type="mamba2",
            num_heads=4,
            head_dim=16,
            vocab_size=tiny.VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=64,
            state_size=16,
            num_hidden_layers=2,
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


def _mamba() -> nn.Module:
    return mamba.Model(
        mamba.ModelArgs(
            model_type="mamba",
            vocab_size=tiny.VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=64,
            state_size=8,
            num_hidden_layers=2,
            conv_kernel=4,
            use_bias=False,
            use_conv_bias=True,
            time_step_rank=4,
        )
    )


def _rwkv7() -> nn.Module:
    return rwkv7.Model(
        rwkv7.ModelArgs(
            model_type="rwkv7",
            vocab_size=tiny.VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=48,
            norm_eps=1e-5,
            head_dim=HEAD_DIM,
            num_hidden_layers=2,
            a_low_rank_dim=8,
            v_low_rank_dim=8,
            gate_low_rank_dim=8,
            decay_low_rank_dim=8,
        )
    )


def _gemma3_text() -> nn.Module:
    return gemma3_text.Model(
        gemma3_text.ModelArgs(
            model_type="gemma3_text",
            num_hidden_layers=2,
            head_dim=HEAD_DIM,
            query_pre_attn_scalar=HEAD_DIM,
            sliding_window=WINDOW,
            sliding_window_pattern=2,
            **SIZES,
        )
    )


def _gemma2(kv_heads: int) -> nn.Module:
    return gemma2.Model(
        gemma2.ModelArgs(
            model_type="gemma2",
            num_hidden_layers=2,
            head_dim=HEAD_DIM,
            query_pre_attn_scalar=HEAD_DIM,
            **{**SIZES, "num_attention_heads": 2 * kv_heads, "num_key_value_heads": kv_heads},
        )
    )


def _deepseek_v3() -> nn.Module:
    return deepseek_v3.Model(
        deepseek_v3.ModelArgs(
            num_hidden_layers=2,
            moe_intermediate_size=16,
            n_shared_experts=1,
            n_routed_experts=4,
            num_experts_per_tok=2,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            first_k_dense_replace=1,
            **{**SIZES, "num_key_value_heads": 4},
        )
    )


def deepseek_v41_ratios(*ratios: int) -> nn.Module:
    """A layer for each ratio, in tokens a row, which makes its own rows; one of 0 has a window alone."""
    sources = tuple(layer for layer, ratio in enumerate(ratios) if ratio)
    return deepseek_v41.Model(
        deepseek_v41.ModelArgs(
            vocab_size=tiny.VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=len(ratios),
            num_attention_heads=4,
            head_dim=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            o_groups=2,
            o_lora_rank=16,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            sliding_window=WINDOW,
            compress_ratios=ratios,
            kv_source_layer_ids=sources,
            index_source_layer_ids=sources,
            index_n_heads=2,
            index_head_dim=16,
            index_topk=6,
            rms_norm_eps=1e-6,
        )
    )


def _qwen3_next() -> nn.Module:
    return qwen3_next.Model(
        qwen3_next.ModelArgs(
            model_type="qwen3_next",
            num_hidden_layers=2,
            linear_num_value_heads=2,
            linear_num_key_heads=1,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_conv_kernel_dim=4,
            full_attention_interval=2,
            shared_expert_intermediate_size=16,
            rope_theta=10000.0,
            partial_rotary_factor=0.5,
            **SIZES,
            **EXPERTS,
        )
    )


def _qwen3_moe() -> nn.Module:
    return qwen3_moe.Model(
        qwen3_moe.ModelArgs(
            model_type="qwen3_moe",
            num_hidden_layers=2,
            tie_word_embeddings=False,
            rope_theta=10000.0,
            **SIZES,
            **EXPERTS,
        )
    )


def _llama() -> nn.Module:
    return llama.Model(llama.ModelArgs(model_type="llama", num_hidden_layers=2, **SIZES))


def _internlm2() -> nn.Module:
    return internlm2.Model(
        internlm2.ModelArgs(
            model_type="internlm2",
            num_hidden_layers=2,
            max_position_embeddings=4096,
            rope_scaling={"type": "dynamic", "factor": 2.0},
            **SIZES,
        )
    )


COLD_STEP = 32
"""Cold runs are read in slices of so many tokens."""


@dataclass(frozen=True)
class Family:
    """One model with its cold runs, which rounds share. `bound` is how far a log-probability may be off where a state or a row was made, or is
    read on, by single tokens, or in other blocks than cold; 0.0 promises equal bits.
    `batches` says that its replies decode together.
    """

    make: Callable[[], nn.Module]
    bound: float = 0.0
    batches: bool = True
    runs: list[tuple[list[int], oracle.Array]] = field(default_factory=list)

    @functools.cached_property
    def model(self) -> nn.Module:
        """The one that this process shares."""
        return tiny.made(self.make)

    def cold(self, tokens: Sequence[int], then: Sequence[int]) -> tuple[list[int], oracle.Array]:
        """Some tokens that begin with `tokens`, and the logits `(n, VOCAB)` of a cold run at each of them.

        Those that go on with `then`, unless there is a run already that goes on otherwise.
        """
        wanted, least = list(tokens), len(tokens) + len(then)
        for run in self.runs:
            if len(run[0]) >= least and run[0][: len(wanted)] == wanted:
                return run
        whole = [*wanted, *then]
        if len(whole) % COLD_STEP == 1:  # a slice of one token may round otherwise
            whole.append(then[0])
        self.runs.append((whole, oracle.cold_logits(self.model, whole, COLD_STEP)))
        return self.runs[-1]


def log_probabilities(logits: oracle.Array) -> oracle.Array:
    """As mlx-lm computes them."""
    given = mx.array(logits)
    return np.array(given - mx.logsumexp(given, axis=-1, keepdims=True))


ROUNDING = 1e-4

FAMILIES: dict[str, Family] = {
    "mamba2": Family(_mamba2, ROUNDING),  # computed in blocks of 256
    "mamba": Family(_mamba),
    "rwkv7": Family(_rwkv7),
    "gemma3_text": Family(
        _gemma3_text, ROUNDING, batches=False
    ),  # past its window the ring is summed in its own order
    "deepseek_v3": Family(
        _deepseek_v3, ROUNDING
    ),  # a single token folds the projection into its query
    "deepseek_v41": Family(
        functools.partial(deepseek_v41_ratios, 0, 4, 16, 1), ROUNDING, batches=False
    ),  # as many keys as a slice has beside its window are summed
    "gemma2": Family(functools.partial(_gemma2, 2), batches=False),
    "gemma2_wide": Family(functools.partial(_gemma2, 4), batches=False),
    "qwen3_next": Family(_qwen3_next),
    "qwen3_moe": Family(_qwen3_moe),
    "internlm2": Family(_internlm2, batches=False),
    "llama": Family(_llama),
}
"""Recurrent layers alone (three), a window, latent attention, compressed rows, soft caps (two), experts (two), a RoPE that
knows one position only, and plain rows.
"""
