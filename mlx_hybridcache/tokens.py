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

    `openers` are the special tokens that open a turn, `user_opener` all the tokens that open a
    user's, its role included: prompts that share a beginning part ways behind them, as tool results
    are mostly rendered in the user's name. `thinking_end` closes reasoning that the
    template strips from past turns, None where it strips none; `tool_call` opens a tool call, after
    which the reasoning stays in the history.
    """

    openers: frozenset[int] = frozenset()
    user_opener: tuple[int, ...] = ()
    thinking_end: int | None = None
    tool_call: int | None = None

    def starts(self, tokens: Tokens) -> list[int]:
        """Positions just behind an opener, ascending."""
        if not self.openers:
            return []
        openers = np.fromiter(self.openers, dtype=np.int32)
        at = np.flatnonzero(
            np.isin(tokens, openers, kind="sort")
        )  # few: no table is made of all ids
        length = len(self.user_opener)
        whole = at + length <= len(tokens) if length else np.zeros(len(at), dtype=bool)
        for offset, token in enumerate(self.user_opener):
            whole &= tokens[np.minimum(at + offset, len(tokens) - 1)] == token
        return [int(position) for position in at + np.where(whole, length, 1)]

    def strips(self, reply: Sequence[int]) -> bool:
        """Whether the next turn's history will leave part of this reply out."""
        if self.thinking_end is None or self.thinking_end not in reply:
            return False
        return self.tool_call is None or self.tool_call not in reply


_WORDS = ("Ka", "Lo", "Mi")


def learn_turn_marks(tokenizer: Any) -> TurnMarks:
    """Learn once, from the tokenizer's own chat template, how turns open.

    Each prefix of a small conversation is rendered; what a further message adds begins with its
    opener, if that is a special token. A template that cannot be rendered gives no marks.
    """
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        return TurnMarks()
    special = {int(token) for token in getattr(tokenizer, "all_special_ids", [])}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special |= {int(token) for token, how in added.items() if getattr(how, "special", True)}
    user, assistant, again = (
        {"role": role, "content": word}
        for role, word in zip(("user", "assistant", "user"), _WORDS, strict=True)
    )
    reply, turn = (
        _added(tokenizer, shorter, longer)
        for shorter, longer in (
            (_render(tokenizer, [user]), _render(tokenizer, [user], reply=True)),
            (
                _render(tokenizer, [user, assistant]),
                _render(tokenizer, [user, assistant, again]).partition(_WORDS[2])[0],
            ),
        )
    )
    openers = {first for added in (reply, turn) if (first := _first_of(added, special)) is not None}
    begins = turn.index(first) if (first := _first_of(turn, special)) is not None else len(turn)
    return TurnMarks(
        frozenset(openers),
        tuple(turn[begins:]),
        _stripped_thinking_end(tokenizer),
        _token(tokenizer, "tool_call_start"),
    )


def vocabulary_of(tokenizer: Any) -> int:
    """How many token ids a tokenizer uses, added tokens included; 0 where it does not say."""
    found = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    return max(found.values(), default=-1) + 1


def _render(tokenizer: Any, messages: list[dict[str, str]], *, reply: bool = False) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
    except Exception:  # a template may raise anything, jinja2's own errors and its author's
        return ""
    return text if isinstance(text, str) else ""


def _added(tokenizer: Any, shorter: str, longer: str) -> list[int]:
    """The tokens of what `longer` adds to `shorter`; none where it does not go on from there."""
    if not shorter or not longer.startswith(shorter):
        return []
    ids = tokenizer.encode(longer[len(shorter) :], add_special_tokens=False)
    return [int(token) for token in ids]


def _first_of(tokens: list[int], special: set[int]) -> int | None:
    return next((token for token in tokens if token in special), None)


def _stripped_thinking_end(tokenizer: Any) -> int | None:
    """The token that closes reasoning, if past reasoning does not stay in the history."""
    start, end = (getattr(tokenizer, name, None) for name in ("think_start", "think_end"))
    if not getattr(tokenizer, "has_thinking", False) or not start or not end:
        return None
    reply = {"role": "assistant", "content": f"{start}\n{_WORDS[2]}\n{end}\n\n{_WORDS[1]}"}
    question = {"role": "user", "content": _WORDS[0]}
    rendered = _render(tokenizer, [question, reply, question])
    return _token(tokenizer, "think_end") if rendered and _WORDS[2] not in rendered else None


def _token(tokenizer: Any, name: str) -> int | None:
    """The id of a tokenizer's named marker, if it is a single token."""
    text = getattr(tokenizer, name, None)
    if not text:
        return None
    ids = tokenizer.encode(text, add_special_tokens=False)
    return int(ids[0]) if len(ids) == 1 else None


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
