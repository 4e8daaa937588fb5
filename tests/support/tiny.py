"""Tiny random models of every family the cache meets, built by mlx-lm's own classes.

They are real models with sensible weights: tokens far back still move the logits, and a state that is
one token stale shows. Nothing is read from files, and the same name always has the same weights.
"""

import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
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
from mlx_lm.models.cache import make_prompt_cache

VOCAB = 160
"""Vocabulary size of every tiny model."""

WINDOW = 32
"""Tokens that a sliding or chunked attention layer of a tiny model sees."""

HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
SEED = 1162
EMBEDDING_NAMES = ("embed_tokens", "embeddings")

COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
}

GATED_DELTA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "max_position_embeddings": 32768,
    "head_dim": HEAD_DIM,
}

EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


def _qwen3_next() -> nn.Module:
    return qwen3_next.Model(
        qwen3_next.ModelArgs(
            model_type="qwen3_next",
            shared_expert_intermediate_size=32,
            mlp_only_layers=[],
            rope_theta=10000.0,
            partial_rotary_factor=0.25,
            **COMMON,
            **GATED_DELTA,
            **EXPERTS,
        )
    )


def _qwen3_5() -> nn.Module:
    text = {"model_type": "qwen3_5_text", **COMMON, **GATED_DELTA}
    return qwen3_5.Model(qwen3_5.ModelArgs(model_type="qwen3_5", text_config=text))


def _qwen3_5_moe() -> nn.Module:
    text = {
        "model_type": "qwen3_5_moe_text",
        "shared_expert_intermediate_size": 32,
        **COMMON,
        **GATED_DELTA,
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


def _weight(name: str, default: mx.array) -> mx.array:
    """A random float32 parameter of `default`'s shape whose scale suits what `name` does."""
    kind = name.rsplit(".", 1)[-1]
    noise = mx.random.normal(default.shape)
    if kind == "A_log":
        # Slow decay: with the classes' own default a state forgets within a few tokens, and a
        # restored state that is wrong further back would go unnoticed.
        return mx.log(mx.random.uniform(0.01, 0.5, default.shape))
    if kind == "recurrent_param":
        return -4.0 + 0.5 * noise
    if kind in {"dt_bias", "D"} or (kind == "weight" and default.ndim == 1):
        return 1.0 + 0.1 * noise
    if default.ndim == 0:
        return default
    if "bias" in kind or default.ndim == 1:
        return 0.1 * noise
    if name.split(".")[-2] in EMBEDDING_NAMES:
        return 0.5 * noise
    is_convolution = default.shape[-1] == 1
    fan_in = default.shape[-2] if is_convolution else default.shape[-1]
    return fan_in**-0.5 * noise


def fresh(name: str) -> nn.Module:
    """A new model of family `name`; the same weights every time.

    Its parameters are evaluated. What a module keeps outside `parameters()` (the frequencies of a
    scaled RoPE) stays lazy, as `mlx_lm.load` leaves it.
    """
    return made(ARCHITECTURES[name])


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` builds, with sensible weights; see `fresh`."""
    mx.random.seed(SEED)
    model = make()
    weights = [(path, _weight(path, array)) for path, array in tree_flatten(model.parameters())]
    model.update(tree_unflatten(weights))
    model.eval()
    mx.eval(model.parameters())
    return model


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    name: functools.partial(fresh, name) for name in ARCHITECTURES
}
"""Family name -> a function that makes a new model of it."""


@functools.cache
def build(name: str) -> nn.Module:
    """The one model of family `name` that this process shares; see `fresh`."""
    return FAMILIES[name]()


def random_tokens(n: int, seed: int) -> list[int]:
    """`n` token ids in `[0, VOCAB)`; a longer list with the same seed begins with the shorter one."""
    generator = random.Random(seed)
    return [generator.randrange(VOCAB) for _ in range(n)]


@functools.cache
def device_is_split_invariant() -> bool:
    """Whether this device computes a row's bits alike however many rows are read with it.

    True with the plain BLAS of the Linux CPU wheel; on a GPU the kernel depends on the shape.
    """
    mx.random.seed(SEED)
    rows, weight = mx.random.normal((130, HIDDEN)), mx.random.normal((HIDDEN, HIDDEN))
    query = mx.random.normal((1, HEADS, 130, HEAD_DIM))
    attend = functools.partial(
        mx.fast.scaled_dot_product_attention, k=query, v=query, scale=0.25, mask=None
    )
    return all(
        mx.array_equal((rows @ weight)[:n], rows[:n] @ weight).item()
        and mx.array_equal(attend(q=query)[:, :, :n], attend(q=query[:, :, :n])).item()
        for n in (1, 7, 64)
    )


class _NoisyEmbedding(nn.Module):
    """An embedding whose rows depend on the shape of the chunk they are read in."""

    def __init__(self, clean: nn.Module, scale: float) -> None:
        super().__init__()
        self.clean = clean
        self.scale = scale

    def __call__(self, tokens: mx.array) -> mx.array:
        """Embed tokens (B, L) as (B, L, D), each off by up to `scale` of its size."""
        embedded = self.clean(tokens)
        batch, length, dims = embedded.shape
        row = mx.arange(length)[:, None] * 0.11
        column = mx.arange(dims)[None, :] * 1.7
        phase = row + column + 0.37 * length + 0.53 * (batch - 1)
        return embedded * (1.0 + self.scale * mx.cos(phase)).astype(embedded.dtype)

    def as_linear(self, hidden: mx.array) -> mx.array:
        """The tied output head, (B, L, D) -> (B, L, VOCAB), without noise."""
        return self.clean.as_linear(hidden)


class NoisyChunks(nn.Module):
    """A model that reads a prompt differently when it is cut differently, as a GPU can.

    Hidden stream, logits and everything in its caches move by about `scale` (relative) with the
    batch size, the length of the chunk and the place in the chunk at which a token is read. Calls
    with equal chunks stay equal to the last bit. The wrapped model itself is left as it was.
    """

    def __init__(self, inner: nn.Module, scale: float = 1e-4) -> None:
        super().__init__()
        self.inner = inner
        self.scale = scale

    def __call__(self, inputs: mx.array, cache: Any = None, **options: Any) -> mx.array:
        """Tokens (B, L) -> logits (B, L, VOCAB); `cache` is updated in place."""
        owner, name = _embedding_slot(self.inner)
        clean = getattr(owner, name)
        setattr(owner, name, _NoisyEmbedding(clean, self.scale))
        try:
            return self.inner(inputs, cache=cache, **options)
        finally:
            setattr(owner, name, clean)

    @property
    def layers(self) -> Any:
        """The wrapped model's layers."""
        return self.inner.layers

    @property
    def args(self) -> Any:
        """The wrapped model's arguments."""
        return self.inner.args

    @property
    def model_type(self) -> str:
        """The wrapped model's type."""
        return self.inner.model_type

    def make_cache(self) -> list[Any]:
        """Empty caches, one for each layer."""
        return make_prompt_cache(self.inner)


def _embedding_slot(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the token embedding, and its attribute name there."""
    for _, module in model.named_modules():
        for name in EMBEDDING_NAMES:
            if isinstance(module.get(name), nn.Embedding):
                return module, name
    raise LookupError(f"no token embedding found in {type(model).__module__}")


def cold_caches(model: nn.Module, tokens: Sequence[int], step: int = 2048) -> list[Any]:
    """Fresh caches that have read all of `tokens`, in slices of at most `step` tokens."""
    caches = make_prompt_cache(model)
    for start in range(0, len(tokens), step):
        model(mx.array([tokens[start : start + step]]), cache=caches)
        mx.eval([cache.state for cache in caches])
    return caches


def next_logits(model: nn.Module, caches: list[Any], token: int) -> mx.array:
    """Logits (VOCAB,) after reading one more token; `caches` move on by one."""
    logits = model(mx.array([[token]]), cache=caches)[0, -1]
    mx.eval(logits)
    return logits


def cold_logits(model: nn.Module, tokens: Sequence[int], step: int = 2048) -> mx.array:
    """Logits (VOCAB,) after `tokens` on an empty cache: slices of `step`, the last token alone."""
    return next_logits(model, cold_caches(model, tokens[:-1], step), tokens[-1])
