"""What a client sends to have a prompt explained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .requests import Body

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
"""Whose requests can be explained."""

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"]


class ExplainBody(Body):
    """`POST /v1/cache/explain`: one request, or two of which the second came behind the first.

    They are what clients send to an `endpoint`, which is told by their fields where it is not named.
    """

    requests: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=2)]
    endpoint: Endpoint | None = None
