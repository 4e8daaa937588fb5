"""What a multi-token-prediction head says, in numpy and without a cache, by its published definition."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mlx.utils import tree_flatten

from odd_models.heads import hidden_of, text_of

Array = np.ndarray[Any, np.dtype[np.float32]]


class Reference:
    """Reads the weights of a head, of its model and the model's arguments, and no code of theirs."""

    def __init__(self, model: Any, layers: Any) -> None:
        self._model = model
        self._args = text_of(model).args
        self._own = _arrays(layers)
        self._text = _arrays(text_of(model))
        self._read: tuple[list[int], Array] = ([], np.zeros((0, 0), np.float32))

    def logits(self, tokens: Sequence[int], hidden: Array, first: int = 0) -> tuple[Array, Array]:
        """Of each hidden state and the token behind it, from the `first` one on: the outputs `(n, width)` and logits
        `(n, vocabulary)`. With one layer alone, the others are asked for their keys and values only.
        """
        own, eps = self._own, self._args.rms_norm_eps
        embedded = self._text["model.embed_tokens.weight"][list(tokens)]
        parts = [
            _norm(embedded, own["pre_fc_norm_embedding.weight"], eps),
            _norm(hidden, own["pre_fc_norm_hidden.weight"], eps),
        ]
        out = self._layer(np.concatenate(parts, axis=-1) @ own["fc.weight"].T, first)
        out = _norm(out, own["norm.weight"], eps)
        return out, out @ self._text["lm_head.weight"].T

    def _hidden(self, tokens: Sequence[int]) -> Array:
        """Of each token, `(n, width)`. Those of a beginning of what was read last are there: nothing looks ahead."""
        read, hidden = self._read
        if list(tokens) != read[: len(tokens)]:
            hidden = np.array(hidden_of(self._model, tokens)[0])
            self._read = [*tokens], hidden
        return hidden[: len(tokens)]

    def drafts(
        self, tokens: Sequence[int], most: int, seen_from: int = 0, seen_to: int = 0
    ) -> list[int]:
        """What it drafts behind `tokens`, when it has seen what was read from a position on, and before another one."""
        seen = [*range(seen_to), *range(seen_from, len(tokens) - 1)]
        hidden = self._hidden(tokens[:-1])[seen]
        behind, drafted = [tokens[at + 1] for at in seen], []
        while True:
            out, logits = self.logits(behind, hidden, first=len(behind) - 1)
            drafted.append(int(logits[-1].argmax()))
            if len(drafted) == most:
                return drafted
            hidden = np.concatenate([hidden, out[-1:]])
            behind.append(drafted[-1])

    # One decoder layer of full attention

    def _layer(self, x: Array, first: int) -> Array:
        own = {name[9:]: array for name, array in self._own.items() if name.startswith("layers.0.")}
        eps = self._args.rms_norm_eps
        h = x[first:] + self._attention(own, _norm(x, own["input_layernorm.weight"], eps), first)
        after = _norm(h, own["post_attention_layernorm.weight"], eps)
        return h + self._feed_forward(own, after)

    def _attention(self, own: Mapping[str, Array], x: Array, first: int) -> Array:
        args, n = self._args, len(x)
        heads, dim = args.num_attention_heads, args.head_dim
        both = (x[first:] @ own["self_attn.q_proj.weight"].T).reshape(n - first, heads, 2 * dim)
        queries, gate = both[..., :dim], both[..., dim:].reshape(n - first, -1)
        keys = (x @ own["self_attn.k_proj.weight"].T).reshape(n, -1, dim)
        values = (x @ own["self_attn.v_proj.weight"].T).reshape(n, -1, dim)
        queries = _norm(queries, own["self_attn.q_norm.weight"], args.rms_norm_eps)
        queries = self._turned(queries, first)
        keys = self._turned(_norm(keys, own["self_attn.k_norm.weight"], args.rms_norm_eps))
        shared = heads // keys.shape[1]
        keys, values = np.repeat(keys, shared, axis=1), np.repeat(values, shared, axis=1)
        scores = np.einsum("qhd,khd->hqk", queries, keys) * dim**-0.5
        scores = np.where(np.tri(n, dtype=bool)[first:], scores, -np.inf)
        read = np.einsum("hqk,khd->qhd", _softmax(scores), values).reshape(n - first, -1)
        return (read * _sigmoid(gate)) @ own["self_attn.o_proj.weight"].T

    def _turned(self, x: Array, first: int = 0) -> Array:
        """The first part of each head, turned by its position: the `first` one's, and so on."""
        half = int(self._args.head_dim * self._args.partial_rotary_factor) // 2
        rates = self._args.rope_theta ** (-np.arange(half) / half)
        angles = (np.arange(first, first + len(x))[:, None] * rates)[:, None]
        one, other, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        turned = [
            one * np.cos(angles) - other * np.sin(angles),
            one * np.sin(angles) + other * np.cos(angles),
        ]
        return np.concatenate([*turned, rest], axis=-1)

    def _feed_forward(self, own: Mapping[str, Array], x: Array) -> Array:
        if "mlp.gate.weight" not in own:
            return _gated(x, *(own[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
        scores = _softmax(x @ own["mlp.gate.weight"].T)
        shared = (own[f"mlp.shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down"))
        out = _sigmoid(x @ own["mlp.shared_expert_gate.weight"].T) * _gated(x, *shared)
        for row, score in enumerate(scores):
            chosen = np.argsort(score)[-self._args.num_experts_per_tok :]
            for expert in chosen:
                each = (
                    own[f"mlp.switch_mlp.{name}_proj.weight"][expert]
                    for name in ("gate", "up", "down")
                )
                out[row] += score[expert] / score[chosen].sum() * _gated(x[row], *each)
        return out


def _arrays(module: Any) -> dict[str, Array]:
    return {name: np.array(array) for name, array in tree_flatten(module.parameters())}


def _norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _gated(x: Array, gate: Array, up: Array, down: Array) -> Array:
    inner = x @ gate.T
    return (inner * _sigmoid(inner) * (x @ up.T)) @ down.T
