"""The threads beside the event loop on which prompts are rendered and tokenized, by what they weigh."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from .tokenizing import PIECE, Steps

T = TypeVar("T")

LANES = (64 * 1024, 2**20)
"""Bytes up to which work belongs to the first lane, and to the second; the third has the rest."""


COMPILING = 2
"""Grammars that are compiled at once, which takes up to seconds; nobody's rendering waits for that."""


@dataclass(frozen=True, slots=True)
class _Done(Generic[T]):
    result: T


class Rendering:
    """A thread for short work, one for long, and one for what has no bound but a body's.

    A template renders in one go, so that a short conversation would wait behind a long one on the
    same thread. Behind the template a long prompt is read in pieces, which take turns with others'.
    """

    def __init__(self) -> None:
        self._lanes = [
            ThreadPoolExecutor(1, thread_name_prefix=f"render-{lane}")
            for lane in range(len(LANES) + 1)
        ]
        self._compiling = ThreadPoolExecutor(COMPILING, thread_name_prefix="compile")

    async def steps(self, steps: Steps[T], weight: int) -> T:
        """What `steps` return, of which the first weighs so many bytes. Cancelled between two."""
        while True:
            reached = await self.call(lambda: _advance(steps), weight)
            if isinstance(reached, _Done):
                return reached.result
            weight = reached

    async def call(self, function: Callable[[], T], weight: int) -> T:
        """Run work that cannot be cut."""
        lane = self._lanes[bisect_left(LANES, weight)]
        return await asyncio.get_running_loop().run_in_executor(lane, function)

    async def compile(self, function: Callable[[], T]) -> T:
        """Run what compiles a grammar. It lets other threads of this process go on."""
        return await asyncio.get_running_loop().run_in_executor(self._compiling, function)

    def close(self) -> None:
        """Finish the steps that are under way."""
        for lane in (*self._lanes, self._compiling):
            lane.shutdown(cancel_futures=True)


def _advance(steps: Steps[T]) -> int | _Done[T]:
    """Take steps that are a piece together; what the next one weighs, or what came of all."""
    taken = 0
    try:
        while taken <= PIECE:
            taken += (weight := next(steps))
    except StopIteration as end:
        return _Done(end.value)
    return weight
