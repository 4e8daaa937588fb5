"""What callers name a prompt by, as tokens and a salt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import PromptError
from ..tokens import Tokens, prompt_tokens
from .arguments import check_text, check_whole, token_ids


@dataclass(frozen=True)
class Prompts:
    """How one cache reads prompts: text by `tokenizer`, if there is one, ids below `vocabulary`."""

    tokenizer: Any
    vocabulary: int
    salt: str

    def tokens(self, prompt: str | Iterable[int]) -> Tokens:
        """int32, shape `(n,)`. Raises `PromptError`."""
        return prompt_tokens(
            self._encoded(prompt) if isinstance(prompt, str) else token_ids(prompt),
            self.vocabulary,
        )

    def salt_of(self, cache_salt: str | None) -> str:
        """The salt of one call, the cache's own unless it names one. Raises `ArgumentError`."""
        if cache_salt is None:
            return self.salt
        check_text("cache_salt", cache_salt)
        return cache_salt

    def _encoded(self, prompt: str) -> Iterable[int]:
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise PromptError("A text prompt needs a tokenizer; give one to the constructor.")
        check_whole(prompt)
        # The rule by which mlx_lm.stream_generate adds special tokens.
        bos = tokenizer.bos_token
        ids: Iterable[int] = tokenizer.encode(
            prompt, add_special_tokens=bos is None or not prompt.startswith(bos)
        )
        return ids
