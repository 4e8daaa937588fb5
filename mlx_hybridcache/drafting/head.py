"""A checkpoint's multi-token-prediction head: one layer that drafts out of the model's own hidden states.

For a token it puts together what the model's last layer left of it, behind the final norm, and the embedding of the
token behind; its output gives the token after that one, by the model's own embeddings and logits, and stands for the
hidden state of the token in between. So it drafts on from what it drafted. Published with Qwen3-Next; DeepSeek-V3's
(arXiv 2412.19437) is of the kind, but reads the hidden state before the final norm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.utils import infer_quant_config

from .. import models
from ..caches.hidden import telling
from ..caches.layout import STATE_CACHE, Layout, fresh_caches
from ..errors import ModelError, SettingError
from .at_work import AtWork
from .head_weights import Weights, head_weights

MOST_SAID = 300
"""Characters of what MLX says of weights that do not fit: it names each of them."""


class HeadLayers(nn.Module):
    """The head's own parts, under the names that checkpoints give them."""

    def __init__(self, width: int, eps: float, layer: nn.Module):
        super().__init__()  # type: ignore[no-untyped-call]  # as mlx has it
        self.pre_fc_norm_embedding = nn.RMSNorm(width, eps=eps)
        self.pre_fc_norm_hidden = nn.RMSNorm(width, eps=eps)
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = [layer]
        self.norm = nn.RMSNorm(width, eps=eps)

    def __call__(self, embedded: mx.array, hidden: mx.array, cache: Any) -> mx.array:
        parts = [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)]
        x = self.fc(mx.concatenate(parts, axis=-1))
        out: mx.array = self.norm(self.layers[0](x, create_attention_mask(x, cache), cache))
        return out


class Head(AtWork):
    """The head of one model, which tells it of its hidden states until `release`.

    To what stores prompts it is a model of its own with a `layout` of its own: rows of its one layer, and beside them, as a
    state, the hidden state of the last token that was read. The token behind that is not known yet, so there is no
    row for it. `digest` says which head it is, by its weights.
    """

    def __init__(self, model: Any, layout: Layout, layers: HeadLayers, leaf: int):
        super().__init__()
        self._model = model
        self._beside = layout
        self._layers = layers
        self._leaf = leaf
        self.layout = Layout.of(self, storing=layout.storing)
        models.evaluate(layers)
        self.digest = models.fingerprint(layers)
        self._telling = telling(_text(model).model)

    @classmethod
    def of(cls, model: Any, layout: Layout, source: str | Path) -> Head:
        """The head in the model's own checkpoint, a directory or a repository that was loaded from the hub.

        Raises `SettingError` where it has none, or one that is not known, `ModelError` where it cannot be read.
        """
        text = _text(model)
        leaf = _attention(model)
        if leaf is None or not hasattr(getattr(text, "model", None), "embed_tokens"):
            raise SettingError(
                "draft_mtp cannot be used with this model: no multi-token-prediction head of its family is known. "
                "Use draft_model, or draft_from_cache."
            )
        weights = head_weights(_directory(source))
        _check(weights, source)
        layer = type(model.layers[leaf])(text.args, leaf)
        layers = HeadLayers(text.args.hidden_size, text.args.rms_norm_eps, layer)
        try:
            _fill(layers, weights)
            return cls(model, layout, layers, leaf)
        except ValueError as error:
            raise SettingError(
                f"draft_mtp: the mtp.* weights of {source} do not fit this model: {str(error)[:MOST_SAID]}"
            ) from error

    def release(self) -> None:
        """Let the model be what it was."""
        self._telling.release()

    # As a model

    @property
    def model_type(self) -> str:
        """What its files are named by."""
        return f"{getattr(self._model, 'model_type', '')} mtp"

    @property
    def layers(self) -> list[nn.Module]:
        """As of a model."""
        return self._layers.layers

    def modules(self) -> list[Any]:
        """As of a model: its own."""
        return [*self._layers.modules()]  # type: ignore[no-untyped-call]  # as mlx has it

    def make_cache(self) -> list[Any]:
        """For its rows: as the model's own attention layers have, in full precision; and for what waits."""
        return [fresh_caches(self._model)[self._leaf], STATE_CACHE()]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Logits, with embeddings in the place of hidden states: they are alike in all but their numbers."""
        rows, waiting = cache
        hidden = _text(self._model).model.embed_tokens(tokens)
        waiting[0] = hidden[:, -1:]
        return self._logits(self.read(tokens, hidden, rows))

    # While it drafts

    def position(self, caches: list[Any]) -> int:
        """Where a request's caches stand."""
        position = self._beside.kinds[self._leaf].position(caches[self._leaf])
        assert position is not None, "layers with rows know their position"
        return position

    def read(self, tokens: mx.array, hidden: mx.array, cache: Any) -> mx.array:
        """Its output, `(1, n, width)`, for hidden states of that shape and the token behind each, `(1, n)`."""
        return self._layers(_text(self._model).model.embed_tokens(tokens), hidden, cache)

    def likeliest(self, output: mx.array) -> mx.array:
        """The token, `(1, 1)`, that follows the one of the last output."""
        return mx.argmax(self._logits(output[:, -1:]), axis=-1)

    def _logits(self, output: mx.array) -> mx.array:
        text = _text(self._model)
        is_tied = text.args.tie_word_embeddings
        logits: mx.array = (
            text.model.embed_tokens.as_linear(output) if is_tied else text.lm_head(output)
        )
        return logits


def _text(model: Any) -> Any:
    """The part of a model that reads text: it has the trunk, the logits and their arguments."""
    return getattr(model, "language_model", model)


def _attention(model: Any) -> int | None:
    """The number of a layer of full attention; None where there is none."""
    layers = enumerate(model.layers)
    return next((at for at, layer in layers if hasattr(layer, "self_attn")), None)


def _directory(source: str | Path) -> Path:
    try:
        return models.directory(str(source))
    except (OSError, ValueError) as error:  # what the hub's client raises
        raise ModelError(f"draft_mtp: {source} is not on this machine: {error}") from error


def _check(weights: Weights, source: str | Path) -> None:
    if not weights:
        raise SettingError(
            f"draft_mtp needs mtp.* weights, and {source} has none: conversions often leave them out. Use a "
            "checkpoint that has them, draft_model, or draft_from_cache."
        )
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    if layers != {"0"} or "fc.weight" not in weights or "pre_fc_norm_hidden.weight" not in weights:
        raise SettingError(
            f"draft_mtp cannot be used with {source}: its mtp.* weights are no head of one layer as Qwen3-Next and "
            "Qwen3.5 have. Use draft_model, or draft_from_cache."
        )


def _fill(layers: HeadLayers, weights: Weights) -> None:
    """Give the layers their weights, quantized where they are stored so. Raises `ValueError` for others."""

    def quantized(path: str, module: Any) -> Any:
        has_scales = hasattr(module, "to_quantized") and f"{path}.scales" in weights
        return infer_quant_config(path, module, weights) if has_scales else False

    if any(name.endswith(".scales") for name in weights):
        nn.quantize(layers, class_predicate=quantized)
    layers.load_weights([*weights.items()])
    layers.eval()
