"""Measure the bundled model on what training never saw, with mlx-lm as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from .corpus import documents, split
from .data import Tokens, encode_dialogue, encode_text
from .dialogues import Dialogue, Writer, draw
from .train import Settings

WINDOW = 512  # tokens of a row of held-out text
SPLIT_SEED = Settings().seed
FIRST_SEED = 10_000_000  # of held-out dialogues; training counts up from zero


def held_out_dialogues(count: int, kind: str = "", thinking: bool | None = None) -> list[Dialogue]:
    """Dialogues with questions that training never saw, about texts it never saw."""
    writer = Writer([d.text for d in split(documents(), SPLIT_SEED)[1]])
    drawn = draw(writer, held_out=True, start=FIRST_SEED, kind=kind, thinking=thinking)
    return list(islice(drawn, count))


def held_out_rows(tokenizer: Any, kind: str, count: int) -> Tokens:
    """At most `count` rows (N, WINDOW + 1) spread over what was held out.

    `kind`: "reference" for the language's documentation, "library" for docstrings and sources,
    "dialogues" for generated ones.
    """
    if kind == "dialogues":
        drawn = held_out_dialogues(4 * count)
        tokens = np.concatenate([encode_dialogue(tokenizer, d)[0] for d in drawn])
    else:
        reference = kind == "reference"
        chosen = split(documents(), SPLIT_SEED)[1]
        chosen = [d for d in chosen if d.name.startswith("reference/") == reference]
        tokens = encode_text(tokenizer, chosen)
    starts = range(0, len(tokens) - WINDOW - 1, WINDOW)
    rows = [tokens[start : start + WINDOW + 1] for start in starts]
    return np.stack(rows[:: max(1, len(rows) // count)][:count])


def model_loss(model: Any, rows: Tokens) -> float:
    """Nats per token over rows (N, L + 1), each read from an empty state."""
    total = 0.0
    for i in range(0, len(rows), 8):
        part = mx.array(rows[i : i + 8])
        losses = nn.losses.cross_entropy(model(part[:, :-1]), part[:, 1:])
        total += float(losses.mean(axis=1).sum())
    return total / len(rows)


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model wrote, and whether an end token closed it."""

    text: str
    ended: bool


def greedy(model: Any, tokenizer: Any, dialogue: Dialogue, most: int = 160) -> Reply:
    """mlx-lm's generation at temperature 0, from the prompt that the chat template gives."""
    prompt = tokenizer.apply_chat_template(**dialogue.template_arguments())
    text, reason = "", None
    for piece in stream_generate(model, tokenizer, prompt, max_tokens=most, sampler=make_sampler()):
        text, reason = text + piece.text, piece.finish_reason
    return Reply(text, reason == "stop")


def parsed_call(tokenizer: Any, text: str) -> dict[str, Any] | None:
    """The call in a reply through mlx-lm's tool parser, or None when there is none to parse."""
    _, opened, rest = text.partition(tokenizer.tool_call_start)
    inside, closed, _ = rest.partition(tokenizer.tool_call_end)
    if not (opened and closed):
        return None
    try:
        call = tokenizer.tool_parser(inside, None)
    except ValueError:
        return None
    return call if isinstance(call, dict) and isinstance(call.get("arguments"), dict) else None


def judge(tokenizer: Any, dialogue: Dialogue, reply: Reply) -> dict[str, bool]:
    """What holds for one reply, by name; "as intended" means equal to the generator's own."""
    found = {"ends by itself": reply.ended, "as intended": reply.text == dialogue.completion}
    if dialogue.thinking:
        opened = reply.text.startswith(tokenizer.think_start)
        found["closes its reasoning"] = opened and tokenizer.think_end in reply.text
    if dialogue.expects_call:
        call = parsed_call(tokenizer, reply.text)
        declared = [tool["function"]["name"] for tool in dialogue.tools]
        found["parseable call"] = call is not None and call.get("name") in declared
    return found


def stale_state(model: Any, tokens: list[int], ages: Sequence[int]) -> dict[int, float]:
    """Largest change of the last token's logits when the recurrent state is `age` tokens too old.

    Keys and values are right each time: only the Gated-DeltaNet layers' cache is taken from `age`
    tokens before the position from which the last token is read.
    """
    end = len(tokens) - 1

    def read(upto: int) -> list[Any]:
        cache = list(make_prompt_cache(model))
        model(mx.array(tokens[:upto])[None], cache=cache)
        mx.eval([c.state for c in cache])
        return cache

    def last(cache: list[Any]) -> mx.array:
        logits: mx.array = model(mx.array(tokens[end:])[None], cache=cache)[0, -1]
        mx.eval(logits)
        return logits

    right, changes = last(read(end)), {}
    for age in ages:
        caches = zip(model.layers, read(end), read(end - age), strict=True)
        mixed = [old if layer.is_linear else fresh for layer, fresh, old in caches]
        changes[age] = float(mx.abs(last(mixed) - right).max())
    return changes
