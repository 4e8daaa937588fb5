"""The endpoints under `/v1/cache`: what is stored, read ahead, kept and dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.tokens import Namespace, Tokens

from ..errors import ApiError, refuse
from ..generation.admission import Admitted
from ..generation.models import Loaded
from ..generation.serving import Serving, serving_of
from ..generation.trace import Served
from ..generation.warming import Warming
from ..http.disconnects import unless_gone
from ..http.wire import JsonRoute
from ..replies.answer import worked
from ..schema.requests import Conversation, PrefixBody
from .figures import figures
from .namespaces import named, namespace_trees

router = APIRouter(route_class=JsonRoute)


@router.get("/v1/cache", response_model=None)
async def cache(request: Request) -> dict[str, Any]:
    """What the cache holds, as the last request left it."""
    return figures(serving_of(request))


@router.delete("/v1/cache", response_model=None)
async def clear(request: Request) -> dict[str, Any]:
    """Forget everything stored, pins included; running replies go on."""
    serving = serving_of(request)

    async def work() -> None:
        with ExitStack() as held:
            loaded = await serving.slot.any_model(held)
            await serving.between_turns(loaded.cache.clear)

    await unless_gone(request, serving.metrics, work())
    return figures(serving)


@router.get("/v1/cache/recent", response_model=None)
async def recent(request: Request) -> dict[str, Any]:
    """What the cache did for the last requests, newest first."""
    return {"object": "list", "data": [one.body() for one in serving_of(request).recent]}


@router.post("/v1/cache/warm", response_model=None)
async def warm(body: PrefixBody, request: Request) -> dict[str, Any]:
    """Read the beginning of prompts to come, and store it."""
    return await _admitted(body, request, _warm)


@router.post("/v1/cache/pin", response_model=None)
async def pin(body: PrefixBody, request: Request) -> dict[str, Any]:
    """The same, and keep it whatever comes."""
    return await _admitted(body, request, _pin)


@router.delete("/v1/cache/pin", response_model=None)
async def unpin(body: PrefixBody, request: Request) -> dict[str, Any]:
    """Treat it like everything else again."""
    return await _admitted(body, request, _unpin)


@router.post("/v1/cache/drop", response_model=None)
async def drop(body: PrefixBody, request: Request) -> dict[str, Any]:
    """Forget it with what goes on behind it. What something else begins with stays, and pins refuse."""
    return await _admitted(body, request, _drop)


@dataclass(frozen=True, slots=True)
class _Prefix:
    """What a request names, as tokens. Of a prompt the last one is not stored by reading it."""

    loaded: Loaded
    tokens: Tokens
    salt: str | None
    is_stored: bool = False

    @property
    def cache(self) -> HybridPromptCache:
        return self.loaded.cache

    def to_read(self) -> Tokens:
        """The prompt that is warm when all of it is meant to be."""
        return np.append(self.tokens, self.tokens[-1:]) if self.is_stored else self.tokens


Act = Callable[[_Prefix, Serving, Admitted], Awaitable[dict[str, Any]]]


async def _admitted(body: PrefixBody, request: Request, act: Act) -> dict[str, Any]:
    """What comes of a prefix. It is admitted, timed and left with its client like a reply."""

    async def work(serving: Serving, admitted: Admitted, weight: int) -> dict[str, Any]:
        return await act(await _prefix(body, serving, admitted, weight), serving, admitted)

    return await worked(request, work)


async def _prefix(body: PrefixBody, serving: Serving, admitted: Admitted, weight: int) -> _Prefix:
    if [body.messages, body.prompt, body.key].count(None) != 2:
        raise refuse("Give either messages or a prompt, or the key of what is stored.", "messages")
    if not serving.settings.uses_cache:
        raise refuse("The cache is turned off (--prompt-cache-size 0).")
    loaded = await serving.slot.model(admitted.held, body.model, body.adapters)
    if body.key is not None:
        return await asyncio.to_thread(_stored, body.key, loaded)
    if body.prompt is not None:
        steps = loaded.renderer.text(body.prompt, salt=body.cache_salt)
        rendered = await serving.rendering.steps(steps, weight)
        return _Prefix(loaded, rendered.tokens, body.cache_salt)
    conversation = Conversation(
        messages=body.messages or [],
        tools=body.tools,
        chat_template_kwargs=body.chat_template_kwargs,
        **body.arrangement(),
    )
    prefix = loaded.renderer.prefix(conversation, salt=body.cache_salt)
    tokens = await serving.rendering.steps(prefix, weight)
    return _Prefix(loaded, tokens, body.cache_salt)


def _stored(key: str, loaded: Loaded) -> _Prefix:
    own = Namespace(loaded.cache.info.settings)
    found = named(namespace_trees(loaded.cache.outlines, own), key)
    if found is None:
        raise ApiError(404, f"Nothing is stored under {key!r} any more.", code="not_stored")
    tree, tokens = found
    if tree.salt is None:
        raise ApiError(
            409,
            "This was stored for another model, or for a salt that no request has named since the "
            "start; `mlx-hybridcache cache` looks after it.",
            code="other_namespace",
        )
    return _Prefix(loaded, tokens, tree.salt, is_stored=True)


async def _warm(prefix: _Prefix, serving: Serving, admitted: Admitted) -> dict[str, Any]:
    tokens = prefix.to_read()
    prefix.loaded.renderer.room.check(len(tokens), "key")  # others were checked as they were read
    served = Served.now(prefix.cache.info, tokens, prefix.salt)
    report, position = await Warming(serving, prefix.loaded, tokens, prefix.salt, admitted).done()
    if serving.recorder is not None:
        serving.recorder.put(served)
    return {**asdict(report), "position": position, "pinned": False}


async def _pin(prefix: _Prefix, serving: Serving, admitted: Admitted) -> dict[str, Any]:
    found = await _warm(prefix, serving, admitted)
    kept = await serving.between_turns(prefix.cache.pin, prefix.tokens, cache_salt=prefix.salt)
    return {**found, "pinned": True, "position": kept}


async def _unpin(prefix: _Prefix, serving: Serving, admitted: Admitted) -> dict[str, Any]:
    kept = await serving.between_turns(prefix.cache.unpin, prefix.tokens, cache_salt=prefix.salt)
    return {"pinned": False, "position": kept}


async def _drop(prefix: _Prefix, serving: Serving, admitted: Admitted) -> dict[str, Any]:
    left = await serving.between_turns(prefix.cache.drop, prefix.tokens, cache_salt=prefix.salt)
    return {"dropped": True, "position": left}
