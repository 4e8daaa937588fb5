"""The FastAPI application: routes, error shapes, and what stands before them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_hybridcache import HybridCacheError

from . import __doc__ as purpose
from .anthropic import routes as anthropic_routes
from .errors import as_api_error, refuse
from .explaining import routes as explain_routes
from .failures import log_failure, not_served
from .generation.serving import Serving
from .http.bodies import Bodies
from .http.gate import OWN_ORIGINS, Gate
from .http.head_requests import HeadRequests
from .http.paths import Paths
from .http.wire import ErrorResponse, JsonResponse
from .log import CLIENTS
from .metrics import Metrics
from .openai import routes as openai_routes
from .probes import routes as probe_routes
from .replies.notices import WARNING_HEADER
from .responses import routes as responses_routes
from .responses.kept import KeptResponses
from .schema.fields import FIELDS
from .watching import cache_routes, page_routes

log = logging.getLogger(CLIENTS)

STALLED_SECONDS = 60

METHODS = "GET, HEAD, POST, DELETE, OPTIONS"

PRIVATE_NETWORK = "Access-Control-Request-Private-Network"

MOST_MISTAKES = 3
"""Mistakes that one error message lists; a prompt of wrong token ids has thousands."""


class Error(BaseModel):
    """What went wrong, for a person and for a program."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's error object."""

    error: Error


class MessagesError(BaseModel):
    """The same in Anthropic's words; where a field is at fault, the message begins with its name."""

    type: str
    message: str


class MessagesErrorReply(BaseModel):
    """Anthropic's error object."""

    type: Literal["error"]
    error: MessagesError


def _errors(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    return {
        "4XX": {"model": model, "description": "Refused, for the reason given"},
        "5XX": {"model": model, "description": "Failed, too late, or shutting down"},
    }


ERRORS = _errors(ErrorReply)
"""What every endpoint may answer, for `/openapi.json`."""

MESSAGES_ERRORS = _errors(MessagesErrorReply)


ROUTERS = (
    cache_routes.router,
    explain_routes.router,
    openai_routes.router,
    anthropic_routes.router,
    responses_routes.router,
    probe_routes.router,
    page_routes.router,
)


def build_app(serving: Serving) -> FastAPI:
    """The application for one server."""
    app = FastAPI(
        title="mlx_hybridcache.server",
        description=purpose or "",
        docs_url=None,  # its page would fetch scripts from elsewhere; /openapi.json is served
        redoc_url=None,
        default_response_class=JsonResponse,
    )
    app.state.serving = serving
    app.state.kept_responses = KeptResponses()
    for router in ROUTERS:
        is_messages = router is anthropic_routes.router
        app.include_router(router, responses=MESSAGES_ERRORS if is_messages else ERRORS)
    app.state.routers = ROUTERS
    app.add_exception_handler(HTTPException, _failed)
    app.add_exception_handler(HybridCacheError, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
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
    app.add_middleware(Paths)
    return app


async def _failed(request: Request, error: Exception) -> Response:
    headers = getattr(error, "headers", None)
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        error, allow = not_served(request, error)
        headers = {**(headers or {}), **allow}
    return ErrorResponse(as_api_error(error), headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    mistakes = [_mistake(one) for one in error.errors()]
    shown = list(dict.fromkeys(f"{where}: {what}" if where else what for where, what in mistakes))
    more = f"; and {len(shown) - MOST_MISTAKES} more" if len(shown) > MOST_MISTAKES else ""
    failure = refuse("; ".join(shown[:MOST_MISTAKES]) + more + ".", mistakes[0][0] or None)
    return ErrorResponse(failure)


def _mistake(found: dict[str, object]) -> tuple[str, str]:
    place = found.get("loc")
    # Between the fields stand pydantic's names for the branches of a union.
    parts = [
        str(part)
        for part in (place[1:] if isinstance(place, tuple) else ())
        if isinstance(part, int) or part in FIELDS
    ]
    if not parts and found.get("type") in ("model_attributes_type", "dict_type"):
        return "", "The body must be a JSON object"
    if found.get("type") == "missing" and not parts:
        return "", "The body is missing: send a JSON object"
    return ".".join(parts), str(found.get("msg", "")).removeprefix("Value error, ")


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
