"""A running server's word on requests."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Any

from ...errors import HybridCacheError
from ..agents import KEY

URL = "http://127.0.0.1:8080"

ANSWER_SECONDS = 600


def ask(url: str, requests: list[dict[str, Any]], endpoint: str | None) -> dict[str, Any]:
    """What the server at `url` says of them. Raises `HybridCacheError` where it says nothing, or refuses."""
    body = {"requests": requests, "endpoint": endpoint}
    request = urllib.request.Request(
        f"{url.rstrip('/')}/v1/cache/explain",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {os.environ.get(KEY) or 'none'}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise HybridCacheError(_refusal(url, error)) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise HybridCacheError(
            f"No server of mlx_hybridcache answers at {url} ({reason}). Start one, name it with --url, or "
            "compare two requests without one: --model."
        ) from error
    return found


def _refusal(url: str, error: urllib.error.HTTPError) -> str:
    try:
        said = json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = "what listens there may be no mlx_hybridcache.server"
    needs = f" (the key is read from {KEY})" if error.code == 401 else ""
    return f"{url} answers {error.code}: {said}{needs}"
