"""The page, and the events that it shows."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..generation.serving import serving_of
from ..http.event_stream import EventStream
from ..http.wire import JsonRoute
from ..schema.requests import WatchBody
from .assets import asset
from .watch import admit_watcher, watch

router = APIRouter(route_class=JsonRoute)


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """What the cache is doing, to look at."""
    return asset("index.html")


@router.get("/page/{name}", include_in_schema=False)
async def page_file(name: str, request: Request) -> Response:
    """What the page is made of."""
    return asset(name, needs_key=serving_of(request).settings.api_key is not None)


@router.post("/v1/cache/watch", include_in_schema=False)
async def watching(body: WatchBody, request: Request) -> Response:
    """The page's events."""
    serving = serving_of(request)
    return EventStream(watch(serving, body), admit_watcher(serving))
