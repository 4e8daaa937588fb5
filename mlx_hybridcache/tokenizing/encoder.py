"""Text to token ids with one tokenizer: what was read before is looked up, the rest is read."""

from __future__ import annotations

import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np

from ..tokens import Tokens
from .dividers import NotProvenError, dividers, pattern
from .remembered import Remembered

Frame = tuple[list[int], list[int]]
"""What opens and what closes every text."""

WORTH = 512
"""Letters that are known between two parts that are not: fewer are read with them, in one call."""

PROBE = "The lamp of Ada is red."


class Part(NamedTuple):
    """A stretch `[start, end)` of a text. Without `tokens` it has yet to be read."""

    start: int
    end: int
    tokens: Tokens | None


@dataclass(eq=False)
class Encoder:
    """Reads texts with one tokenizer, which does not change from then on. For any thread.

    `whole` says why every text is read as a whole, None where it is read from the first divider on
    that something new stands behind. `frame` is what opens and closes every text, None where that
    is not known.
    """

    tokenizer: Any
    ids: dict[str, int] = field(default_factory=dict)
    whole: str | None = None
    frame: Frame | None = None
    remembered: Remembered = field(default_factory=Remembered)

    @classmethod
    def learn(cls, tokenizer: Any) -> Encoder:
        """Learn once where this tokenizer's texts may be cut."""
        try:
            return cls(tokenizer, dividers(tokenizer), frame=frame(tokenizer))
        except NotProvenError as reason:
            return cls(tokenizer, whole=str(reason))

    def __post_init__(self) -> None:
        self._dividers = pattern(self.ids)
        self._numbers = np.fromiter(self.ids.values(), dtype=np.int32)

    def prompt(self, text: str, salt: str, *, special: bool) -> Sequence[int] | Tokens:
        """The text's tokens, with those that open and close every text if `special`."""
        if self.whole is not None or (special and self.frame is None):
            ids: Sequence[int] = self.tokenizer.encode(text, add_special_tokens=special)
            return ids
        before, behind = self.frame if special and self.frame else ([], [])
        return np.concatenate([as_ids(before), self.read(text, salt), as_ids(behind)])

    def cuts(self, text: str, start: int, end: int) -> list[int]:
        """Positions in `[start, end)` before which a text may be cut, ascending."""
        if self.whole is not None:
            return []
        return [found.start() for found in self._dividers.finditer(text, start, end)]

    def parts(self, text: str, salt: str) -> Iterator[Part]:
        """The text from its beginning to its end: what is known, and between that what is not."""
        if self.whole is not None:
            if text:
                yield Part(0, len(text), None)
            return
        edges = self._edges(text)
        found = self.remembered.find(salt, _between(text, edges))
        stretches = map(Part, edges, edges[1:], found)
        runs = [list(run) for _, run in groupby(stretches, lambda part: part.tokens is None)]
        unread = 0
        for index, run in enumerate(runs):
            start, end = run[0].start, run[-1].end
            known = [part.tokens for part in run if part.tokens is not None]
            if not known or (0 < index < len(runs) - 1 and end - start < WORTH):
                continue
            if unread < start:
                yield Part(unread, start, None)
            yield Part(start, end, np.concatenate(known))
            unread = end
        if unread < len(text):
            yield Part(unread, len(text), None)

    def read(self, text: str, salt: str) -> Tokens:
        """The text's own tokens, int32, shape `(n,)`."""
        parts = [
            self._fresh(text[part.start : part.end], salt) if part.tokens is None else part.tokens
            for part in self.parts(text, salt)
        ]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def _fresh(self, text: str, salt: str) -> Tokens:
        """The tokens of what begins the text or with a divider; each stretch is remembered."""
        tokens = encoded(self.tokenizer, text)
        if self.whole is not None:
            return tokens
        cuts = self.cuts(text, 0, len(text))
        at = np.flatnonzero(np.isin(tokens, self._numbers)).tolist()
        # Else something else became a divider's id, and no one knows which.
        if len(at) == len(cuts):
            starts = at if cuts[:1] == [0] else [0, *at]
            stretches = [tokens[a:b] for a, b in pairwise([*starts, len(tokens)])]
            self.remembered.keep(salt, list(_between(text, self._edges(text))), stretches)
        return tokens

    def _edges(self, text: str) -> list[int]:
        """Ascending, from 0 to the text's length; each pair is a stretch, none of them empty."""
        return sorted({0, *self.cuts(text, 0, len(text)), len(text)})


def frame(tokenizer: Any) -> Frame | None:
    """The tokens that stand before and behind those of a text's own; None if they are no frame."""
    own, whole = (tokenizer.encode(PROBE, add_special_tokens=special) for special in (False, True))
    for at in range(len(whole) - len(own) + 1):
        if whole[at : at + len(own)] == own:
            return whole[:at], whole[at + len(own) :]
    return None


def encoded(tokenizer: Any, text: str) -> Tokens:
    """The text's own tokens by the tokenizer alone, without what opens and closes every text."""
    return as_ids(tokenizer.encode(text, add_special_tokens=False))


def as_ids(ids: Sequence[int]) -> Tokens:
    """int32, shape `(n,)`. `array` reads a list faster than numpy."""
    return np.frombuffer(array.array("i", ids), dtype=np.int32)


def _between(text: str, edges: Sequence[int]) -> Iterator[str]:
    return (text[start:end] for start, end in pairwise(edges))
