"""A draft model of which it is known what it drafts wrongly, and how many forwards a reply takes with it."""

from collections.abc import Collection, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache


class Slipping(nn.Module):
    """A model that is wrong behind each of the tokens in `behind`.

    What it keeps is its `inner` model's, so whether its caches stand where they must is seen in what follows.
    """

    def __init__(self, inner: nn.Module, behind: Collection[int]) -> None:
        super().__init__()
        self.inner = inner
        self.behind = tuple(sorted(set(behind)))

    def __call__(self, inputs: mx.array, cache: Any = None, **options: Any) -> mx.array:
        """Tokens (B, L) -> logits (B, L, vocabulary)."""
        logits = self.inner(inputs, cache=cache, **options)
        if not self.behind:
            return logits
        wrong = mx.any(inputs[..., None] == mx.array(self.behind), axis=-1, keepdims=True)
        return mx.where(wrong, mx.roll(logits, 1, axis=-1), logits)

    @property
    def layers(self) -> Any:
        """The inner model's layers."""
        return self.inner.layers

    @property
    def model_type(self) -> str:
        """The inner model's type."""
        return str(self.inner.model_type)

    def make_cache(self) -> list[Any]:
        """Empty caches, one for each layer."""
        return make_prompt_cache(self.inner)


def forwards_of(reply: Sequence[int], most: int, behind: Collection[int]) -> tuple[int, int, int]:
    """What a `reply` takes of its own model's forwards when a `Slipping` one of it drafts `most` each time,
    how many tokens are drafted, and how many of them are right.

    The prompt's last token gives the first one, behind which the draft model reads the prompt. Behind a wrong token all that is drafted is taken for wrong.
    """
    forwards, drafted, right, at = 2, 0, 0, 1
    while at < len(reply):
        width = min(most, len(reply) - at - 1)
        forwards += 1
        good = 0
        while good < width and reply[at + good] not in behind:
            good += 1
        drafted, right, at = drafted + width, right + good, at + good + 1
    return forwards, drafted, right
