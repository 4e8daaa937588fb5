"""Several replies read as one stream, those to one prompt behind the first of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from .listen import Piece, Progress
from .serving import Run

WAITING = 16
"""Items of all replies that may wait for a slow client."""


async def merged(groups: Sequence[Sequence[Run]]) -> AsyncGenerator[tuple[Run, Piece | Progress]]:
    """What every run brings, as it comes. Runs of one group share a prompt, which the first reads.

    Closing this iterator, or an error in one run, cancels them all.
    """
    runs = [run for group in groups for run in group]
    if len(runs) == 1:
        async with aclosing(runs[0].pieces()) as pieces:
            async for piece in pieces:
                yield runs[0], piece
        return
    arrived: asyncio.Queue[tuple[Run, Piece | Progress | Exception | None]] = asyncio.Queue(WAITING)
    tasks = [
        asyncio.create_task(_pump(run, arrived, None if run is group[0] else is_read, is_read))
        for group, is_read in ((group, asyncio.Event()) for group in groups)
        for run in group
    ]
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


async def _pump(
    run: Run,
    arrived: asyncio.Queue[tuple[Run, Piece | Progress | Exception | None]],
    after: asyncio.Event | None,
    is_read: asyncio.Event,
) -> None:
    last: Exception | None = None
    try:
        if after is not None:
            await after.wait()
        async with aclosing(run.pieces()) as pieces:
            async for item in pieces:
                if isinstance(item, Piece):
                    is_read.set()
                await arrived.put((run, item))
    except Exception as error:  # whatever it is, the one who reads the stream hears of it
        last = error
    finally:
        is_read.set()
    await arrived.put((run, last))
