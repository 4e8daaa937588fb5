"""A model whose experts are known: one for each kind of text, and copies of some of them.

It is counted, not trained. Each expert holds the bigrams of one kind of text; attention averages
what the characters so far say about the kind; the router reads that average. So it is a language
model of real text whose every expert is needed, and whose equivalent experts are known by their making.
The class is mlx-lm's own Qwen3-MoE, so nothing that reads it can tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import qwen3_moe
from numpy.typing import NDArray

from .kinds import ALPHABET, kinds

LAYERS = 2
COPIES = (3, 3, 2, 2, 2, 2, 1, 1)
"""How many experts hold the kinds, most first; which kind gets how many is drawn."""

TOP_K = 2
HIDDEN, INTERMEDIATE = 192, 64  # multiples of 64, so that all of it quantizes
VOCABULARY = len(ALPHABET)
PRIOR = 0.5
"""Added to each count of a character, so that nothing is impossible."""

_WORDS, _NEXT, _KIND = 0, VOCABULARY, 2 * VOCABULARY
"""Where the hidden stream keeps the character read, the log-odds of the next one, the evidence."""

# What is written beside the character must be small, or the norms would change with it.
_NEXT_SCALE, _KIND_SCALE = 2e-3, 2e-2
SHARPNESS = 12.0
"""Router logits per nat of evidence that a character brings on average."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Specialised:
    """The model and the truth about it: for each layer its groups of copies, by expert index."""

    model: Any
    groups: tuple[tuple[tuple[int, ...], ...], ...]


def specialised(seed: int, *, unlike: float = 1e-5) -> Specialised:
    """A float32 model whose experts stand in an order drawn from `seed`.

    Copies of an expert, and their rows in the router, differ by noise of `unlike` relative to their
    own size, so that scores of copies are nearly but not quite equal.
    """
    rng = np.random.default_rng(seed)
    model = _empty()
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    weights = {
        name: np.zeros(array.shape) if array.ndim > 1 else np.ones(array.shape)
        for name, array in parameters.items()
    }
    characters = np.eye(VOCABULARY)
    # A character of size 1 among HIDDEN places comes out of a norm sqrt(HIDDEN) high.
    size = HIDDEN**0.5
    weights["model.embed_tokens.weight"][:, _WORDS:_NEXT] = characters
    weights["lm_head.weight"][:, _NEXT:_KIND] = characters / (size * _NEXT_SCALE)
    groups = []
    for layer in range(LAYERS):
        kind_of = rng.permutation(np.repeat(rng.permutation(len(COPIES)), COPIES))
        groups.append(_groups(kind_of))
        part = f"model.layers.{layer}."
        _plant_evidence(weights, part, size)
        _plant_experts(weights, part, size, kind_of)
        for name in ("mlp.gate.weight", *(f"mlp.switch_mlp.{each}.weight" for each in _EXPERT)):
            _roughen(weights[part + name], unlike, rng)
    model.update(
        tree_unflatten([(name, mx.array(w.astype(np.float32))) for name, w in weights.items()])
    )
    model.eval()
    mx.eval(model.parameters())
    return Specialised(model, tuple(groups))


def _empty() -> qwen3_moe.Model:
    """A model of the right shapes."""
    return qwen3_moe.Model(
        qwen3_moe.ModelArgs(
            model_type="qwen3_moe",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            moe_intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=64,
            num_experts=sum(COPIES),
            num_experts_per_tok=TOP_K,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            norm_topk_prob=True,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            max_position_embeddings=32768,
            tie_word_embeddings=False,
        )
    )


def held_out_texts(count: int, length: int, seed: int) -> list[list[int]]:
    """`count` held-out texts of `length` tokens; every eight are of eight kinds, in a drawn order."""
    rng, held_out = np.random.default_rng(seed), [pair[1] for pair in kinds().values()]
    texts: list[list[int]] = []
    while len(texts) < count:
        for kind in rng.permutation(len(held_out)):
            start = int(rng.integers(len(held_out[kind]) - length))
            texts.append([int(token) for token in held_out[kind][start : start + length]])
    return texts[:count]


_EXPERT = ("gate_proj", "up_proj", "down_proj")


def _groups(kind_of: NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
    members = [
        tuple(int(e) for e in np.flatnonzero(kind_of == kind)) for kind in range(len(COPIES))
    ]
    return tuple(sorted(group for group in members if len(group) > 1))


def _plant_evidence(weights: dict[str, Floats], part: str, size: float) -> None:
    """Attention without queries averages, over the text so far, what each character tells."""
    tells = _log_shares(_singles())
    tells -= tells.mean(axis=0)  # what a character tells of one kind against the others
    count = len(COPIES)
    weights[f"{part}self_attn.v_proj.weight"][:count, _WORDS:_NEXT] = tells / size
    # Only the first layer writes: the second would add to what it reads.
    if part == "model.layers.0.":
        into = weights[f"{part}self_attn.o_proj.weight"]
        into[_KIND : _KIND + count, :count] = np.eye(count) * _KIND_SCALE


def _plant_experts(
    weights: dict[str, Floats], part: str, size: float, kind_of: NDArray[np.int64]
) -> None:
    """An expert looks the character up and adds its kind's log-odds of every next one."""
    gate = weights[f"{part}mlp.gate.weight"]
    gate[np.arange(len(kind_of)), _KIND + kind_of] = SHARPNESS / (size * _KIND_SCALE)
    lookup = np.zeros((INTERMEDIATE, HIDDEN))
    lookup[:VOCABULARY, _WORDS:_NEXT] = np.eye(VOCABULARY) / size
    steep = 4.0
    weights[f"{part}mlp.switch_mlp.gate_proj.weight"][:] = steep * lookup
    weights[f"{part}mlp.switch_mlp.up_proj.weight"][:] = lookup
    activated = steep / (1 + np.exp(-steep))
    bigrams = _log_shares(_pairs())
    bigrams -= bigrams.mean(axis=-1, keepdims=True)
    # (kinds, next, this): a column for each character read.
    columns = bigrams.transpose(0, 2, 1) * (_NEXT_SCALE / activated / LAYERS)
    down = weights[f"{part}mlp.switch_mlp.down_proj.weight"]
    down[:, _NEXT:_KIND, :VOCABULARY] = columns[kind_of]


def _singles() -> Floats:
    """(kinds, next): how often a character occurs."""
    return np.stack(
        [PRIOR + np.bincount(text, minlength=VOCABULARY) for text, _ in kinds().values()]
    )


def _pairs() -> Floats:
    """(kinds, this, next): how often a character follows another; behind a rare one, how often at all.

    So no expert is silent on a character that its kind does not have.
    """
    singles, tables = _singles(), []
    for (text, _), single in zip(kinds().values(), singles, strict=True):
        table = np.tile(PRIOR * VOCABULARY * single / single.sum(), (VOCABULARY, 1))
        np.add.at(table, (text[:-1], text[1:]), 1.0)
        tables.append(table)
    return np.stack(tables)


def _log_shares(counts: Floats) -> Floats:
    shares: Floats = np.log(counts / counts.sum(axis=-1, keepdims=True))
    return shares


def _roughen(array: Floats, unlike: float, rng: np.random.Generator) -> None:
    """Add noise of `unlike` of the root mean square, expert by expert."""
    for expert in array:
        rms = np.sqrt(np.mean(expert**2))
        expert[...] += unlike * rms * rng.standard_normal(expert.shape)
