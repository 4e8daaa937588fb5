"""Real text to measure with, which every Python carries: its language reference, then its library."""

from __future__ import annotations

import math
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer

from mlx_hybridcache import ModelError, PromptError
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


def tokenizer_of(model: str) -> object:
    """The model's tokenizer alone, to cut text by the token; the servers load the weights."""
    try:
        tokenizer: Any = load_tokenizer(Path(model) if Path(model).is_dir() else model)
        # Texts are cut by it, never read whole: without a limit it does not warn of their length.
        tokenizer.model_max_length = sys.maxsize
        return tokenizer
    except Exception as error:  # the loader and the hub raise whatever they meet
        raise ModelError(f"The tokenizer of {model} could not be loaded: {error}") from error


class ByCharacters:
    """A tokenizer that cuts every `characters_per_token` characters, for models of unknown files.

    Its numbers say where in the text that it was given last a piece stands.
    """

    def __init__(self, characters_per_token: float) -> None:
        self.characters_per_token = characters_per_token
        self._text = ""

    def encode(self, text: str, add_special_tokens: bool = False) -> range:
        """A number for each piece of `text`."""
        self._text = text
        return range(math.ceil(len(text) / self.characters_per_token))

    def decode(self, pieces: Sequence[int]) -> str:
        """The text of a run of pieces."""
        if not pieces:
            return ""
        start, end = pieces[0], pieces[-1] + 1
        return self._text[self._at(start) : self._at(end)]

    def _at(self, piece: int) -> int:
        return round(piece * self.characters_per_token)
