"""Prompts as compact arrays, where turns begin in them, and the namespace they are stored under."""

from __future__ import annotations

import array
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from .errors import PromptError

Tokens = npt.NDArray[np.int32]
"""Token ids, shape `(n,)`."""


def prompt_tokens(ids: Iterable[int], vocabulary: int) -> Tokens:
    """Token ids as int32, shape `(n,)`, checked.

    Raises `PromptError` for an empty prompt, for what is not an integer, and for ids outside
    `[0, vocabulary)`.
    """
    try:
        tokens = (
            ids.copy() if is_compact(ids) else _as_array(ids if isinstance(ids, list) else [*ids])
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise PromptError(
            f"The prompt must be text or a list of token ids; one of its items is neither ({error})."
        ) from error
    if len(tokens) == 0:
        raise PromptError("The prompt is empty: at least one token is needed to predict the next.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        found = low if low < 0 else high
        at = int(np.argmax(tokens == found))
        raise PromptError(
            f"Token id {found} at position {at} is outside the model's vocabulary of {vocabulary}. "
            "Was the prompt made with another model's tokenizer?"
        )
    return tokens.view(np.int32)


def is_compact(ids: object) -> TypeGuard[Tokens]:
    """Whether ids have the form that prompts have here, so that no list is made of them."""
    return isinstance(ids, np.ndarray) and ids.dtype == np.int32 and ids.ndim == 1


def _as_array(ids: list[int]) -> npt.NDArray[np.uint32] | npt.NDArray[np.int64]:
    """120K ids in under 1 ms: array.array reads a list faster than numpy, unsigned fastest.

    What does not fit there is out of any vocabulary; it is kept to be named.
    """
    try:
        return np.frombuffer(array.array("I", ids), dtype=np.uint32)
    except OverflowError:
        return np.frombuffer(array.array("q", ids), dtype=np.int64)


def as_tokens(tokens: npt.ArrayLike) -> Tokens:
    """A compact, read-only copy, which keeps no larger array alive."""
    copied = np.array(tokens, dtype=np.int32)
    copied.setflags(write=False)
    return copied


@dataclass(frozen=True, slots=True)
class TurnMarks:
    """What a tokenizer's chat template says about turns: token ids.

    `openers` are the added tokens that open a turn, `user_opener` all the tokens that open a
    user's, its role included: prompts that share a beginning part ways behind them, as tool results
    are mostly rendered in the user's name. `phrases` are openers that are written in ordinary tokens.
    `reply_opener` is what a history has from the opener of a past reply to its text, and `written` the
    end of it that the model writes itself, as harmony's channel. `melts` ends a prompt whose last token
    a past reply does not have: a space, which is one with the word behind it. `thinking_end` closes reasoning, empty
    where the template knows none; `strips_thinking` says that it leaves reasoning
    out of past turns; `tool_call` opens a tool call, after which the reasoning stays in the history.
    Of the tokens by which a model ends its replies `other_ends` are those that no history has there.
    """

    openers: frozenset[int] = frozenset()
    user_opener: tuple[int, ...] = ()
    phrases: tuple[tuple[int, ...], ...] = ()
    reply_opener: tuple[int, ...] = ()
    written: tuple[int, ...] = ()
    melts: tuple[int, ...] = ()
    thinking_end: tuple[int, ...] = ()
    strips_thinking: bool = False
    tool_call: int | None = None
    other_ends: frozenset[int] = frozenset()

    def starts(self, tokens: Tokens) -> list[int]:
        """Positions just behind an opener, ascending."""
        at = self._opened(tokens)
        whole = _found(tokens, self.user_opener, at)
        found = {int(each) for each in at + np.where(whole, len(self.user_opener), 1)}
        for phrase in self.phrases:
            begins = np.flatnonzero(tokens == phrase[0])
            is_there = _found(tokens, phrase, begins)
            found.update(int(each) + len(phrase) for each in begins[is_there])
        return sorted(found)

    def _opened(self, tokens: Tokens) -> npt.NDArray[np.intp]:
        if not self.openers:
            return np.array([], dtype=np.intp)
        openers = np.fromiter(self.openers, dtype=np.int32)
        # They are few: no table is made of all ids.
        return np.flatnonzero(np.isin(tokens, openers, kind="sort"))

    def strips(self, reply: Sequence[int], prompt: Tokens | None = None) -> bool:
        """Whether the next turn's history will be another one than this reply behind its `prompt`.

        A reply of several turns is rendered anew, as harmony's analysis before its answer. Reasoning that
        the prompt has closed, as an empty one, stays only if past replies open so.
        """
        before = [] if prompt is None else self._last_turn(prompt)
        if self.melts and tuple(before[-len(self.melts) :]) == self.melts:
            return True
        own = _overlap(before, reply, self.written)
        said = reply[:-1]  # some models end replies with the next opener
        if own is None or (self.written and not self.openers.isdisjoint(said)):
            return True
        is_closed = _holds(before, self.thinking_end)
        if is_closed and _overlap(before, reply, self.reply_opener) is None:
            return True
        if self.tool_call is not None and self.tool_call in reply:
            return False
        return self.strips_thinking and not is_closed and _holds(reply[own:], self.thinking_end)

    def ends_otherwise(self, reply: Sequence[int]) -> bool:
        """Whether a state behind this reply is of no use: the history has another token where it ended."""
        return len(reply) > 0 and reply[-1] in self.other_ends

    def _last_turn(self, prompt: Tokens) -> list[int]:
        at = self._opened(prompt)
        last: list[int] = prompt[at[-1] if len(at) else len(prompt) :].tolist()
        return last


def _overlap(before: list[int], reply: Sequence[int], wanted: tuple[int, ...]) -> int | None:
    """How many tokens of a reply are the end of `wanted`, whose beginning ends `before`; None if it is not there."""
    for part in range(min(len(before), len(wanted)), -1, -1):
        own = len(wanted) - part
        is_begun = tuple(before[len(before) - part :]) == wanted[:part]
        if is_begun and tuple(reply[:own]) == wanted[part:]:
            return own
    return None


def _found(
    tokens: Tokens, sequence: Sequence[int], at: npt.NDArray[np.intp]
) -> npt.NDArray[np.bool_]:
    """At which of these positions the sequence stands; at none where it is empty."""
    length = len(sequence)
    whole = at + length <= len(tokens) if length else np.zeros(len(at), dtype=bool)
    for offset, token in enumerate(sequence):
        whole &= tokens[np.minimum(at + offset, len(tokens) - 1)] == token
    return whole


def _holds(tokens: Sequence[int], sequence: tuple[int, ...]) -> bool:
    """Whether a sequence that is not empty stands somewhere in these tokens."""
    length = len(sequence)
    return length > 0 and any(
        token == sequence[0] and tuple(tokens[at : at + length]) == sequence
        for at, token in enumerate(tokens)
    )


def vocabulary_of(tokenizer: Any) -> int:
    """How many token ids a tokenizer uses, added tokens included; 0 where it does not say."""
    found = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    return max(found.values(), default=-1) + 1


class Namespace(NamedTuple):
    """What must be equal for two requests to share anything.

    `settings` is a digest of the model and of how it is run, `salt` the caller's own word. They stay
    apart so that a report never tells one salt about another's prompts.
    """

    settings: str
    salt: str = ""


def settings_digest(**parts: Any) -> str:
    """A short name for a model and the settings it is run with."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
