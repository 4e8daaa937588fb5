"""Work that ends with its client's connection."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request

from ..errors import ApiError
from ..metrics import Metrics

T = TypeVar("T")

CLIENT_GONE = 499
"""nginx's status for a client that closed the connection; nobody reads it but the metrics."""


async def unless_gone(request: Request, metrics: Metrics, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives. It is cancelled when the client goes away first."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_client_leaves(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        metrics.cancelled.inc()
        raise ApiError(CLIENT_GONE, "The client closed the connection.", code="client_gone")
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
