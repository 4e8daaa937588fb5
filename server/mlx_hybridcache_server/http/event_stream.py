"""A response of server-sent events: it says why it ends too early, and lets go of what it held."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from types import MappingProxyType

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..errors import ApiError, as_api_error
from ..log import CLIENTS
from ..metrics import Metrics

log = logging.getLogger(CLIENTS)


@dataclass(frozen=True, slots=True)
class StreamFormat:
    """What streams of one protocol say beside their chunks.

    `keepalive` while nothing is known of the reply yet, `failure` where one ends too early, `end`
    behind everything.
    """

    keepalive: bytes
    failure: Callable[[ApiError], bytes]
    end: bytes = b""


class LastChunk(bytes):
    """What nothing but the stream's end comes behind: both go out as one."""

    __slots__ = ()


async def events(
    chunks: AsyncGenerator[bytes], metrics: Metrics, stream: StreamFormat
) -> AsyncGenerator[bytes]:
    """All of a stream: `chunks` and what ends it.

    What fails after the response began is told by an event, as the status is long sent.
    """
    end = stream.end
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                if isinstance(chunk, LastChunk):
                    yield chunk + end
                    end = b""
                else:
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
        yield stream.failure(failure)
    if end:
        yield end


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
