"""Real text to measure with: Python's own language reference, which every Python carries."""

from __future__ import annotations

from typing import Any

from mlx_hybridcache import PromptError
from mlx_hybridcache.demo.workloads import LONGEST_TOKEN, default_text


def prompt_of(tokenizer: Any, tokens: int) -> list[int]:
    """The first `tokens` token ids of the reference text.

    Raises `PromptError` when the text is shorter than that.
    """
    text = default_text()[: tokens * LONGEST_TOKEN]
    ids = [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    if len(ids) < tokens:
        raise PromptError(
            f"The reference text has {len(ids):,} tokens with this tokenizer, fewer than {tokens:,}."
        )
    return ids[:tokens]
