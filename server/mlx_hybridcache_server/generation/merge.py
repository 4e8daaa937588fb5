"""Several replies read as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from .pieces import Piece, PromptProgress
from .serving import RunningReply

WAITING = 16
"""Items of all replies that may wait for a slow client."""

_Arrived = asyncio.Queue[tuple[RunningReply, Piece | PromptProgress | Exception | None]]


async def merged(
    runs: Sequence[RunningReply],
) -> AsyncGenerator[tuple[RunningReply, Piece | PromptProgress]]:
    """What every run brings, as it comes. Runs of one prompt share its reading in the library.

    Closing this iterator, or an error in one run, cancels them all.
    """
    if len(runs) == 1:
        async with aclosing(runs[0].pieces()) as pieces:
            async for piece in pieces:
                yield runs[0], piece
        return
    arrived: _Arrived = asyncio.Queue(WAITING)
    tasks = [asyncio.create_task(_pump(run, arrived)) for run in runs]
    try:
        left = len(tasks)
        while left:
            run, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield run, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(run: RunningReply, arrived: _Arrived) -> None:
    last: Exception | None = None
    try:
        async with aclosing(run.pieces()) as pieces:
            async for item in pieces:
                await arrived.put((run, item))
    except Exception as error:  # whatever it is, the one who reads the stream hears of it
        last = error
    await arrived.put((run, last))
