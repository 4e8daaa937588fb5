"""Streams that are never silent: clients and proxies take a silent one for dead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from fastapi.sse import format_sse_event

COMMENT = format_sse_event(comment="keepalive")
"""Where nothing is known of the prompt yet."""


def progress_comment(read: int, total: int) -> bytes:
    """How much of the prompt is read, in mlx_lm.server's form."""
    return format_sse_event(comment=f"keepalive {read}/{total}")


async def kept_alive(
    chunks: AsyncGenerator[bytes], seconds: float, comment: Callable[[], bytes] = lambda: COMMENT
) -> AsyncGenerator[bytes]:
    """The same chunks, and a `comment` whenever none came for so long, whatever the reason.

    Closing this iterator closes `chunks`, wherever that waits.
    """
    coming: asyncio.Future[bytes] | None = None
    try:
        while True:
            if coming is None:
                coming = asyncio.ensure_future(anext(chunks))
            done, _ = await asyncio.wait({coming}, timeout=seconds)
            if not done:
                yield comment()
                continue
            ready, coming = coming, None
            try:
                chunk = ready.result()
            except StopAsyncIteration:
                return
            yield chunk
    finally:
        if coming is not None:
            coming.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration):
                await coming
        await chunks.aclose()
