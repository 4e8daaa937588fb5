"""A tiny model whose cached arrays are large beside what MLX rounds each of them up to."""

from functools import cache

import mlx.core as mx
import mlx.nn as nn
import tiny
import tiny_models
from mlx_lm.models import qwen3_next


@cache
def wide_model(layers: int = 2) -> nn.Module:
    """A Qwen3-Next, half of its layers attention, whose arrays are large beside what MLX rounds each of them up to.

    Of two layers, a checkpoint weighs 265 KiB, as much as 265 tokens' rows. MLX hands out a recycled buffer of up
    to two pages more than was asked for, which is most of a small model's array.
    """
    mx.random.seed(tiny.SEED)
    model = qwen3_next.Model(
        qwen3_next.ModelArgs(
            model_type="qwen3_next",
            shared_expert_intermediate_size=32,
            mlp_only_layers=[],
            rope_theta=10000.0,
            partial_rotary_factor=0.25,
            **tiny_models.COMMON,
            **tiny_models.EXPERTS,
            **{
                **tiny_models.GATED_DELTA,
                "num_hidden_layers": layers,
                "full_attention_interval": 2,
                "linear_num_key_heads": 1,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
                "head_dim": 64,
            },
        )
    )
    model.eval()
    mx.eval(model.parameters())
    return model
