"""What callers name a prompt by, as tokens and a salt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import PromptError
from ..tokenizing.encoder import Encoder
from ..tokens import Tokens, prompt_tokens
from .arguments import check_functions, check_text, check_whole, lifetimes_of, positions, token_ids
from .request import Progress, Request
from .sharing import Sharing

NO_LIFETIMES: Mapping[int, float] = MappingProxyType({})


@dataclass(frozen=True)
class Prompts:
    """How one cache reads prompts: text by `encoder`, if it has a tokenizer, ids below `vocabulary`.

    `sharing` says where they belong.
    """

    encoder: Encoder
    vocabulary: int
    salt: str
    sharing: Sharing

    def request(
        self,
        prompt: str | Iterable[int],
        max_tokens: int,
        boundaries: Sequence[int] = (),
        lifetimes: Mapping[int, float] = NO_LIFETIMES,
        on_progress: Progress | None = None,
        cache_salt: str | None = None,
        *,
        best_effort: bool = False,
    ) -> Request:
        """What is asked for with these arguments of a call. Raises `PromptError` and `ArgumentError`."""
        tokens, salt = self.read(prompt, cache_salt)
        check_functions(prompt_progress_callback=on_progress)
        return self.sharing.request(
            tokens,
            salt,
            max_tokens,
            boundaries=tuple(positions(boundaries, len(tokens))),
            lifetimes=lifetimes_of(lifetimes, len(tokens)),
            best_effort=best_effort,
            **({} if on_progress is None else {"on_progress": on_progress}),
        )

    def read(self, prompt: str | Iterable[int], cache_salt: str | None) -> tuple[Tokens, str]:
        """int32, shape `(n,)`, and the call's salt. Raises `PromptError` and `ArgumentError`."""
        salt = self.salt_of(cache_salt)
        ids = self._encoded(prompt, salt) if isinstance(prompt, str) else token_ids(prompt)
        return prompt_tokens(ids, self.vocabulary), salt

    def salt_of(self, cache_salt: str | None) -> str:
        """The salt of one call, the cache's own unless it names one. Raises `ArgumentError`."""
        if cache_salt is None:
            return self.salt
        check_text("cache_salt", cache_salt)
        return cache_salt

    def _encoded(self, prompt: str, salt: str) -> Iterable[int]:
        tokenizer = self.encoder.tokenizer
        if tokenizer is None:
            raise PromptError("A text prompt needs a tokenizer; give one to the constructor.")
        check_whole(prompt)
        # The rule by which mlx_lm.stream_generate adds special tokens.
        bos = tokenizer.bos_token
        return self.encoder.prompt(prompt, salt, special=bos is None or not prompt.startswith(bos))
