"""The response to a request for replies: its places, its time, one object or a stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import ExitStack, aclosing
from typing import Any, Protocol, TypeVar

from fastapi import Request
from starlette.responses import Response

from ..errors import ApiError
from ..generation.admission import Admitted
from ..generation.serving import Serving, serving_of
from ..http.disconnects import unless_gone
from ..http.event_stream import EventStream, StreamFormat, events
from ..http.keepalive import kept_alive
from ..http.wire import JsonResponse
from ..schema.requests import GenerationBody
from .notices import warning_headers
from .parse import check

log = logging.getLogger("mlx_hybridcache.server")

T = TypeVar("T")


class Reply(Protocol):
    """A protocol's shape of a reply that is about to be written."""

    async def whole(self) -> dict[str, Any]:
        """All of it, once it has ended."""
        ...

    def chunks(self) -> AsyncGenerator[bytes]:
        """Its events as they come."""
        ...

    def keepalive(self) -> bytes:
        """What a stream says while it has nothing to say."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """What a stream ends with where it ends too early."""
        ...


Begin = Callable[[Serving, Admitted, int], Coroutine[Any, Any, Reply]]
"""Renders what was asked for, which weighs so many bytes, for the places that it was given."""


async def answered(
    body: GenerationBody, request: Request, replies: int, begin: Begin, stream: StreamFormat
) -> Response:
    """The response, begun or complete. From before it is rendered until it ends it has its places."""
    serving = serving_of(request)
    log.debug("Request: %s", body)
    check(body, serving.settings)
    with ExitStack() as held:
        admitted = serving.admission.admit(replies)
        held.callback(admitted.close)
        if not serving.slot.keep_for(body.keep_alive):
            body.warn("keep_alive", "no time, such as 300, 5m, 0 or -1.")
        weight = len(await request.body())
        beginning = admitted.in_time(begin(serving, admitted, weight))
        if body.stream:
            return await _stream(body, request, beginning, held, stream)
        answer = await unless_gone(request, serving.metrics, beginning)
        headers = warning_headers(request.url.path, body.warnings)
        whole = await unless_gone(request, serving.metrics, answer.whole())
        return JsonResponse(whole, headers=headers)


Work = Callable[[Serving, Admitted, int], Coroutine[Any, Any, T]]
"""What is done with a request that weighs so many bytes, in the place that it was given."""


async def worked(request: Request, work: Work[T]) -> T:
    """What comes of a request for something else than replies: admitted, timed and left like one."""
    serving = serving_of(request)
    admitted = serving.admission.admit(1)
    serving.slot.keep_for()
    try:
        weight = len(await request.body())
        timed = admitted.in_time(work(serving, admitted, weight))
        return await unless_gone(request, serving.metrics, timed)
    finally:
        admitted.close()


async def _stream(
    body: GenerationBody,
    request: Request,
    beginning: Coroutine[Any, Any, Reply],
    held: ExitStack,
    stream: StreamFormat,
) -> Response:
    """A stream that begins with its answer, so that what is refused has a status.

    An answer that takes longer, as its model is loaded first, is waited for in the stream.
    """
    serving = serving_of(request)
    seconds = serving.settings.keepalive_seconds
    work = asyncio.create_task(beginning)
    held.callback(work.cancel)  # which ends nothing that has ended
    await unless_gone(request, serving.metrics, asyncio.wait({work}, timeout=seconds))

    def said() -> dict[str, str]:
        return warning_headers(request.url.path, body.warnings)

    chunks, headers = (work.result().chunks(), said()) if work.done() else (_late(work, said), {})

    def reply() -> Reply | None:
        is_there = work.done() and not work.cancelled() and work.exception() is None
        return work.result() if is_there else None

    def keepalive() -> bytes:
        begun = reply()
        return stream.keepalive if begun is None else begun.keepalive()

    def failure(error: ApiError) -> bytes:
        begun = reply()
        return stream.failure(error) if begun is None else begun.failure(error)

    own = StreamFormat(stream.keepalive, failure, stream.end)
    told = events(kept_alive(chunks, seconds, keepalive), serving.metrics, own)
    return EventStream(told, held.pop_all().close, headers)


async def _late(
    beginning: asyncio.Task[Reply], begun: Callable[[], object]
) -> AsyncGenerator[bytes]:
    """The chunks of an answer that is not there yet. `begun` is called when it is."""
    answer = await beginning
    begun()
    async with aclosing(answer.chunks()) as chunks:
        async for chunk in chunks:
            yield chunk
