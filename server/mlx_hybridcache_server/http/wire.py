"""JSON as it comes in and goes out: what is not JSON is refused, and never sent."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from fastapi.sse import format_sse_event
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ..errors import ApiError, refuse
from ..jsontext import COMPACT, strict, without_halves

HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
"""What may be half a surrogate pair, or one of the two halves of a character."""

ANTHROPIC = "/v1/messages"
"""What paths begin with whose errors have Anthropic's shape."""

TEXTS = ("input", "instructions", "messages", "prompt", "requests", "system", "tools")
"""Fields that a model reads: what a client cut in the middle of a character is read all the same."""


def read(body: bytes) -> Any:
    """A body's value. Raises `ApiError` 400 for what is not JSON, or not text, or has no end.

    Python's own reader also takes NaN and halves of characters, which nothing can be sent with.
    """
    try:
        text = body.decode(json.detect_encoding(body))
        found = json.loads(text, parse_constant=_no_number)
        if HALF_PAIR.search(text):
            if isinstance(found, dict):
                found |= {name: without_halves(found[name]) for name in TEXTS if name in found}
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise refuse(
            f"The body is not valid JSON: byte {error.start} is not {error.encoding.upper()}."
        ) from error
    except UnicodeEncodeError as error:
        raise refuse(
            "The body has half a surrogate pair, such as \\ud800 alone, which is no character."
        ) from error
    except json.JSONDecodeError as error:
        raise refuse(f"The body is not valid JSON: {error.msg}.") from error
    except RecursionError as error:
        raise refuse("The body is nested too deeply.") from error
    except ValueError as error:  # Python's limit, as reading digits takes quadratic time
        raise refuse("A number in the body has more digits than any number here needs.") from error
    return found


def _no_number(name: str) -> Any:
    raise refuse(f"The body is not valid JSON: {name} is no number there.")


def written(value: Any) -> bytes:
    """`value` as JSON that every reader takes: null for numbers that it does not have."""
    try:
        text = strict(value, COMPACT)
    except ValueError:
        text = strict(_with_numbers(value), COMPACT)
    return text.encode()


def _with_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _with_numbers(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_numbers(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return format_sse_event(data_str=written(body).decode())


def named_event(body: dict[str, Any]) -> bytes:
    """A server-sent event that is named as its type."""
    return format_sse_event(event=body["type"], data_str=written(body).decode())


class JsonResponse(JSONResponse):
    """Starlette's, for any value: it would fail on NaN, and on text that is not Unicode."""

    def render(self, content: Any) -> bytes:
        return written(content)


class ErrorResponse(JsonResponse):
    """An error object, in the shape of the API that was asked. What it says is left in the scope, for who writes the log."""

    def __init__(self, failure: ApiError, headers: Mapping[str, str] | None = None):
        self._failure, self._sent = failure, headers or failure.headers
        super().__init__(failure.body(), failure.status_code, self._sent)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["failure"] = self._failure
        if scope["path"].startswith(ANTHROPIC):
            own = self._failure.body(as_anthropic=True)
            await JsonResponse(own, self.status_code, self._sent)(scope, receive, send)
            return
        await super().__call__(scope, receive, send)


class JsonRoute(APIRoute):
    """FastAPI's, with bodies read by `read`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handled


class _JsonRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = read(await self.body())
        return self._json
