"""The page, and the events that it shows."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from ..generation.serving import serving_of
from ..http.event_stream import EventStream
from ..schema.requests import WatchBody
from .assets import asset
from .watch import admit_watcher, watch


async def page() -> Response:
    """What the cache is doing, to look at."""
    return asset("index.html")


async def page_file(name: str, request: Request) -> Response:
    """What the page is made of."""
    return asset(name, needs_key=serving_of(request).settings.api_key is not None)


async def watching(body: WatchBody, request: Request) -> Response:
    """The page's events."""
    serving = serving_of(request)
    return EventStream(watch(serving, body), admit_watcher(serving))
