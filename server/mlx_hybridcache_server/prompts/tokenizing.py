"""From text to tokens in bounded pieces, so that a long prompt holds up nobody and takes little memory.

A tokenizer takes a hundred times a text's size while it reads it, holds its thread as long, and gets
slower with length: 4 MB as a whole took 15 s and 700 MB.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from mlx_hybridcache.tokenizing.encoder import Encoder, as_ids, frame
from mlx_hybridcache.tokens import Tokens

from ..errors import ApiError, refuse
from .vocabulary import longest_token, seams

T = TypeVar("T")

Steps = Generator[int, None, T]
"""Work in steps, beside the event loop. What it yields is what the next one weighs, in characters."""

PIECE = 16 * 1024
"""Characters of a text that are read at once, where it can be cut."""

UNCUT = 4 * 2**20
"""Characters that are read at once at most: a million tokens of prose, and 1 GB on the way."""

AROUND = 128
"""Characters on each side of a seam by which it is tried."""

TRIES = 8
"""Seams that are tried in a row before the next piece is looked at."""

PROBE = "The lamp of Ada is red.\nIt stands near the door."
"""A text with seams, by which a tokenizer is tried once."""


@dataclass(frozen=True, slots=True)
class Room:
    """How many tokens a prompt may have: what the user set, and what the memory budget has room for.

    `context` counts its reply too: it is the model's own limit, or the user's in its place.
    """

    most: int | None = None
    budget: int | None = None
    context: int | None = None

    def check(self, tokens: int, param: str, *, at_least: bool = False) -> None:
        """Raises `ApiError` 400 for a prompt of so many tokens, or of `at_least` so many."""
        limits = (
            (self.most, "this server reads at most {:,} (--max-prompt-tokens)"),
            (self.budget, "the memory budget has room for {:,} (--prompt-cache-bytes)"),
            (
                self.context and self.context - 1,
                "the model's context length lets {:,} in (--context-length)",
            ),
        )
        beyond = [(limit, why) for limit, why in limits if limit is not None and tokens > limit]
        if not beyond:
            return
        limit, why = min(beyond)
        raise ApiError(
            400,
            f"The prompt has {'at least ' * at_least}{tokens:,} tokens; {why.format(limit)}.",
            param=param,
            code="context_length_exceeded",
        )

    def beside(self, tokens: int) -> int | None:
        """How many tokens a reply may have behind a prompt of so many; None for no limit.

        Beyond that its caches would never fit, not even alone, or the model would not know where it is.
        """
        return None if self.longest is None else max(1, self.longest - tokens)

    @property
    def longest(self) -> int | None:
        """How many tokens a prompt and its reply may have together; None for no limit."""
        in_memory = None if self.budget is None else self.budget + 1
        limits = [limit for limit in (in_memory, self.context) if limit is not None]
        return min(limits) if limits else None


NO_LIMIT = Room()


@dataclass(frozen=True, eq=False, slots=True)
class Tokenizing:
    """Reads texts with one tokenizer. Slow for long ones: not for the event loop.

    The steps of several texts may run on several threads at once: a fast tokenizer is only read,
    and one that is written in Python changes no more than what it remembers of words. `frame` is
    what opens and what closes every text. What `encoder` remembers is not read again.
    """

    tokenizer: Any
    encoder: Encoder
    room: Room
    longest_token: int | None
    seams: re.Pattern[str] | None
    frame: tuple[list[int], list[int]] | None

    @classmethod
    def learn(cls, tokenizer: Any, room: Room, encoder: Encoder | None = None) -> Tokenizing:
        """Learn once what the vocabulary proves of every text, and what opens and closes one."""
        encoder = encoder or Encoder.learn(tokenizer)
        made = cls(tokenizer, encoder, room, longest_token(tokenizer), seams(tokenizer), None)
        if not any(made._holds(PROBE, seam) for seam in made._seams(PROBE, 0, len(PROBE))):
            return replace(made, seams=None, frame=encoder.frame)
        return replace(made, frame=encoder.frame or frame(tokenizer))

    def steps(self, text: str, param: str, *, special: bool, salt: str = "") -> Steps[Tokens]:
        """The tokens of `text`, with those that open and close every text if `special`.

        Raises `ApiError` 400 as soon as there are too many: before the first is made, where the
        text's length proves it.
        """
        self._check(0, text, 0, param)
        around = self.frame if special else ([], [])
        if around is None:
            yield self._piece_end(text, 0, len(text), param, can_cut=False)
            tokens = as_ids(self._encode(text, special=True))
            self.room.check(len(tokens), param)
            return tokens
        before, behind = map(as_ids, around)
        found = [before]
        count = len(before) + len(behind)
        for part in self.encoder.parts(text, salt):
            start = part.start
            while start < part.end:
                if part.tokens is None:
                    end = self._piece_end(text, start, part.end, param)
                    yield end - start
                    tokens = self.encoder.read(text[start:end], salt)
                else:
                    end, tokens = part.end, part.tokens
                found.append(tokens)
                count += len(tokens)
                self._check(count, text, end, param)
                start = end
        return np.concatenate([*found, behind])

    def _check(self, tokens: int, text: str, read: int, param: str) -> None:
        """Refuse a text of which `read` characters are `tokens`, as soon as the rest must be too many."""
        left = len(text) - read
        ahead = left // self.longest_token if self.longest_token else 0
        self.room.check(tokens + ahead, param, at_least=left > 0)

    def _piece_end(
        self, text: str, start: int, stop: int, param: str, *, can_cut: bool = True
    ) -> int:
        """Where the piece that begins at `start` ends: where the tokenizer surely cuts, or at `stop`.

        A stretch between two such places is cut at seams if it is too long, counted from where it
        begins: so its pieces are found again, whatever is before it and however it ends.
        """
        if stop - start <= 2 * PIECE:
            return stop
        near = start + PIECE
        if can_cut and (cuts := self.encoder.cuts(text, start + 1, near + PIECE)):
            return max([cut for cut in cuts if cut <= near], default=cuts[0])
        furthest = min(start + UNCUT, stop)
        for near in range(start + PIECE, furthest, PIECE) if can_cut else ():
            for seam in self._seams(text, near, min(near + PIECE, furthest)):
                if self._holds(text, seam):
                    return seam
        if furthest < stop:
            raise refuse(
                f"The prompt has {UNCUT:,} characters without a place where this model's tokenizer "
                "surely cuts, as between two words or lines; so many are not read at once.",
                param,
            )
        return stop

    def _seams(self, text: str, start: int, end: int) -> list[int]:
        """The first that may be one."""
        if self.seams is None:
            return []
        return [seam.start() for seam in islice(self.seams.finditer(text, start, end), TRIES)]

    def _holds(self, text: str, seam: int) -> bool:
        """Whether what is around a seam reads the same when it is cut there."""
        left, right = text[max(0, seam - AROUND) : seam], text[seam : seam + AROUND]
        return self._encode(left + right) == self._encode(left) + self._encode(right)

    def _encode(self, text: str, *, special: bool = False) -> list[int]:
        without = {} if special else {"add_special_tokens": False}
        ids: list[int] = self.tokenizer.encode(text, **without)
        return ids
