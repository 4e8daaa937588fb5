"""`/openapi.json`: every path with its parameters and bodies, as FastAPI describes them.

FastAPI is imported when somebody asks for it. It answers no request.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.responses import PlainTextResponse

from ..http.wire import ANTHROPIC, JsonResponse
from .endpoint import Endpoint


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


def description(title: str, purpose: str, endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """The document, as plain values."""
    app = FastAPI(title=title, description=purpose)
    for each in endpoints:
        served = each.served
        app.add_api_route(
            served.path,
            each.function,
            methods=[served.method],
            response_model=None,
            response_class=PlainTextResponse if served.answers == "text" else JsonResponse,
            responses=_answers(each),
            include_in_schema=served.is_listed,
        )
    return app.openapi()


def _answers(endpoint: Endpoint) -> dict[int | str, dict[str, Any]]:
    served = endpoint.served
    model = MessagesErrorReply if served.path.startswith(ANTHROPIC) else ErrorReply
    found: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": model, "description": "Refused, for the reason given"},
        "5XX": {"model": model, "description": "Failed, too late, or shutting down"},
    }
    found |= {status: {"description": meaning} for status, meaning in served.failures.items()}
    if served.answers == "json or events":
        found[200] = {"content": {"text/event-stream": {}}}
    return found
