"""A checkpoint's multi-token-prediction head: one layer that drafts out of the model's own hidden states.

For a token it puts together what the model's last layer left of it, behind the final norm, and the embedding of the
token behind; its output gives the token after that one, by the model's own embeddings and logits, and stands for the
hidden state of the token in between. So it drafts on from what it drafted. Published with Qwen3-Next; DeepSeek-V3's
(arXiv 2412.19437) is of the kind, but reads the hidden state before the final norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.utils import infer_quant_config

from .. import models
from ..caches.hidden import telling
from ..caches.kinds.rows import RowsKind
from ..caches.layout import LEARNT_FROM, Layout, fresh_caches
from ..errors import ModelError, SettingError
from .head_weights import Weights, head_weights

if TYPE_CHECKING:
    from .head_drafter import HeadDrafter

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


class Head:
    """The head of one model, which tells it of its hidden states until `release`.

    `kind` is what its rows are. `running` are its drafters that hold some. While it `is_busy` one of them is at work.
    """

    def __init__(self, model: Any, layout: Layout, layers: HeadLayers, leaf: int):
        self.running: list[HeadDrafter] = []
        self._model = model
        self._layout = layout
        self._layers = layers
        self._leaf = leaf
        self._is_busy = False
        self.kind = self._learnt()
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

    def _learnt(self) -> RowsKind:
        """What its rows are, seen as it reads a few tokens. All of its arrays are evaluated then."""
        cache = self.fresh_cache()
        tokens = mx.array([[0] * LEARNT_FROM])
        hidden = _text(self._model).model.embed_tokens(tokens)
        mx.eval(self.likeliest(self.read(tokens, hidden, cache)))
        models.evaluate(self._layers)
        return RowsKind.seen(cache, headroom=True)

    def release(self) -> None:
        """Let the model be what it was."""
        self._telling.release()

    # While it drafts

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While one of its drafters is: what it holds is not let go of for its own needs."""
        was_busy, self._is_busy = self._is_busy, True
        try:
            yield
        finally:
            self._is_busy = was_busy

    def let_go(self) -> None:
        """What its drafters hold goes, because a request needs it: then they draft no more."""
        if not self._is_busy:
            for each in [*self.running]:
                each.give_up()

    def position(self, caches: list[Any]) -> int:
        """Where a request's caches stand."""
        position = self._layout.kinds[self._leaf].position(caches[self._leaf])
        assert position is not None, "layers with rows know their position"
        return position

    def fresh_cache(self) -> Any:
        """For its rows: as the model's own attention layers have, in full precision."""
        return fresh_caches(self._model)[self._leaf]

    def with_room(self, rows: int) -> Any:
        """The same with room for so many rows."""
        cache, kind = self.fresh_cache(), self.kind
        buffers = [
            mx.zeros((1, shape[1], rows, shape[3]), dtype)
            for shape, dtype in zip(kind.shapes, kind.dtypes, strict=True)
        ]
        mx.eval(buffers)
        kind.adopt(cache, tuple(buffers), None, 0)
        return cache

    def read(self, tokens: mx.array, hidden: mx.array, cache: Any) -> mx.array:
        """Its output, `(1, n, width)`, for hidden states of that shape and the token behind each, `(1, n)`."""
        return self._layers(_text(self._model).model.embed_tokens(tokens), hidden, cache)

    def likeliest(self, output: mx.array) -> mx.array:
        """The token, `(1, 1)`, that follows the one of the last output."""
        text, last = _text(self._model), output[:, -1:]
        is_tied = text.args.tie_word_embeddings
        logits = text.model.embed_tokens.as_linear(last) if is_tied else text.lm_head(last)
        return mx.argmax(logits, axis=-1)


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
