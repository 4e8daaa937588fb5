"""What a server says to a command over HTTP: an answer, or one sentence on why there is none."""

from __future__ import annotations

import json
import os
import urllib.request
from http.client import HTTPException, HTTPResponse, InvalidURL
from typing import Any

from ..errors import HybridCacheError, SettingError

KEY = "MLX_HYBRIDCACHE_API_KEY"

LOOK_SECONDS = 10
"""For what a server answers at once, however much it has to do."""

MOST_BYTES = 64 * 2**20
"""Of an answer. A server of ours says nothing longer to a command."""

OK, NO_KEY = 200, 401

LATIN_1 = 255
"""The last letter that a header can hold."""


class NobodyError(HybridCacheError):
    """Nothing listens at an address."""


def served_model(url: str) -> dict[str, Any]:
    """What the server of ours at `url` says of the model that it serves.

    Raises `NobodyError`, `SettingError` for what is no address, and `HybridCacheError` for another's server,
    and for one that wants another key.
    """
    status, said = answer(url, "/v1/models", seconds=LOOK_SECONDS)
    if status == NO_KEY:
        wants = (
            f"does not know the key in {KEY}" if os.environ.get(KEY) else f"wants a key: set {KEY}"
        )
        raise HybridCacheError(f"{url} cannot be used: it {wants}.")
    try:
        served: dict[str, Any] = said["data"][0]
        is_ours = served["owned_by"] == "local"
    except (KeyError, IndexError, TypeError):
        is_ours = False
    if status != OK or not is_ours:
        raise HybridCacheError(f"What listens at {url} is no mlx_hybridcache.server.")
    return served


def answer(
    url: str, path: str, asked: dict[str, Any] | None = None, *, seconds: float
) -> tuple[int, dict[str, Any]]:
    """The status and the object that are answered; an empty one for what is none. `asked` is posted.

    Raises as `served_model` does, and `HybridCacheError` for what cannot be sent, or is not answered in time.
    """
    if not url.startswith(("http://", "https://")):
        raise _no_address(url)
    headers = {"Authorization": f"Bearer {key()}", "Content-Type": "application/json"}
    try:
        body = None if asked is None else json.dumps(asked).encode()
        request = urllib.request.Request(url.rstrip("/") + path, body, headers)
        with urllib.request.build_opener(_AsTheyAre).open(request, timeout=seconds) as found:
            return found.status, _object(found.read(MOST_BYTES))
    except RecursionError as error:
        raise SettingError("What is to be sent is nested too deeply.") from error
    except (ValueError, InvalidURL) as error:
        raise _no_address(url) from error
    except TimeoutError as error:
        said = f"What listens at {url} has not answered within {seconds:g} seconds."
        raise HybridCacheError(said) from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise NobodyError(f"No server answers at {url} ({reason}).") from error
    except HTTPException as error:
        raise HybridCacheError(f"What listens at {url} does not speak HTTP to its end.") from error


class _AsTheyAre(urllib.request.HTTPErrorProcessor):
    """Answers of any status. No redirect is followed: the key would go along."""

    def http_response(
        self, request: urllib.request.Request, response: HTTPResponse
    ) -> HTTPResponse:
        return response

    https_response = http_response


def key() -> str:
    """What is sent as the key: a server without one takes any. Raises `SettingError`."""
    found = os.environ.get(KEY) or "none"
    if not found.isprintable() or any(ord(letter) > LATIN_1 for letter in found):
        raise SettingError(f"{KEY} has letters that no header can hold, or the end of a line.")
    return found


def _no_address(url: str) -> SettingError:
    return SettingError(f"{url!r} is no server's address, such as http://127.0.0.1:8080.")


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
