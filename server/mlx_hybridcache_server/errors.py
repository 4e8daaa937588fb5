"""Errors as clients of OpenAI's and Anthropic's APIs read them."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException

from mlx_hybridcache.errors import (
    BudgetError,
    ClosedError,
    GroupError,
    HybridCacheError,
    ModelError,
    NotStoredError,
    PinnedError,
)

RETRY_SECONDS = 5
"""What a client is told to wait for whom there is no room."""

MOST_SAID = 2000
"""Characters of a message: it may quote what a client sent, which may be megabytes."""

ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(HTTPException):
    """A request that is refused or failed: an HTTP status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        shown = message if len(message) <= MOST_SAID else f"{message[:MOST_SAID]}..."
        super().__init__(status, shown, headers)
        self.param, self.code = param, code

    @property
    def reason(self) -> str:
        """Why, for the log: without the message, which may quote what a client sent."""
        kind = self.code or self.body()["error"]["type"]
        return f"{kind} ({self.param})" if self.param else str(kind)

    def body(self, *, as_anthropic: bool = False) -> dict[str, Any]:
        """`{"error": ...}`, for OpenAI's clients or for Anthropic's."""
        if as_anthropic:
            kind = ANTHROPIC_KINDS.get(self.status_code)
            kind = kind or ("invalid_request_error" if self.status_code < 500 else "api_error")
            is_named = self.param is None or self.detail.startswith(self.param)
            said = self.detail if is_named else f"{self.param}: {self.detail}"
            return {"type": "error", "error": {"type": kind, "message": said}}
        kinds = {
            401: "authentication_error",
            403: "permission_error",
            429: "rate_limit_error",
        }
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        return {
            "error": {
                "message": self.detail,
                "type": kinds.get(self.status_code, kind),
                "param": self.param,
                "code": self.code,
            }
        }


def refuse(message: str, param: str | None = None) -> ApiError:
    """What a client can put right."""
    return ApiError(400, message, param=param)


def shutting_down() -> ApiError:
    """What every request hears that comes, or still runs, when the server stops."""
    return ApiError(503, "The server is shutting down.", code="shutting_down")


def as_api_error(error: Exception) -> ApiError:
    """Any exception, as a client should read it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):  # the framework's own: unknown paths, methods, bodies
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, BudgetError):
        return ApiError(503, str(error), code="out_of_memory_budget")
    if isinstance(error, ClosedError):
        return shutting_down()
    if isinstance(error, GroupError):
        return ApiError(503, str(error), code="rank_lost")
    if isinstance(error, NotStoredError):
        return ApiError(404, str(error), code="not_stored")
    if isinstance(error, PinnedError):
        return ApiError(409, str(error), code="pinned")
    if isinstance(error, ModelError):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, HybridCacheError):
        return ApiError(400, str(error))
    return ApiError(500, f"The request failed: {type(error).__name__}: {error}")
