"""A hybrid that computes almost nothing, made on the spot: what is measured is what is around it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_next
from mlx_lm.utils import save_model

from ..kit.text import tokenizer_of
from .vocabulary import write_tokenizer

WORD = "7"
"""What it writes, token by token: a digit is a token of its own, so that a reply has the same tokens in the next prompt."""

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "partial_rotary_factor": 0.25,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 262_144,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 1,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 1,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
"""A Gated-DeltaNet layer and one of attention: as few as a hybrid has."""


def make_model(
    directory: Path, vocabulary: str, seed: int = 15, shapes: Mapping[str, Any] | None = None
) -> int:
    """Write config, weights and tokenizer into a folder; how many parameters the model has. `shapes` are other values of
    `CONFIG`.
    """
    entries = write_tokenizer(vocabulary, directory)
    tokenizer: Any = tokenizer_of(str(directory))
    config = {
        **CONFIG,
        **(shapes or {}),
        "vocab_size": entries,
        "eos_token_id": tokenizer.eos_token_id,
    }
    mx.random.seed(seed)
    model = qwen3_next.Model(qwen3_next.ModelArgs.from_dict(config))
    (word,) = tokenizer.encode(WORD, add_special_tokens=False)
    _always(model, word)
    save_model(directory, model)
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    parameters: Any = tree_flatten(model.parameters())
    return sum(value.size for _, value in parameters)


def _always(model: Any, word: int) -> None:
    """Whatever it has read, `word` is next: every embedding has one large number, and only its logit sees it."""
    embeddings, head = model.model.embed_tokens, model.lm_head
    embeddings.weight[:, 0] = 100.0
    head.weight[:, 0] = 0.0
    head.weight[word, 0] = 100.0
