"""Text that arrives in pieces, read by generators that wait for more of it.

What such a generator gives depends on the text alone, never on where it was cut; and each character
is looked at a bounded number of times.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Begin:
    """A call of `name` begins. `id` is the one that the model gave it, or empty."""

    name: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next characters of a call's arguments, which are JSON."""

    text: str


@dataclass(frozen=True, slots=True)
class End:
    """A call is complete."""


@dataclass(frozen=True, slots=True)
class Text:
    """What is no call."""

    text: str


Event = Begin | Arguments | End | Text
Steps = Generator[Event | None, None, T]
"""Gives events as soon as they are known, and None where it needs more text."""


class BrokenCallError(Exception):
    """From here on the text is no call. `raw` was read already, and belongs to it as it stands."""

    def __init__(self, raw: str = "", *, is_too_deep: bool = False):
        self.raw = raw
        self.is_too_deep = is_too_deep


class Incoming:
    """The text, where its reader stands in it, and whether more may come.

    `is_whole` says of a text that has ended whether its writer had ended it.
    """

    def __init__(self, text: str | None = None):
        self._text = text or ""
        self._at = 0
        self._since: list[str] = [self._text]
        self.has_ended = self.is_whole = text is not None

    def feed(self, text: str) -> None:
        """More of it."""
        self._text = self._text[self._at :] + text
        self._at = 0
        self._since.append(text)

    def end(self, *, is_whole: bool) -> None:
        """There is no more."""
        self.has_ended, self.is_whole = True, is_whole

    @property
    def is_read(self) -> bool:
        """Whether nothing is left and nothing will come."""
        return self.has_ended and self._at == len(self._text)

    def mark(self) -> None:
        """Remember from here on what was read."""
        self._since = [self._text[self._at :]]

    def since_mark(self) -> str:
        """All text behind the mark, read or not; now it is read."""
        text = "".join(self._since)
        self._since.clear()
        self._at = len(self._text)
        return text

    def rest(self) -> str:
        """What is there and was not read; now it is."""
        text, self._at = self._text[self._at :], len(self._text)
        self._since.clear()
        return text

    def run(self, pattern: re.Pattern[str]) -> str:
        """Take what matches here, of what is there."""
        found = pattern.match(self._text, self._at)
        assert found is not None, "such a pattern matches nothing at least"
        self._at = found.end()
        return found[0]

    def skip(self, count: int) -> None:
        """Take that many characters, which are there."""
        self._at += count

    def peek(self, count: int) -> Steps[str]:
        """The next characters, which stay; fewer only at the end."""
        while len(self._text) - self._at < count and not self.has_ended:
            yield None
        return self._text[self._at : self._at + count]

    def accept(self, text: str) -> Steps[bool]:
        """Take `text` if it is what follows."""
        while True:
            there = self._text[self._at : self._at + len(text)]
            if there == text:
                self._at += len(text)
                return True
            if self.has_ended or not text.startswith(there):
                return False
            yield None

    def all_of(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Take what matches, however long it is."""
        taken = []
        while True:
            taken.append(self.run(pattern))
            if self._at < len(self._text) or self.has_ended:
                return "".join(taken)
            yield None

    def space(self) -> Steps[str]:
        """Take white space."""
        return (yield from self.all_of(_SPACE))

    def part(self, markers: tuple[str, ...]) -> tuple[str, str | None]:
        """Take text in front of the first marker, and the marker if it is there.

        Without a marker some of the text may be left: what could be the beginning of one.
        """
        found = _any_of(markers).search(self._text, self._at)
        begin = self._at
        if found is not None:
            self._at = found.end()
            return self._text[begin : found.start()], found[0]
        kept = 0
        if not self.has_ended:
            kept = max(overlap(self._text, marker, begin) for marker in markers)
        self._at = len(self._text) - kept
        return self._text[begin : self._at], None

    def until(self, *markers: str, most: int | None = None) -> Steps[tuple[str, str | None]]:
        """Take text and the marker behind it, which is None at the end, or behind `most` characters."""
        taken, count = [], 0
        while True:
            text, marker = self.part(markers)
            taken.append(text)
            count += len(text)
            is_long = most is not None and count > most
            if marker is not None or self.is_read or is_long:
                return "".join(taken), marker
            yield None


def overlap(text: str, marker: str, begin: int = 0) -> int:
    """Length of the longest end of `text` behind `begin` that begins `marker` and is not all of it."""
    at = max(begin, len(text) - len(marker) + 1)
    while (at := text.find(marker[0], at)) >= 0:
        if marker.startswith(text[at:]):
            return len(text) - at
        at += 1
    return 0


@lru_cache(maxsize=256)
def _any_of(markers: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(markers, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


_SPACE = re.compile(r"\s*")


def collected(steps: Steps[T]) -> Steps[tuple[str, T]]:
    """The texts of its events, and what it returns."""
    taken: list[str] = []
    while True:
        try:
            event = next(steps)
        except StopIteration as end:
            return "".join(taken), end.value
        if event is None:
            yield None
        elif isinstance(event, Arguments | Text):
            taken.append(event.text)
