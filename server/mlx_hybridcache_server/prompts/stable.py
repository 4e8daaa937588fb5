"""Prompts that begin as others do: where volatile lines stand in one, and how they are moved behind the rest.

Pure, and a function of the request alone: the same conversation is rendered alike whatever came before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice, takewhile
from typing import Any, NamedTuple

from .abilities import Message
from .messages import SYSTEM
from .volatile import VolatileSpan, volatile_spans

MODES = ("off", "mark", "move")

HEAD = 256 * 1024
"""Characters of a prompt's beginning that are searched."""

LONGEST_LINE = 400
"""Characters of a line that is moved. What is longer says more than one thing."""

LOOKED_AT = 4
"""Volatile things of the messages, and of the tools, among which the first one of the prompt is looked for."""

GIT = "git"
"""What git says stands in lines that belong together, so it is not moved."""

_LASTING = re.compile(
    r"\b(?:e\.g\b|for example|examples?\b|formats?\b|formatted\b|cut-?off|version|copyright|since\b|released)",
    re.IGNORECASE,
)
"""What is said in a line whose date is no news."""

OPENER, CLOSER = "\n\n<system>\n", "\n</system>"
"""Around the lines that were moved, as around what the system says where a template has no place for it."""


class Volatile(NamedTuple):
    """A text that may not be the same next time, and its kind."""

    text: str
    kind: str


class VolatileLine(NamedTuple):
    """A line `[start, end)` of a text, without its end, and the first volatile span in it."""

    start: int
    end: int
    span: VolatileSpan

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Arranged:
    """A conversation as it is rendered. `volatile` are texts at its head that may not be the same next time.

    `moved` are the kinds of the lines that stand at its end instead, in `note`.
    """

    messages: Sequence[Message]
    volatile: tuple[Volatile, ...] = ()
    note: str = ""
    moved: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StablePrefix:
    """What was done for one prompt.

    `tokens` stand before the first volatile thing at its head, None where there is none; `boundaries` are
    positions for checkpoints; `moved` the kinds of the lines that stand at its end instead.
    """

    mode: str
    tokens: int | None = None
    boundaries: tuple[int, ...] = ()
    moved: tuple[str, ...] = ()
    canonical_tools: bool = False

    def body(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def arranged(messages: Sequence[Message], tools: Sequence[Any], mode: str) -> Arranged:
    """What becomes of a conversation in one of the `MODES`."""
    if mode == "off":
        return Arranged(messages)
    mover = _Mover()
    if mode == "move":
        first = sum(1 for _ in takewhile(_is_system, messages))
        messages = [*map(mover.without, messages[:first]), *messages[first:]]
    return Arranged(messages, _at_the_head(messages, tools), mover.note(), tuple(mover.kinds))


def with_note(turns: list[Message], note: str) -> list[Message]:
    """The turns for a template with `note` behind the last one that is not the assistant's."""
    at = max((at for at, turn in enumerate(turns) if turn["role"] != "assistant"), default=None)
    if not note or at is None:
        return turns
    turn = turns[at]
    return [*turns[:at], {**turn, "content": turn["content"] + note}, *turns[at + 1 :]]


def places(text: str, volatile: Iterable[Volatile]) -> list[int]:
    """Where they begin in a rendered `text`, ascending. One that a template wrote in another way is left out."""
    return sorted({at for each in volatile if (at := text.find(each.text)) >= 0})


def volatile_lines(text: str) -> Iterator[VolatileLine]:
    """Lines with something volatile in them, but of those that speak of dates and of formats."""
    reached = 0
    for span in volatile_spans(text):
        if span.start < reached:
            continue
        start, end = text.rfind("\n", 0, span.start) + 1, text.find("\n", span.end)
        reached = end = len(text) if end < 0 else end
        found = VolatileLine(start, end, span)
        if (
            span.kind == "billing"
            or found.length > LONGEST_LINE
            or not _LASTING.search(text, start, end)
        ):
            yield found


# The head


def _at_the_head(messages: Sequence[Message], tools: Sequence[Any]) -> tuple[Volatile, ...]:
    """The first few volatile texts of what no assistant has answered, and of the tools."""
    head = takewhile(lambda message: message["role"] != "assistant", messages)
    said = chain.from_iterable(_texts(message.get("content")) for message in head)
    found = (islice(_volatile(texts), LOOKED_AT) for texts in (said, _strings(tools)))
    return tuple(chain.from_iterable(found))


def _volatile(texts: Iterable[str]) -> Iterator[Volatile]:
    left = HEAD
    for text in texts:
        for line in volatile_lines(text[:left]):
            yield Volatile(text[line.span.start : line.span.end], line.span.kind)
        left -= len(text)
        if left <= 0:
            return


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    for part in content if isinstance(content, list) else ():
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str):
            yield text


def _strings(value: Any) -> Iterator[str]:
    """Every text in a value of JSON, in its order. Without recursion: a client may nest deeply."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict):
            waiting.extend(reversed(each.values()))
        elif isinstance(each, list | tuple):
            waiting.extend(reversed(each))


# Moving


def _is_system(message: Message) -> bool:
    return message["role"] in SYSTEM


class _Mover:
    """Takes volatile lines out of messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.kinds: list[str] = []
        self._left = HEAD

    def without(self, message: Message) -> Message:
        """The message without its volatile lines, which are remembered."""
        content = message.get("content")
        if isinstance(content, str):
            return {**message, "content": self._without(content)}
        if isinstance(content, list):
            return {**message, "content": [self._part(part) for part in content]}
        return message

    def note(self) -> str:
        """What was taken, to stand somewhere else. Empty if nothing was."""
        lines = "\n".join(self.lines)
        return f"{OPENER}{lines}{CLOSER}" if lines else ""

    def _part(self, part: Any) -> Any:
        if isinstance(part, str):
            return self._without(part)
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            return {**part, "text": self._without(part["text"])}
        return part

    def _without(self, text: str) -> str:
        searched, self._left = _whole_lines(text, self._left), max(0, self._left - len(text))
        kept, reached = [], 0
        for line in volatile_lines(searched):
            if line.length > LONGEST_LINE or line.span.kind == GIT:
                continue
            kept.append(text[reached : line.start])
            self.lines.append(text[line.start : line.end].strip())
            self.kinds.append(line.span.kind)
            reached = min(line.end + 1, len(text))
        return "".join([*kept, text[reached:]])


def _whole_lines(text: str, most: int) -> str:
    """The beginning of a text, so many characters at most, which ends where a line does."""
    return text if len(text) <= most else text[: text.rfind("\n", 0, most) + 1]
