"""The application: what is served, error shapes, and what stands before them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_hybridcache import HybridCacheError

from . import __doc__ as purpose
from .errors import as_api_error
from .failures import log_failure, not_served
from .generation.serving import Serving
from .http.bodies import Bodies
from .http.gate import OWN_ORIGINS, Gate
from .http.head_requests import HeadRequests
from .http.wire import ErrorResponse, JsonResponse
from .log import CLIENTS
from .metrics import Metrics
from .replies.notices import WARNING_HEADER
from .responses.kept import KeptResponses
from .routing.endpoint import Endpoint
from .routing.table import SERVED_PATHS

log = logging.getLogger(CLIENTS)

STALLED_SECONDS = 60

METHODS = "GET, HEAD, POST, DELETE, OPTIONS"

PRIVATE_NETWORK = "Access-Control-Request-Private-Network"


def build_app(serving: Serving) -> Starlette:
    """The application for one server."""
    described = Route("/openapi.json", _description, include_in_schema=False)
    app = Starlette(routes=[described, *map(Endpoint, SERVED_PATHS)])
    app.state.serving = serving
    app.state.kept_responses = KeptResponses()
    app.add_exception_handler(HTTPException, _failed)
    app.add_exception_handler(HybridCacheError, _failed)
    origins = serving.settings.allowed_origins
    # The last one added is the first one asked. An answer from within `_Cors` can be read by a page;
    # what fails outside of it is answered too.
    app.add_middleware(_Options)
    app.add_middleware(HeadRequests)
    app.add_middleware(_Answered)
    app.add_middleware(
        _Cors,
        allow_origins=list(origins),
        allow_origin_regex=OWN_ORIGINS,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=[WARNING_HEADER, "Retry-After"],
    )
    app.add_middleware(_AsJson)
    app.add_middleware(Bodies, settings=serving.settings)
    app.add_middleware(Gate, settings=serving.settings)
    app.add_middleware(_Answered)
    app.add_middleware(_Counted, metrics=serving.metrics)
    return app


async def _failed(request: Request, error: Exception) -> Response:
    headers = getattr(error, "headers", None)
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        error, allow = not_served(request, error)
        headers = {**(headers or {}), **allow}
    return ErrorResponse(as_api_error(error), headers)


async def _description(request: Request) -> Response:
    """What is served and what it takes, for programs."""
    return JsonResponse(await asyncio.to_thread(_described, request.app))


def _described(app: Starlette) -> dict[str, Any]:
    from .routing.openapi import description  # with FastAPI, which describes and serves nothing

    endpoints = [route for route in app.routes if isinstance(route, Endpoint)]
    return description("mlx_hybridcache.server", purpose or "", endpoints)


class _Options:
    """Answers OPTIONS for every path."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            await Response(status_code=204, headers={"Allow": METHODS})(scope, receive, send)
            return
        await self._app(scope, receive, send)


class _Answered:
    """Answers what nobody expected with an error a client can read.

    A client that takes nothing for a minute loses its reply, and its place with it.
    Starlette's own last resort raises again behind its answer, which costs the client its connection.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            async with asyncio.timeout(STALLED_SECONDS):
                await send(message)

        try:
            await self._app(scope, receive, noted)
        except TimeoutError:
            log.warning("A client took nothing for %d s; its reply is dropped.", STALLED_SECONDS)
        except Exception as error:
            if has_begun:
                raise
            log.exception("A request failed.")
            await ErrorResponse(as_api_error(error))(scope, receive, send)


class _Cors(CORSMiddleware):
    """Starlette's, with mlx_lm.server's status for a preflight: 204, as there is nothing to say.

    Some browsers ask besides whether a page of another network may come: its Origin was let in before.
    """

    def preflight_response(self, request_headers: Headers) -> Response:
        asked = MutableHeaders(raw=request_headers.raw.copy())
        is_private = asked.get(PRIVATE_NETWORK) == "true"
        del asked[PRIVATE_NETWORK]  # newer Starlettes refuse it
        response = super().preflight_response(asked)
        if response.status_code == 200:
            kept = {k: v for k, v in response.headers.items() if not k.startswith("content-")}
            kept |= {"Access-Control-Allow-Private-Network": "true"} if is_private else {}
            return Response(status_code=204, headers=kept)
        return response


class _AsJson:
    """Bodies are JSON whatever their type says, as for mlx_lm.server; `curl -d` says they are a form.

    A page could so avoid the browser's preflight; its Origin has been checked before.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            others = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
            scope["headers"] = [*others, (b"content-type", b"application/json")]
        await self._app(scope, receive, send)


class _Counted:
    """Counts every response by endpoint and status. Paths that nobody serves share one name.

    What is refused or fails leaves one line in the log.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                endpoint = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(endpoint, str(message["status"])).inc()
                if message["status"] >= 400:
                    log_failure(scope, message["status"])
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
