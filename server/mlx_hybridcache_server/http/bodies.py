"""How large a body may be, and all bodies that are held at a moment together."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_hybridcache.machine import give_back

from ..errors import RETRY_SECONDS, ApiError
from ..settings import Settings
from .wire import ErrorResponse

TOGETHER = 4
"""Bodies of the largest size that are held at once, however many smaller ones that makes."""

SMALL = 64 * 1024
"""Bytes of a body that is let in beside any others: connections bound how many there are."""

MOST_DIGITS = 18
"""Of a length. Bodies are measured anyway."""

LARGE = 2**20
"""Bytes of a body behind which freed memory goes back to the system."""


class Bodies:
    """Measures bodies as they come, as one that is sent in pieces announces no length.

    A body counts until its request has ended.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app = app
        self._most = settings.max_body_bytes
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = _announced(Headers(scope=scope))
        refused = self._refusal(announced, announced)
        if refused is not None:
            await ErrorResponse(refused)(scope, receive, send)
            return
        seen = 0

        async def measured() -> Message:
            nonlocal seen
            message = await receive()
            came = len(message.get("body", b""))
            seen += came
            self._held += came
            failure = self._refusal(seen, 0) if came else None
            if failure is not None:
                raise failure
            return message

        try:
            await self._app(scope, measured, send)
        finally:
            self._held -= seen
            if seen >= LARGE:
                asyncio.get_running_loop().run_in_executor(None, give_back)

    def _refusal(self, size: int, coming: int) -> ApiError | None:
        """Why a body of so many bytes, of which some are still `coming`, is not let in."""
        if size > self._most:
            return ApiError(
                413,
                f"The request's body is larger than {self._most:,} bytes (--max-body-bytes).",
                code="body_too_large",
            )
        if size > SMALL and self._held + coming > TOGETHER * self._most:
            return ApiError(
                429,
                f"Requests of {self._held:,} bytes are held already, of {TOGETHER * self._most:,} "
                f"that may ({TOGETHER} x --max-body-bytes). Try again later.",
                code="queue_full",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        return None


def _announced(headers: Headers) -> int:
    """The length that a request says its body has. What is no number, or one for nobody, is none."""
    said = headers.get("content-length", "")
    return int(said) if said.isdecimal() and len(said) <= MOST_DIGITS else 0
