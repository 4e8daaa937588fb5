"""The bundled model and its tokenizer, loaded once, and chats rendered with its own template."""

from __future__ import annotations

import pydoc_data.topics
from functools import cache
from typing import Any

import mlx_lm

from mlx_hybridcache.demo import BUNDLED_MODEL


@cache
def load() -> tuple[Any, Any]:
    """Model and tokenizer, by plain `mlx_lm.load`."""
    return mlx_lm.load(str(BUNDLED_MODEL))[:2]


@cache
def text_tokens(count: int, start: int = 0) -> tuple[int, ...]:
    """`count` tokens of Python's language reference, from token `start` on."""
    _, tokenizer = load()
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer.encode(text[: (start + count) * 24], add_special_tokens=False)
    assert len(ids) >= start + count
    return tuple(ids[start : start + count])


def text(count: int, start: int = 0) -> str:
    """The same as text."""
    _, tokenizer = load()
    return tokenizer.decode(list(text_tokens(count, start)))


@cache
def never_ending() -> dict[str, float]:
    """A `logit_bias` under which no reply ends before its `max_tokens`."""
    _, tokenizer = load()
    return {str(token): -100.0 for token in tokenizer.eos_token_ids}


def chat(*messages: tuple[str, str], reply: bool = True, **options: Any) -> list[int]:
    """A conversation of (role, content), rendered and tokenized, up to the reply's opener."""
    _, tokenizer = load()
    rendered = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        tokenize=False,
        add_generation_prompt=reply,
        **options,
    )
    return list(tokenizer.encode(rendered, add_special_tokens=False))
