"""Log-probabilities in OpenAI's shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from ..generation.pieces import TokenLogprob

LEAST = -9999.0
"""OpenAI's number for a token that cannot come; JSON has no infinity."""


class TokenNames:
    """Log-probabilities in OpenAI's shapes, with mlx_lm.server's `id` beside them."""

    def __init__(self, bytes_of: Callable[[int], bytes]):
        self.bytes_of = bytes_of

    def entry(self, found: TokenLogprob) -> dict[str, Any]:
        """An entry of `logprobs.content`."""
        top = [self._named(token, logprob) for token, logprob in found.top]
        return {**self._named(found.token, found.logprob), "top_logprobs": top}

    def legacy(self, found: list[TokenLogprob], start: int, *, with_top: bool) -> dict[str, Any]:
        """The shape of `/v1/completions`; `start` is the text offset of the first token."""
        names = [self.text(each.token) for each in found]
        lengths = accumulate(map(len, names), initial=start)
        top = [{self.text(t): _finite(p) for t, p in reversed(each.top)} for each in found]
        return {
            "tokens": names,
            "token_logprobs": [_finite(each.logprob) for each in found],
            "top_logprobs": top if with_top else None,
            "text_offset": list(lengths)[:-1],
        }

    def text(self, token: int) -> str:
        """A token as text, `�` where it is part of a character."""
        return self.bytes_of(token).decode("utf-8", "replace")

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.bytes_of(token)
        return {
            "token": raw.decode("utf-8", "replace"),
            "logprob": _finite(logprob),
            "bytes": list(raw),
            "id": token,
        }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST
