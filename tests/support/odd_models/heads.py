"""Checkpoints with a multi-token-prediction head, made of each family's own modules at small size.

A head is fitted to one reply of its model, so that it is right there for what it is told, and for nothing else.
"""

import copy
import functools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import oracle
import tiny
from mlx.optimizers import Adam
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_hybridcache.drafting.head import HeadLayers

KINDS = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
"""Mixture of experts, dense, and mixture of experts as that family stores it."""

PROMPT = oracle.prompt(60, seed=3)
COUNT = 40

STEPS = 80
RATE = 1e-2


def text_of(model: Any) -> Any:
    """The part that has trunk and logits."""
    return getattr(model, "language_model", model)


def hidden_of(model: Any, tokens: Sequence[int]) -> mx.array:
    """What the model's last layer leaves of each token, behind the final norm: `(1, n, width)`."""
    out: mx.array = text_of(model).model(mx.array([tokens]))
    return out


def fresh_layers(model: Any, seed: int = 11) -> HeadLayers:
    """A head of random weights, with norms that differ from 1 by what every precision holds."""
    mx.random.seed(seed)
    args = text_of(model).args
    at = next(at for at, each in enumerate(model.layers) if hasattr(each, "self_attn"))
    layer = type(model.layers[at])(args, at)
    made = HeadLayers(args.hidden_size, args.rms_norm_eps, layer)
    for name, weight in tree_flatten(made.parameters()):
        if weight.ndim == 1:
            norm = 1 + mx.random.randint(-16, 17, weight.shape) / 64
            made.load_weights([(name, norm)], strict=False)
    mx.eval(made.parameters())
    return made


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The tokens of a greedy reply, by the model alone."""
    caches, feed, reply = make_prompt_cache(model), [*prompt], list[int]()
    for _ in range(count):
        logits = model(mx.array([feed]), cache=caches)[:, -1]
        feed = [int(oracle.never_ending(logits).item())]
        reply += feed
    return reply


@functools.cache
def fitted(name: str) -> HeadLayers:
    """A head that knows the reply of a tiny model to `PROMPT`."""
    model = tiny.build(name)
    return fit(model, [*PROMPT, *greedy(model, PROMPT, COUNT + 2)])


def fit(model: Any, tokens: Sequence[int]) -> HeadLayers:
    """A head that knows what follows each token but the first, where all that was read are `tokens`."""
    text = text_of(model)
    hidden = mx.stop_gradient(hidden_of(model, tokens))
    embedded = mx.stop_gradient(text.model.embed_tokens(mx.array([tokens])))
    logits_of = text.lm_head if "lm_head" in text else text.model.embed_tokens.as_linear
    wanted = mx.array([tokens[2:]])
    layers = fresh_layers(model)

    def loss(made: HeadLayers) -> mx.array:
        logits = logits_of(made(embedded[:, 1:-1], hidden[:, :-2], None))
        return nn.losses.cross_entropy(logits, wanted, reduction="mean")

    step, optimizer = nn.value_and_grad(layers, loss), Adam(RATE)
    for _ in range(STEPS):
        _, gradients = step(layers)
        optimizer.update(layers, gradients)
        mx.eval(layers.parameters(), optimizer.state)
    layers.eval()
    return layers


# Checkpoints


def write(directory: Path, model: Any, layers: HeadLayers | None, form: str = "raw") -> Path:
    """A model's directory with the weights of a head beside its own.

    `raw` is as the family's makers publish it, `converted` as MLX stores it, and `quantized` is that with a head of
    8 bits.
    """
    weights = dict(tree_flatten(model.parameters()))
    own = {} if layers is None else dict(tree_flatten(_quantized(layers, form).parameters()))
    if form == "raw":
        weights, own = _raw(model, weights), _raw_head(model, own)
    weights |= {f"mtp.{name}": array for name, array in own.items()}
    about = {"format": "pt" if form == "raw" else "mlx"}
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata=about)
    (directory / "config.json").write_text(json.dumps(_config(model)))
    return directory


def _config(model: Any) -> dict[str, Any]:
    return asdict(model.args)


def _quantized(layers: HeadLayers, form: str) -> HeadLayers:
    if form == "quantized":
        copied = fresh_copy(layers)
        nn.quantize(copied, group_size=32, bits=8)
        return copied
    return layers


def fresh_copy(layers: HeadLayers) -> HeadLayers:
    """The same weights in modules of their own."""
    return copy.deepcopy(layers)


def _raw(model: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    made = {}
    for name, array in weights.items():
        published = name.replace("language_model.model.", "model.language_model.")
        published = published.replace("language_model.lm_head", "lm_head")
        is_norm = name.endswith("norm.weight") and ".linear_attn.norm" not in name
        if "conv1d.weight" in name:
            made[published] = array.moveaxis(1, 2)
        else:
            made[published] = array - 1.0 if is_norm else array
    return _experts(model, made)


def _raw_head(model: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    whole = {name: array - 1.0 if array.ndim == 1 else array for name, array in weights.items()}
    return _experts(model, whole)


def _experts(model: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """One by one in Qwen3-Next, two of three matrices in one in Qwen3.5."""
    made: dict[str, mx.array] = {}
    is_joined = text_of(model) is not model
    for name, array in weights.items():
        layer, _, matrix = name.partition(".switch_mlp.")
        if not matrix:
            made[name] = array
        elif not is_joined:
            made |= {f"{layer}.experts.{at}.{matrix}": each for at, each in enumerate(array)}
        elif matrix == "gate_proj.weight":
            up = weights[f"{layer}.switch_mlp.up_proj.weight"]
            made[f"{layer}.experts.gate_up_proj"] = mx.concatenate([array, up], axis=-2)
        elif matrix == "down_proj.weight":
            made[f"{layer}.experts.down_proj"] = array
    return made
