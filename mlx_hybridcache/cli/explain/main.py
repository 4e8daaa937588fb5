"""The command `mlx-hybridcache explain`: why a request's prompt is read again, and what to change in its client."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import HybridCacheError, SettingError
from ..flags import Parser, read_text
from .ask import URL, ask
from .show import written

ENDPOINTS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
}


def main(argv: Sequence[str], prog: str) -> int:
    """0: nothing has to change; 1: something is read again, or not stored; 2: it could not be told.

    Raises `HybridCacheError` for a file that is no request, a model that cannot be read, and a server that
    does not answer.
    """
    options = _parser(prog).parse_args(argv)
    requests = [_request(file) for file in options.requests]
    if len(requests) > 2:
        raise SettingError(f"{len(requests)} requests were named; one is explained, or two.")
    endpoint = ENDPOINTS.get(options.endpoint)
    if options.model is None:
        found = ask(options.url or URL, requests, endpoint)
    else:
        found = _locally(requests, endpoint, options)
    try:
        shown = json.dumps(found, indent=2) if options.json else written(found)
        is_hot = found["is_hot"]
    except (KeyError, TypeError, ValueError) as error:
        raise HybridCacheError(
            "The answer lacks what this version shows; the server may be of another one."
        ) from error
    print(shown)
    return 0 if is_hot else 1


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description=__doc__,
        epilog="With one request a server says what it would restore of it; with two, what parts the second "
        "from the first and what that costs.",
    )
    add = parser.add_argument
    add("requests", nargs="+", type=Path, metavar="REQUEST.json", help="one body as sent, or two")
    add("--url", help=f"the server to ask ({URL})")
    add(
        "--model",
        help="compare two requests without a server, with this model's tokenizer: directory, or owner/name",
    )
    add(
        "--endpoint", choices=ENDPOINTS, help="what the requests are for (default: by their fields)"
    )
    add("--json", action="store_true", help="all of it, as JSON")
    return parser


def _request(file: Path) -> dict[str, Any]:
    text = read_text("REQUEST.json", file)
    try:
        found = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{file} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise SettingError(f"{file} holds no JSON object; name a file with a request's body.")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number there")


def _locally(
    requests: list[dict[str, Any]], endpoint: str | None, options: argparse.Namespace
) -> dict[str, Any]:
    if options.url is not None:
        raise SettingError("--url asks a server, --model needs none: leave out one of them.")
    if len(requests) == 1:
        raise SettingError(
            "What would be restored only a server knows: leave out --model, or name a second request."
        )
    from mlx_hybridcache_server.explaining.local import explained

    return explained(requests, endpoint, options.model)
