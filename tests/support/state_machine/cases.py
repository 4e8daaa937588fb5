"""What the state machine runs: small models with their settings, prompts, and what they are held against."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import tiny
import tiny_models
from mlx_lm.models import deepseek_v41, qwen3, qwen3_5
from mlx_lm.models.cache import make_prompt_cache
from odd_models import heads
from odd_models.quantizing import Quantized


@functools.cache
def hybrid() -> nn.Module:
    """One gated-delta layer under one of attention, quick on the CPU: a checkpoint weighs 36 KiB, as
    much as 72 tokens' rows, and either is large beside what MLX rounds an array up to.
    """
    text = {
        "model_type": "qwen3_5_text",
        **tiny_models.COMMON,
        **tiny_models.GATED_DELTA,
        "num_hidden_layers": 2,
        "full_attention_interval": 2,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "head_dim": 32,
    }
    return _made(qwen3_5.Model, qwen3_5.ModelArgs(model_type="qwen3_5", text_config=text))


@functools.cache
def hybrids_head() -> Path:
    """Where a head of random weights for it lies."""
    where = Path(tempfile.mkdtemp(prefix="headed-"))
    atexit.register(shutil.rmtree, where, ignore_errors=True)
    return heads.write(where, hybrid(), heads.fresh_layers(hybrid()))


@functools.cache
def rows_only() -> nn.Module:
    """Two layers of attention: 1 KiB a token, and every position restores."""
    return _made(
        qwen3.Model,
        qwen3.ModelArgs(
            model_type="qwen3",
            num_hidden_layers=2,
            max_position_embeddings=32768,
            head_dim=32,
            tie_word_embeddings=True,
            rope_theta=10000.0,
            **tiny_models.COMMON,
        ),
    )


@functools.cache
def compressed() -> nn.Module:
    """A layer with a row for each four tokens under one with a row for each three: 0.3 KiB a token, and 38 KiB
    of windows and open groups a checkpoint.
    """
    return _made(
        deepseek_v41.Model,
        deepseek_v41.ModelArgs(
            vocab_size=tiny.VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=128,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            o_groups=2,
            o_lora_rank=16,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            sliding_window=32,
            compress_ratios=(4, 3),
            kv_source_layer_ids=(0, 1),
            index_source_layer_ids=(0, 1),
            index_n_heads=2,
            index_head_dim=16,
            index_topk=2,
            rms_norm_eps=1e-6,
        ),
    )


def _made(make: Callable[[Any], nn.Module], shape: Any) -> nn.Module:
    mx.random.seed(tiny.SEED)
    model = make(shape)
    model.eval()
    mx.eval(model.parameters())
    return model


@dataclass(frozen=True)
class Case:
    """A model with the settings that it is run with, and its colds. `draft` is a draft model for it.

    Its logits depend on the slices by as much as `rounding`, and its caches hold what they `grow` to, not
    what is claimed for them.
    """

    model: Callable[[], nn.Module]
    draft: Callable[[], nn.Module] | None
    settings: dict[str, Any] = field(default_factory=dict)
    rounding: float = 0.0
    grow: bool = False
    colds: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)

    def cold(self, tokens: tuple[int, ...]) -> np.ndarray:
        """What plain mlx-lm says."""
        if tokens not in self.colds:
            if self.quantized is None:
                caches = tiny.cold_caches(self.model(), tokens[:-1], oracle.STEP)
                self.colds[tokens] = logits(self.model(), caches, tokens[-1:])
            else:
                self.colds[tokens] = self._cold_quantized(self.quantized, tokens)
        return self.colds[tokens]

    @property
    def drafts(self) -> bool:
        """Whether its replies can be drafted."""
        return self.draft is not None and not self.settings.get("exact")

    @property
    def head(self) -> Path | None:
        """Where the model's own head lies, if it has one that may draft."""
        return hybrids_head() if self.drafts and self.model is hybrid else None

    @property
    def quantized(self) -> Quantized | None:
        """What its rows are quantized to."""
        bits = self.settings.get("kv_bits")
        return bits and Quantized(
            bits, self.settings["quantized_kv_start"], self.settings["kv_group_size"]
        )

    def _cold_quantized(self, quantized: Quantized, tokens: Sequence[int]) -> np.ndarray:
        model, read = self.model(), list(tokens)
        caches = list(make_prompt_cache(model))
        found = [quantized.read(model, caches, read, 0, oracle.STEP)[-1]]
        for _ in range(2):
            read.append(int(found[-1].argmax()))
            found += [*quantized.read(model, caches, read[-1:], len(read) - 1, oracle.STEP)]
        return np.stack(found)


CASES = {
    "hybrid": Case(hybrid, rows_only),
    "limits": Case(hybrid, hybrid, {"max_conversations": 8, "max_checkpoints": 5}),
    "exact": Case(hybrid, hybrid, {"exact": True}),
    "rows": Case(rows_only, hybrid),
    "quantized": Case(
        hybrid, hybrid, {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 100}
    ),
    # As many keys as a slice has beside its window are summed.
    "compressed": Case(compressed, None, rounding=1e-4, grow=True),
}


def logits(model: nn.Module, caches: list[Any], rest: Sequence[int]) -> np.ndarray:
    """Logits `(3, VOCAB)` of reading `rest` and of two greedy tokens behind it."""
    feed, steps = list(rest), []
    for _ in range(3):
        found = model(mx.array([feed]), cache=caches)[:, -1]
        mx.eval(found, [cache.state for cache in caches])
        steps.append(np.array(found[0]))
        feed = [int(found.argmax().item())]
    return np.stack(steps)


@functools.cache
def prompt(family: int, length: int, fork: tuple[int, int] | None) -> tuple[int, ...]:
    """Tokens of one of a few families; a fork `(at, variant)` leaves the family's own text there."""
    tokens = oracle.prompt(600, seed=family, openers=[40, 90])
    if fork is not None:
        at, variant = fork
        tokens = [*tokens[:at], *oracle.prompt(600 - at, seed=100 + 10 * at + variant)]
    return tuple(tokens[:length])
