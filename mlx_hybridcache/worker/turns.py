"""Whose turn it is, and what the worker must know of a request for that.

Shortest remaining first, so that a short question does not wait behind a long document. Alone that
would starve the long one under a stream of short ones; so each slice that a prompt is passed over
counts as `AGEING_TOKENS` read, and a prompt of n tokens is passed over by newcomers n / AGEING_TOKENS
times at most.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

AGEING_TOKENS = 256


class Pause:
    """A step that gives its reader nothing."""


PAUSE = Pause()
"""What a request yields to give up its turn without delivering anything."""


def at_once(does: Callable[[], T]) -> Generator[Pause, None, T]:
    """What `does` gives, as steps of a request that take no turn."""
    yield from ()
    return does()


@dataclass(eq=False, slots=True)
class Job:
    """What the worker must know of a request to give it its turn. Written on the worker thread.

    `left` are the tokens to read until somebody gets a first token of it, 0 once it writes;
    `waits` while another one reads what this one needs, `asleep` until something outside the worker
    wakes it: it gets no turns.
    """

    left: int = 0
    waits: bool = False
    asleep: bool = False
    passed_over: int = 0


@dataclass(slots=True)
class Load:
    """How busy the worker is, in requests. Written on the worker thread, read on any."""

    reading: int = 0
    waiting: int = 0
    writing: int = 0

    @property
    def is_shared(self) -> bool:
        """Whether a request that has its turn keeps another one waiting."""
        return self.reading + self.waiting + self.writing > 1


def next_reader(left_tokens: Sequence[int], passed_over: Sequence[int]) -> int:
    """The index of the prompt that reads next, of several in order of arrival.

    `left_tokens` is what each has to read until somebody gets a first token of it, `passed_over`
    how many slices others have read while it could have.
    """
    return min(
        range(len(left_tokens)), key=lambda i: left_tokens[i] - AGEING_TOKENS * passed_over[i]
    )
