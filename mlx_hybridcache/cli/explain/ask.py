"""A running server's word on requests."""

from __future__ import annotations

from typing import Any

from ...errors import HybridCacheError
from ..asking import OK, NobodyError, answer, served_model

URL = "http://127.0.0.1:8080"

ANSWER_SECONDS = 600
"""It may have to load its model, and has others to serve."""


def ask(url: str, requests: list[dict[str, Any]], endpoint: str | None) -> dict[str, Any]:
    """What the server at `url` says of them. Raises `HybridCacheError` where it says nothing, or refuses."""
    body = {"requests": requests, "endpoint": endpoint}
    try:
        served_model(url)
    except NobodyError as error:
        raise HybridCacheError(
            f"{error} Start one, name it with --url, or compare two requests without one: --model."
        ) from error
    try:
        status, found = answer(url, "/v1/cache/explain", body, seconds=ANSWER_SECONDS)
    except NobodyError as error:
        raise HybridCacheError(
            f"{url} hung up. It may take no body so large: --max-body-bytes is its limit."
        ) from error
    if status != OK:
        raise HybridCacheError(f"{url} answers {status}: {_reason(found)}")
    return found


def _reason(found: dict[str, Any]) -> str:
    said = found.get("error")
    message = said.get("message") if isinstance(said, dict) else None
    return message if isinstance(message, str) else "no reason is given."
