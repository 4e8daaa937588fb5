"""From a request to the function that answers it: its module imported, its parameters read."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

from pydantic import BaseModel, create_model
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from ..http.wire import JsonResponse
from .parameters import body_of, query_of
from .table import ServedPath

Function = Callable[..., Coroutine[Any, Any, Any]]


class Endpoint(Route):
    """A path that is served. Its module is imported by the first request, or for the description.

    Most servers are asked for one or two of the APIs, and never for the others.
    """

    def __init__(self, served: ServedPath):
        self.served = served
        super().__init__(
            served.path,
            self._answer,
            methods=[served.method],
            include_in_schema=served.is_listed,
        )
        assert self.methods is not None
        self.methods &= {served.method}  # HEAD is answered before anything is looked for

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """As Starlette's, which did not always leave in the scope which route it was."""
        match, found = super().matches(scope)
        return match, found if match is Match.NONE else {**found, "route": self}

    @cached_property
    def function(self) -> Function:
        """What answers."""
        module, name = self.served.function.split(":")
        found: Function = getattr(import_module(f"..{module}", __package__), name)
        return found

    @cached_property
    def _parameters(self) -> _Parameters:
        return _Parameters.of(self.function)

    async def _answer(self, request: Request) -> Response:
        wanted = self._parameters
        values: dict[str, Any] = {"request": request} if wanted.request else {}
        values |= {name: request.path_params[name] for name in wanted.path}
        if wanted.query is not None:
            values |= dict(query_of(request, wanted.query))
        if wanted.body is not None:
            values["body"] = await body_of(request, wanted.body)
        answer = await self.function(**values)
        return answer if isinstance(answer, Response) else JsonResponse(answer)


@dataclass(frozen=True, slots=True)
class _Parameters:
    """What a function reads: a `body`, the `request` itself, parts of the path, and a query.

    Those with a default are the query's.
    """

    body: type[BaseModel] | None
    request: bool
    path: tuple[str, ...]
    query: type[BaseModel] | None

    @classmethod
    def of(cls, function: Function) -> _Parameters:
        hints = typing.get_type_hints(function, include_extras=True)
        asked = {
            name: (hints[name], each.default)
            for name, each in inspect.signature(function).parameters.items()
            if each.default is not inspect.Parameter.empty
        }
        others = hints.keys() - {"body", "request", "return", *asked}
        query: Any = (
            create_model("Query", **typing.cast("dict[str, Any]", asked)) if asked else None
        )
        return cls(hints.get("body"), "request" in hints, tuple(sorted(others)), query)
