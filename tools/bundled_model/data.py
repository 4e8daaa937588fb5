"""Token arrays and batches; a batch is a function of (seed, step), so training resumes exactly.

A dialogue has a row to itself, as when it is asked, beside others of like length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .corpus import Document
from .dialogues import Dialogue
from .plan import Stage
from .tokenizer import END_OF_TEXT, TURN_END

Tokens = NDArray[np.int32]
Weights = NDArray[np.float32]

PROMPT_WEIGHT = 0.25  # of a prompt's token; a reply's weighs 1


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens` (rows, length + 1); targets counted are `index` of the flattened (rows, length)."""

    tokens: Tokens
    index: Tokens  # (counted,)
    weights: Weights  # (counted,)


@dataclass(frozen=True, slots=True)
class Data:
    """Everything a training run reads."""

    text: Tokens  # all documents, one after the other
    pools: dict[str, list[tuple[Tokens, Weights]]]  # dialogues; weights of the tokens as targets


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The Hugging Face tokenizer of a model directory, with its chat template."""
    return AutoTokenizer.from_pretrained(directory)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text` as it stands."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Document]) -> Tokens:
    """Documents end to end, each closed by the end-of-text token."""
    ids: list[int] = []
    for document in texts:
        ids += encode(tokenizer, document.text + END_OF_TEXT)
    return np.array(ids, dtype=np.int32)


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue
) -> tuple[Tokens, Weights]:
    """(tokens, weights) of a prompt as the chat template writes it, with its completion."""
    rendered = tokenizer.apply_chat_template(tokenize=False, **dialogue.template_arguments())
    prompt = encode(tokenizer, str(rendered))
    reply = encode(tokenizer, dialogue.completion + TURN_END + "\n")
    weights = np.full(len(prompt) + len(reply), PROMPT_WEIGHT, dtype=np.float32)
    weights[len(prompt) :] = 1.0
    # A past assistant turn renders without its reasoning; its first token must not teach that
    # replies begin so.
    starts = encode(tokenizer, "<|im_start|>assistant\n")
    tokens = np.array(prompt + reply, dtype=np.int32)
    for i in range(len(prompt) - len(starts)):
        if prompt[i] == starts[0] and prompt[i : i + len(starts)] == starts:
            weights[i + len(starts)] = 0.0
    weights[len(prompt)] = 1.0
    return tokens, weights


def batch(data: Data, seed: int, step: int, tokens_per_step: int, stage: Stage) -> Batch:
    """The batch of `step`: rows of one length, each a dialogue or a piece of text."""
    rng = np.random.default_rng([seed, step])
    length = min(_drawn(rng, stage.buckets), tokens_per_step)
    shorter = max((bound for bound in stage.buckets if bound < length), default=0)
    fitting = [d for d in data.pools[stage.pool] if shorter < len(d[0]) <= length]
    rows = []
    for _ in range(max(1, tokens_per_step // length)):
        if rng.random() < stage.text_share:
            start = int(rng.integers(0, data.text.size - length))
            rows.append(_text(data.text[start:], length + 1))
        else:
            rows.append(_alone(fitting[int(rng.integers(0, len(fitting)))], length + 1))
    flat = np.concatenate([weights[1:] for _, weights in rows])
    # A light target is drawn with its weight's probability and then counts fully: the same sum
    # on average, and the wide output layer is computed for fewer rows.
    index = np.flatnonzero(rng.random(flat.size) < flat).astype(np.int32)
    even = np.full(index.size, 1.0 / index.size, dtype=np.float32)
    return Batch(np.stack([tokens for tokens, _ in rows]), index, even)


def _drawn(rng: np.random.Generator, shares: dict[int, float]) -> int:
    return int(rng.choice(list(shares), p=list(shares.values())))


def _alone(dialogue: tuple[Tokens, Weights], length: int) -> tuple[Tokens, Weights]:
    """One dialogue at the row's start; what follows it is not counted."""
    tokens, weights = dialogue
    rest = (0, length - len(tokens))
    return np.pad(tokens, rest), np.pad(weights, rest)


def _text(tokens: Tokens, length: int) -> tuple[Tokens, Weights]:
    return tokens[:length], np.ones(length, dtype=np.float32)
