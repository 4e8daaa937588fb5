"""The endpoint. What answers it is imported with its first request: most servers are never asked."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request

from ..http.wire import JsonRoute
from ..replies.answer import worked
from ..responses.kept import kept_responses
from ..schema.explain import ExplainBody

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/cache/explain", response_model=None)
async def explain(body: ExplainBody, request: Request) -> dict[str, Any]:
    """What of a request would be restored, or what parts it from another one and what that costs.

    Nothing is read or stored. Of a request with a salt only what is stored for that salt is looked at.
    """
    from .answer import explained

    responses = kept_responses(request)
    kept = [
        responses.conversation(name, sent.get("cache_salt"))
        if isinstance(name := sent.get("previous_response_id"), str)
        else []
        for sent in body.requests
    ]
    return await worked(request, partial(explained, body, kept))
