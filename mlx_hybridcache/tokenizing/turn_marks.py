"""What a tokenizer's own chat template says about turns, learnt by rendering a small conversation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..tokens import TurnMarks

_WORDS = ("Katupo", "Lomira", "Mivato")
"""What is said in it: words that no template has in a text of its own."""

_CLOSING = (("<", "</"), ("[", "[/"), ("START", "END"), ("start", "end"))
"""How the token that closes something is named after the one that opens it."""

_REASONING = re.compile("think|reason|thought", re.IGNORECASE)


def learn_turn_marks(tokenizer: Any) -> TurnMarks:
    """Learn once how turns open, and what the history has of a reply.

    Each prefix of a small conversation is rendered; what a further message adds begins with its
    opener: an added token, or else the tokens of a text. A template that cannot be rendered gives no marks.
    """
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        return TurnMarks()
    return _Learner(tokenizer).marks()


class _Learner:
    """Renders with one tokenizer, and looks at what comes of it."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._added_tokens = _added_tokens(tokenizer)
        self._thinking = _thinking(tokenizer, [*self._added_tokens.values()])
        self._special = self._special_ids()

    def marks(self) -> TurnMarks:
        user, assistant, again = (
            {"role": role, "content": word}
            for role, word in zip(("user", "assistant", "user"), _WORDS, strict=True)
        )
        asked = self._render([user])
        reply = _behind(asked, self._render([user], reply=True))
        before, _, rest = self._render([user, assistant, again]).partition(_WORDS[1])
        past, turn = _behind(asked, before), rest.partition(_WORDS[2])[0]
        # What closes a reply is not yet the next turn; a last reply may be rendered in another way before that.
        closes = self._render([user, assistant]).partition(_WORDS[1])[2]
        turn = turn.removeprefix(closes)
        openers = {
            first
            for text in (reply, turn)
            if (first := self._first_of(self._encode(text))) is not None
        }
        start, end = self._thinking
        return TurnMarks(
            openers=frozenset(openers),
            user_opener=self._from_first(turn),
            phrases=() if openers else self._phrases(reply, turn),
            reply_opener=self._from_first(past),
            thinking_end=tuple(self._encode(end)),
            strips_thinking=self._strips(start, end),
            tool_call=self._token("tool_call_start"),
        )

    def _special_ids(self) -> set[int]:
        """Added tokens that may open a turn: special ones, or any where a template uses no others.

        Those around reasoning and calls open no turn.
        """
        special = {int(token) for token in getattr(self._tokenizer, "all_special_ids", [])}
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        return special | {
            int(token) for token, how in added.items() if getattr(how, "special", True)
        }

    def _first_of(self, tokens: list[int]) -> int | None:
        inside = {*self._encode(self._thinking[0]), *self._encode(self._thinking[1])}
        others = self._added_tokens.keys() - inside
        for known in (self._special, others):
            found = next((token for token in tokens if token in known), None)
            if found is not None:
                return found
        return None

    def _from_first(self, text: str) -> tuple[int, ...]:
        """The tokens of a text from its first added one on; none where it has none."""
        tokens = self._encode(text)
        first = self._first_of(tokens)
        return () if first is None else tuple(tokens[tokens.index(first) :])

    def _phrases(self, *texts: str) -> tuple[tuple[int, ...], ...]:
        found = (self._phrase(text) for text in dict.fromkeys(texts) if text.strip())
        return tuple(phrase for phrase in found if phrase)

    def _phrase(self, text: str) -> tuple[int, ...]:
        """The longest run of a text's tokens that is the same whatever stands around it, if that is two or more.

        What is at its edges melts into its neighbours.
        """
        tokens = self._encode(text)
        around = [
            self._encode(before + text + behind) for before, behind in (("Ka.", "Lo"), ("9", "7"))
        ]
        for length in range(len(tokens), 1, -1):
            for start in range(len(tokens) - length + 1):
                run = tokens[start : start + length]
                if all(_has(each, run) for each in around):
                    return tuple(run)
        return ()

    def _strips(self, start: str, end: str) -> bool:
        """Whether past reasoning does not stay in the history."""
        if not start or not end:
            return False
        reply = {"role": "assistant", "content": f"{start}\n{_WORDS[2]}\n{end}\n\n{_WORDS[1]}"}
        question = {"role": "user", "content": _WORDS[0]}
        rendered = self._render([question, reply, question])
        return bool(rendered) and _WORDS[2] not in rendered

    def _render(self, messages: list[dict[str, str]], *, reply: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=reply
            )
        except Exception:  # a template may raise anything, jinja2's own errors and its author's
            return ""
        return text if isinstance(text, str) else ""

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def _token(self, name: str) -> int | None:
        """The id of a tokenizer's named marker, if it is a single token."""
        ids = self._encode(getattr(self._tokenizer, name, None) or "")
        return ids[0] if len(ids) == 1 else None


def _added_tokens(tokenizer: Any) -> dict[int, str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {int(token): str(getattr(how, "content", how)) for token, how in added.items()}


def _thinking(tokenizer: Any, texts: list[str]) -> tuple[str, str]:
    """What opens and closes reasoning: as mlx-lm says, or by the names of added tokens."""
    start, end = (getattr(tokenizer, name, None) for name in ("think_start", "think_end"))
    if getattr(tokenizer, "has_thinking", False) and start and end:
        return start, end
    return next(_named_pairs(texts), ("", ""))


def _named_pairs(texts: list[str]) -> Iterator[tuple[str, str]]:
    for text in texts:
        for opens, closes in _CLOSING:
            end = text.replace(opens, closes, 1)
            if end != text and end in texts and _REASONING.search(text):
                yield text, end


def _behind(shorter: str, longer: str) -> str:
    """What `longer` adds to `shorter`; nothing where it does not go on from there."""
    return longer[len(shorter) :] if shorter and longer.startswith(shorter) else ""


def _has(tokens: list[int], run: list[int]) -> bool:
    return any(tokens[at : at + len(run)] == run for at in range(len(tokens) - len(run) + 1))
