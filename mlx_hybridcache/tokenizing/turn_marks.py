"""What a tokenizer's own chat template says about turns, learnt by rendering a small conversation."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from ..tokens import TurnMarks

_WORDS = ("Katupo", "Lomira", "Mivato")
"""What is said in it: words that no template has in a text of its own."""

_OTHERS = (("Kato.", "Loma!"), ("9", "7"))

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
        self._closers: set[int] = set()

    def marks(self) -> TurnMarks:
        said, answered, again = _WORDS
        talk = [("user", said), ("assistant", answered), ("user", again)]
        # What stands behind the first question: alone, before a reply to come, and before a past one.
        alone = self._encode(_behind(self._render(talk[:1]), said))
        asked = _behind(self._render(talk[:1], reply=True), said)
        asks = self._encode(asked)
        past, _, rest = _behind(self._render(talk), said).partition(answered)
        before = self._encode(past)
        # And what between a reply and the next question; a reply may be closed in another way at the end.
        between = self._encode(rest.partition(again)[0]) if again in rest else []
        closes = _common(between, self._encode(_behind(self._render(talk[:2]), answered)))
        closes_user = _common(alone, before) if alone != asks else []
        self._closers = {*closes, *closes_user}
        reply, turn = asks[len(_common(asks, alone)) :], between[len(closes) :]
        openers = {first for each in (reply, turn) if (first := self._first_of(each)) is not None}
        written = before[len(asks) :] if asks and before[: len(asks)] == asks else []
        start, end = self._thinking
        return TurnMarks(
            openers=frozenset(openers),
            user_opener=self._from_first(turn),
            phrases=() if openers else self._phrases(reply, turn),
            reply_opener=self._from_first(before[len(closes_user) :]),
            written=() if self._first_of(written, self._added_tokens) is None else tuple(written),
            melts=()
            if _has(self._encode(asked + answered)[: len(asks)], asks)
            else tuple(asks[-2:]),
            thinking_end=tuple(self._encode(end)),
            strips_thinking=self._strips(start, end),
            tool_call=self._token("tool_call_start"),
            other_ends=frozenset(self._ends() - {*between[:1]} if between else ()),
        )

    def _ends(self) -> set[int]:
        known = getattr(self._tokenizer, "eos_token_ids", None) or []
        return {int(token) for token in known}

    def _special_ids(self) -> set[int]:
        """Added tokens that may open a turn: special ones, or any where a template uses no others.

        Those around reasoning and calls open no turn.
        """
        special = {int(token) for token in getattr(self._tokenizer, "all_special_ids", [])}
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        return special | {
            int(token) for token, how in added.items() if getattr(how, "special", True)
        }

    def _first_of(self, tokens: list[int], *among: Collection[int]) -> int | None:
        inside = {*self._encode(self._thinking[0]), *self._encode(self._thinking[1])}
        others = self._added_tokens.keys() - inside
        for known in among or (self._special, others):
            found = (token for token in tokens if token in known and token not in self._closers)
            if (first := next(found, None)) is not None:
                return first
        return None

    def _from_first(self, tokens: list[int]) -> tuple[int, ...]:
        """From its first added token on; none where it has none."""
        first = self._first_of(tokens)
        return () if first is None else tuple(tokens[tokens.index(first) :])

    def _phrases(self, *openers: list[int]) -> tuple[tuple[int, ...], ...]:
        return tuple(dict.fromkeys(phrase for each in openers if (phrase := self._phrase(each))))

    def _phrase(self, tokens: list[int]) -> tuple[int, ...]:
        """The longest run of an opener's tokens that is the same whatever is said around it, if that is two or more.

        What is at its edges melts into its neighbours.
        """
        around = [
            self._encode(self._render([("user", a), ("assistant", b), ("user", a)], reply=True))
            for a, b in _OTHERS
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
        said, answered, thought = _WORDS
        reply = f"{start}\n{thought}\n{end}\n\n{answered}"
        rendered = self._render([("user", said), ("assistant", reply), ("user", said)])
        return bool(rendered) and thought not in rendered

    def _render(self, talk: list[tuple[str, str]], *, reply: bool = False) -> str:
        """What the template makes of it; nothing where it cannot, or leaves out what is said.

        Some templates take a list of parts, and no text.
        """
        for shaped in (str, lambda text: [{"type": "text", "text": text}]):
            messages = [{"role": role, "content": shaped(text)} for role, text in talk]
            try:
                text = self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=reply
                )
            except Exception:  # a template may raise anything, jinja2's own errors and its author's
                continue
            if isinstance(text, str) and talk[0][1] in text:
                return text
        return ""

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


def _behind(text: str, word: str) -> str:
    """What follows a word; nothing where it is not there."""
    return text.partition(word)[2]


def _common(one: list[int], other: list[int]) -> list[int]:
    """What both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _has(tokens: list[int], run: list[int]) -> bool:
    return any(tokens[at : at + len(run)] == run for at in range(len(tokens) - len(run) + 1))
