"""Where a reply and its reasoning may not end yet, and where they must: logits processors for one reply.

They take the tokens that they are shown first for the prompt's, as `Guide` does, and never raise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..adapter import REASONING

Processor = Callable[[mx.array, mx.array], mx.array]

NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request says of its reply's length, beside `max_tokens`. None is no limit."""

    at_least: int | None = None
    ends: frozenset[int] = frozenset()
    thinking: int | None = None

    def processors(self, tokenizer: Any, state: str) -> list[Processor]:
        """Those that this takes, for one reply that begins in `state`."""
        found: list[Processor] = []
        if self.at_least:
            found.append(NotBefore(self.at_least, {*tokenizer.eos_token_ids, *self.ends}))
        if self.thinking is not None and tokenizer.has_thinking:
            found.append(
                ThinkingLimit(
                    self.thinking,
                    list(tokenizer.think_start_tokens),
                    list(tokenizer.think_end_tokens),
                    is_open=state == REASONING,
                )
            )
        return found


NO_LIMITS = Limits()


class NotBefore:
    """No token of `ends` before so many others."""

    def __init__(self, at_least: int, ends: set[int]):
        self._at_least, self._ends = at_least, sorted(ends)
        self._prompt: int | None = None

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """`logits` (1, vocabulary) without the ends where it is too early for one."""
        if self._prompt is None:
            self._prompt = tokens.size
        if tokens.size - self._prompt >= self._at_least:
            return logits
        barred = mx.array([end for end in self._ends if end < logits.shape[-1]])
        return mx.put_along_axis(logits, barred[None], mx.array(NEVER, logits.dtype), axis=-1)


class ThinkingLimit:
    """Reasoning that has `most` tokens is ended: its end marker comes next, whatever is likeliest."""

    def __init__(self, most: int, start: Sequence[int], end: Sequence[int], *, is_open: bool):
        self._most, self._start, self._end = most, list(start), list(end)
        self._begins_open = is_open
        self._prompt: int | None = None
        self._begin()

    def _begin(self) -> None:
        self._is_open = self._begins_open
        self._tail: list[int] = []
        self._count = self._seen = 0

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """`logits` (1, vocabulary), or nothing but the marker's next token."""
        if self._prompt is None:
            self._prompt = tokens.size
        if tokens.size - self._prompt < self._seen:  # drafted tokens were taken back
            self._begin()
        new: list[int] = tokens[self._prompt + self._seen :].tolist()  # type: ignore[assignment]
        for token in new:
            self._take(token)
        forced = self.forced()
        if forced is None:
            return logits
        alone = mx.full(logits.shape, NEVER, logits.dtype)
        return mx.put_along_axis(alone, mx.array([[forced]]), mx.array(0.0, logits.dtype), axis=-1)

    def _take(self, token: int) -> None:
        self._seen += 1
        self._tail = [*self._tail, token][-max(len(self._start), len(self._end)) :]
        if self._is_open:
            self._count += 1
            self._is_open = self._tail[-len(self._end) :] != self._end
        elif self._tail[-len(self._start) :] == self._start:
            self._is_open, self._tail = True, []

    def forced(self) -> int | None:
        """The token that must come next; None while any may."""
        if not self._is_open or self._count < self._most:
            return None
        longest = min(len(self._tail), len(self._end) - 1)
        begun = next(
            n for n in range(longest, -1, -1) if self._tail[len(self._tail) - n :] == self._end[:n]
        )
        return self._end[begun]
