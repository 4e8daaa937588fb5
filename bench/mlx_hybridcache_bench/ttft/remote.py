"""A server that runs already as a contender."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..serving.remote import RemoteServer, name_and_url
from .contenders import Contender


def at_url(
    given: str, *, model: str | None, fields: Mapping[str, Any], api_key: str | None
) -> Contender:
    """The server at `URL` or `NAME=URL`, with or without `/v1`. Raises `ServerError`.

    `model` is what requests name; it may be left out where the server has one only.
    """
    name, url = name_and_url(given)
    server = RemoteServer(name, url, api_key)
    if not server.healthy():
        return Contender(name, missing=server.silent)
    model = server.chosen(model)
    return Contender(
        name,
        url=url,
        version=server.version(),
        model={"name": model or "unknown"},
        fields={**fields, **({"model": model} if model else {})},
        api_key=api_key,
    )
