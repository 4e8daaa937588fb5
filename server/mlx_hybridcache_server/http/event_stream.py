"""A response of server-sent events: it ends with its error or `[DONE]`, and lets go of what it held."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from types import MappingProxyType

from fastapi.sse import format_sse_event
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..errors import as_api_error
from ..log import CLIENTS
from ..metrics import Metrics
from .wire import event

log = logging.getLogger(CLIENTS)


async def events(chunks: AsyncGenerator[bytes], metrics: Metrics) -> AsyncGenerator[bytes]:
    """All of a stream: `chunks` and `[DONE]`.

    What fails after the response began is told by an event, as the status is long sent.
    """
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk
    except asyncio.CancelledError:
        metrics.cancelled.inc()
        raise
    except Exception as error:
        failure = as_api_error(error)
        if failure.status_code == 500:
            log.exception("A stream failed.")
        else:
            log.warning("A stream ended: %d %s", failure.status_code, failure.reason)
        yield event(failure.body())
    yield format_sse_event(data_str="[DONE]")


class EventStream(StreamingResponse):
    """Server-sent events that end with their response. Starlette leaves a generator that waits in a
    `yield` to the garbage collector, and with it the request and its place. `close` is called behind it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        close: Callable[[], object] = lambda: None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ):
        own = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers={**own, **headers})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = self.body_iterator
        assert isinstance(events, AsyncGenerator)
        try:
            async with aclosing(events):
                await super().__call__(scope, receive, send)
        finally:
            self._close()
