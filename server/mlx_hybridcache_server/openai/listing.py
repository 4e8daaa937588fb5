"""What there is to ask: whether requests can be served, by which models, and the metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from ..errors import ApiError
from ..generation import models
from ..generation.serving import Serving, serving_of
from ..http.wire import JsonResponse


async def health(request: Request) -> Response:
    """Whether requests can be served."""
    serving = serving_of(request)
    if serving.slot.is_alive:
        resting = {} if serving.slot.state == "loaded" else {"model": serving.slot.state}
        return JsonResponse({"status": "ok", **resting})
    lost = serving.loaded.cache.failure  # any other end of the worker is in the log
    return JsonResponse(
        {"status": "unavailable", **({} if lost is None else {"reason": str(lost)})}, 503
    )


async def list_models(request: Request) -> dict[str, Any]:
    """What may be named as `model`: the served one, and all on disk if switching is allowed."""
    return {"object": "list", "data": await _models(serving_of(request))}


async def one_model(name: str, request: Request) -> dict[str, Any]:
    """One of them, or the served one under any of its names. A path may lack its first slash."""
    serving = serving_of(request)
    for found in await _models(serving):
        if found["id"].lstrip("/") == name.lstrip("/"):
            return found
    if any(own.lstrip("/") == name.lstrip("/") for own in serving.loaded.names):
        longest = serving.loaded.renderer.room.longest
        return _entry(serving, serving.loaded.id, longest) | _state(serving)
    message = f"No model {name!r} is served; {serving.loaded.id!r} is."
    raise ApiError(404, message, param="model", code="model_not_found")


async def _models(serving: Serving) -> list[dict[str, Any]]:
    loaded = serving.loaded
    found = dict.fromkeys(loaded.shown, loaded.renderer.room.longest)
    if serving.settings.allow_model_switching:
        found = await asyncio.to_thread(models.contexts) | found
    ids = [*loaded.shown, *(name for name in found if name not in loaded.shown)]
    own = _state(serving)
    return [
        _entry(serving, name, found[name]) | (own if name in loaded.shown else {}) for name in ids
    ]


def _state(serving: Serving) -> dict[str, str]:
    """Whether the served model is there, where it may be let go of."""
    return {} if serving.settings.idle_unload is None else {"state": serving.slot.state}


def _entry(serving: Serving, name: str, context: int | None) -> dict[str, Any]:
    """OpenAI's object, with what fits into a prompt and its reply under the names that clients know."""
    created = int(serving.started)
    entry = {"id": name, "object": "model", "created": created, "owned_by": "local"}
    return (
        entry if context is None else entry | {"context_length": context, "max_model_len": context}
    )


async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    text = generate_latest(serving_of(request).metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
