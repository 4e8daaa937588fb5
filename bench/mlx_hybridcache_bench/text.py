"""Real text to measure with, which every Python carries: its language reference, then its library."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

from mlx_hybridcache import PromptError
from mlx_hybridcache.demo.workloads import LONGEST_TOKEN, default_text

USUAL_TOKEN = 8
"""Characters: twice what a token of such text has, so that the library need not be read in full."""


def prompt_of(tokenizer: Any, tokens: int) -> list[int]:
    """The first `tokens` token ids of the reference text.

    The reference has about 100,000 with a large vocabulary; for more, the source text of the
    standard library follows it. Raises `PromptError` when that is not enough either.
    """
    text = default_text()
    ids = _encoded(tokenizer, text[: tokens * LONGEST_TOKEN])
    if len(ids) < tokens:
        text += library_text(tokens * USUAL_TOKEN - len(text))
        ids = _encoded(tokenizer, text)
    if len(ids) < tokens:
        raise PromptError(
            f"The reference text has {len(ids):,} tokens with this tokenizer, fewer than {tokens:,}."
        )
    return ids[:tokens]


def library_text(characters: int) -> str:
    """At most so much of the source of the standard library's modules, by name."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if characters <= 0:
            break
        found.append(f"\n\n{path.read_text(encoding='utf-8', errors='replace')}"[:characters])
        characters -= len(found[-1])
    return "".join(found)


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]
