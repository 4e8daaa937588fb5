"""Drafts from what is stored: what followed the last tokens when they occurred before.

Prompt lookup and suffix decoding (arXiv 2304.04487, 2411.04975) without a model: an answer that is asked
for again, a file that is quoted with edits, a tool's result that is repeated. What is searched is what the
store has of the same namespace, the prompt, and the reply as it grows. The index lives as long as the reply
does, so nothing outlives what was dropped, and weighs at most 16 bytes a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from operator import itemgetter, mul

import numpy as np

from ...tokens import Tokens
from .passages import Passages

MOST_SEARCHED = 1 << 16
"""Stored tokens that are searched beside the prompt and the reply, those used last."""

RUNS = (8, 3)
"""Lengths of the runs of tokens that are looked for, the longest first."""
LONGEST = max(RUNS)

SHOWN = 32
"""So many tokens are compared to see which of two places agrees better."""

ROOM = 512
"""Tokens that a reply may grow before the index is made anew, or an eighth of the text if that is more."""

PIECE = 1 << 16
"""Tokens that are put into the index at once: what it takes meanwhile is bounded."""

FEW = 16
"""So many, as a reply grows by, are put in one by one: numpy's calls would take longer."""

FACTORS = tuple(pow(0x9E3779B97F4A7C15, i + 1, 1 << 64) for i in reversed(range(LONGEST)))
"""Of the tokens of the longest run, the first one first; a shorter run has the last ones."""

WORD = (1 << 64) - 1


class RecurringText:
    """A text that grows, and where each run of its tokens ended last.

    A table of positions by hash for each length: what collides is overwritten, so places are compared
    before they are believed. Between two forwards little of this is in the processor's caches, so that
    a token's way through it is kept short: single values are read and written through memoryviews.
    """

    def __init__(self, tokens: Tokens):
        self.length = len(tokens)
        self._make(tokens)

    def _make(self, tokens: Tokens) -> None:
        capacity = len(tokens) + max(ROOM, len(tokens) // 8)
        self._text = np.zeros(capacity, dtype=np.int32)
        self._text[: len(tokens)] = tokens
        bits = capacity.bit_length() - 1
        self._shift = 64 - bits
        self._ends = {run: np.zeros(1 << bits, dtype=np.int32) for run in RUNS}
        self._tokens = self._text.data
        self._places = [(run, ends.data) for run, ends in self._ends.items()]
        self._indexed = 0  # runs that end up to here are in the tables
        self._index(self.length - 1)

    @property
    def nbytes(self) -> int:
        """What it weighs."""
        return self._text.nbytes + sum(ends.nbytes for ends in self._ends.values())

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on."""
        end = self.length + len(tokens)
        if end > len(self._text):
            whole = np.concatenate([self._text[: self.length], np.array(tokens, dtype=np.int32)])
            self.length = end
            self._make(whole)
            return
        if len(tokens) <= FEW:
            for at, token in enumerate(tokens, self.length):
                self._tokens[at] = token
        else:
            self._text[self.length : end] = tokens
        self.length = end
        if self._indexed < end - 1:
            self._index(end - 1)

    def _index(self, end: int) -> None:
        """Put in what ends at most there. The run at the very end of the text is what is looked for."""
        if end - self._indexed <= FEW:
            self._index_singly(end)
        while self._indexed < end:
            first, self._indexed = self._indexed, min(end, self._indexed + PIECE)
            for run, ends in self._ends.items():
                start = max(first, run - 1) + 1  # the first place at which such a run can end
                if start <= self._indexed:
                    ends[self._hashes(run, start, self._indexed)] = np.arange(
                        start, self._indexed + 1, dtype=np.int32
                    )

    def _index_singly(self, end: int) -> None:
        for place in range(self._indexed + 1, end + 1):
            for _, places, at in self._slots(self._before(place)):
                places[at] = place
        self._indexed = max(self._indexed, end)

    def _before(self, place: int) -> list[int]:
        """The tokens of the longest run that ends there, fewer near the text's beginning."""
        found: list[int] = self._tokens[max(0, place - LONGEST) : place].tolist()
        return found

    def _slots(self, last: list[int]) -> list[tuple[int, memoryview, int]]:
        """Each run that ends with these tokens, the longest first: its length, its table and where in that it belongs."""
        products = [*map(mul, last, FACTORS[-len(last) :])]
        return [
            (run, places, (sum(products[-run:]) & WORD) >> self._shift)
            for run, places in self._places
            if run <= len(last)
        ]

    def _hashes(self, run: int, first: int, last: int) -> np.ndarray:
        """Of the runs that end at `first` to `last`."""
        hashes = np.zeros(last + 1 - first, dtype=np.uint64)
        for i in range(run):
            part = self._text[first - run + i : last + 1 - run + i].astype(np.uint64)
            hashes += part * np.uint64(FACTORS[i - run])
        return hashes >> np.uint64(self._shift)

    def find(self) -> tuple[int, int]:
        """A place where the text's last tokens were before, and how many of them agree; (0, 0) for none.

        Once for each end of the text, as it is put into the index with that.
        """
        best = (0, 0)
        last = self._before(self.length)
        for run, places, at in self._slots(last):
            place, places[at] = places[at], self.length
            if place >= run and self._tokens[place - run : place].tolist() == last[-run:]:
                best = max(best, (place, self._agreed(place)), key=itemgetter(1))
        self._indexed = self.length
        return best

    def _agreed(self, place: int) -> int:
        """How many tokens before `place` are those before the text's end."""
        most = min(place, SHOWN)
        there = self._tokens[place - most : place].tolist()
        here = self._tokens[self.length - most : self.length].tolist()
        pairs = zip(reversed(there), reversed(here), strict=True)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def follows(self, place: int, most: int) -> list[int]:
        """How the text goes on at `place`; where it ends there it is taken to repeat itself."""
        found: list[int] = self._tokens[place : min(place + most, self.length)].tolist()
        while found and len(found) < most:
            found += found[: most - len(found)]
        return found

    def goes_on(self, place: int, tokens: Sequence[int]) -> bool:
        """Whether these are the tokens at `place`."""
        there: list[int] = self._tokens[place : min(place + len(tokens), self.length)].tolist()
        return there == [*tokens]


class RecurringDrafter:
    """Drafts what followed where the text was the same before.

    A place that was right is followed on. Before the first token that is where the store has a reply
    to this very prompt.
    """

    def __init__(self, prompt: Tokens, stored: Passages):
        self._text = RecurringText(np.concatenate([*stored.others, stored.ahead, prompt]))
        self._seen = len(prompt)
        self._place = sum(map(len, stored.others)) if len(stored.ahead) else None
        self._agreed = SHOWN if len(stored.ahead) else 0

    @property
    def nbytes(self) -> int:
        """What its index weighs."""
        return self._text.nbytes

    def propose(self, history: Sequence[int], most: int) -> list[int]:
        """As `Drafter.propose`."""
        new = history[self._seen :]
        self._seen = len(history)
        self._text.extend(new)
        if self._place is not None and self._text.goes_on(self._place, new):
            self._place, self._agreed = self._place + len(new), self._agreed + len(new)
        else:
            self._place, self._agreed = None, 0
        if self._agreed < LONGEST:
            place, agreed = self._text.find()
            if agreed > self._agreed:
                self._place, self._agreed = place, agreed
        return [] if self._place is None else self._text.follows(self._place, most)

    def accepted(self, drafted: int, accepted: int) -> None:
        """As `Drafter.accepted`: what was wrong is seen in the history."""

    def end(self, history: Sequence[int] | None) -> None:
        """As `Drafter.end`: the index goes with it."""
