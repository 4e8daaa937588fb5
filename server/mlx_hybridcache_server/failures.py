"""What is refused or fails, said so that it can be put right: what is served, and a line in the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import Scope

from .errors import ApiError

log = logging.getLogger("mlx_hybridcache.server")

MOST_SHOWN = 200
"""Characters of a path in the log: a client may send thousands."""


def log_failure(scope: Scope, status: int) -> None:
    """One line: method, path, status and reason. No text of a prompt, nor what was quoted of it."""
    failure = scope.get("failure")
    reason = failure.reason if isinstance(failure, ApiError) else "no reason given"
    path = ascii(scope["path"])[1:-1][:MOST_SHOWN]
    level = logging.INFO if status < 500 else logging.WARNING
    log.log(level, "%s %s: %d %s", scope["method"], path, status, reason)


def not_served(request: Request, error: HTTPException) -> tuple[HTTPException, dict[str, str]]:
    """404 and 405 of the framework with what is served, and the `Allow` of all methods of a path."""
    if isinstance(error, ApiError):
        return error, {}
    method, path = request.method, request.url.path
    methods = sorted({each for route in _at(request) for each in route.methods or ()})
    if methods:
        if "GET" in methods:
            methods.insert(1 + methods.index("GET"), "HEAD")
        allowed = ", ".join(dict.fromkeys(methods))
        message = f"{method} {path} is not served; this path takes {allowed}."
        return ApiError(405, message, code="method_not_allowed"), {"Allow": allowed}
    paths = dict.fromkeys(
        route.path_format for route in _routes(request) if route.include_in_schema
    )
    message = f"{method} {path} is not served. Served are {', '.join(paths)}."
    return ApiError(404, message, code="not_found"), {}


def _routes(request: Request) -> Iterator[Route]:
    """All routes, those of each router that the application was made of."""
    routers = (request.app, *request.app.state.routers)
    for router in routers:
        yield from (route for route in router.routes if isinstance(route, Route))


def _at(request: Request) -> list[Route]:
    """The routes of a path, whatever their method."""
    return [each for each in _routes(request) if each.matches(request.scope)[0] is not Match.NONE]
