"""The endpoints: parse, hand over, shape the reply."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import PlainTextResponse, Response

from mlx_hybridcache import HybridPromptCache
from mlx_hybridcache.tokens import Namespace

from . import models
from .answer import Answer, EventStream
from .asks import asks, check
from .assets import asset
from .choices import ChatChoice, TextChoice
from .errors import ApiError, refuse
from .figures import figures
from .forest import Forest, find
from .models import Loaded
from .record import Served
from .replies import ChatMessage, Envelope
from .schema import ChatBody, CompletionBody, Conversation, PrefixBody, WatchBody
from .serving import Run, Serving
from .watch import check_watchable, watch
from .wire import JsonResponse, JsonRoute

log = logging.getLogger("mlx_hybridcache.server")

router = APIRouter(route_class=JsonRoute)
STARTED = int(time.time())
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


def _serving(request: Request) -> Serving:
    serving: Serving = request.app.state.serving
    return serving


@router.post("/v1/chat/completions", response_model=None, responses=STREAMED)
@router.post("/chat/completions", response_model=None, responses=STREAMED)
async def chat(body: ChatBody, request: Request) -> Response:
    """A reply to a conversation."""
    serving = _serving(request)
    log.debug("Request: %s", body)
    check(body, serving.settings)
    serving.check_room()
    loaded = await serving.model(body.model, body.adapters)
    rendered = await serving.render(
        partial(
            loaded.renderer.chat,
            body,
            tool_choice=body.tool_choice,
            continues=bool(body.continue_final_message),
            opens_reply=body.add_generation_prompt is not False,
        )
    )
    constraint = await serving.render(partial(loaded.constraints.of, body, rendered))
    tools = (constraint and constraint.tools) or body.tools
    calls = loaded.tool_format(tools, calls=body.tool_choice != "none")
    wanted = asks(body, rendered, serving.settings, loaded, constraint)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    envelope = Envelope.new("chatcmpl", kind, body.model or loaded.id)
    choices = [
        ChatChoice(
            index, Run(serving, loaded, ask, envelope.id), ChatMessage(calls), loaded.token_names
        )
        for index, ask in enumerate(wanted)
    ]
    answer = Answer(serving, envelope, [choices], body.wants_usage())
    return await answer.respond(request, stream=bool(body.stream))


@router.post("/v1/completions", response_model=None, responses=STREAMED)
async def completions(body: CompletionBody, request: Request) -> Response:
    """A continuation of each prompt."""
    serving = _serving(request)
    log.debug("Request: %s", body)
    check(body, serving.settings)
    serving.check_room()
    loaded = await serving.model(body.model, body.adapters)
    envelope = Envelope.new("cmpl", "text_completion", body.model or loaded.id)
    groups: list[list[TextChoice]] = []
    for prompt in _prompts(body):
        rendered = await serving.render(partial(loaded.renderer.text, prompt))
        constraint = await serving.render(partial(loaded.constraints.of, body, rendered))
        wanted = asks(body, rendered, serving.settings, loaded, constraint)
        echo = _text_of(prompt, loaded) if body.echo else ""
        first = len(groups) * len(wanted)
        groups.append(
            [
                TextChoice(
                    first + i, Run(serving, loaded, ask, envelope.id), loaded.token_names, echo
                )
                for i, ask in enumerate(wanted)
            ]
        )
    answer = Answer(serving, envelope, groups, body.wants_usage())
    return await answer.respond(request, stream=bool(body.stream))


def _prompts(body: CompletionBody) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _text_of(prompt: str | list[int], loaded: Loaded) -> str:
    return prompt if isinstance(prompt, str) else str(loaded.tokenizer.decode(prompt))


@router.get("/health", responses={503: {"description": "The worker has ended"}})
async def health(request: Request) -> Response:
    """Whether requests can be served."""
    if _serving(request).loaded.cache.is_alive:
        return JsonResponse({"status": "ok"})
    return JsonResponse({"status": "unavailable"}, 503)


@router.get("/v1/models", response_model=None)
async def list_models(request: Request) -> dict[str, Any]:
    """What may be named as `model`: the served one, and all on disk if switching is allowed."""
    return {"object": "list", "data": await _models(_serving(request))}


@router.get("/v1/models/{name:path}", response_model=None)
async def one_model(name: str, request: Request) -> dict[str, Any]:
    """One of them. An absolute path may come with its first slash or without."""
    for found in await _models(_serving(request)):
        if found["id"].lstrip("/") == name.lstrip("/"):
            return found
    raise ApiError(404, f"No model {name!r} is served.", param="model", code="model_not_found")


async def _models(serving: Serving) -> list[dict[str, Any]]:
    ids = [serving.loaded.id]
    if serving.settings.allow_model_switching:
        ids += [name for name in await asyncio.to_thread(models.downloaded) if name not in ids]
    return [
        {"id": name, "object": "model", "created": STARTED, "owned_by": "local"} for name in ids
    ]


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    text = generate_latest(_serving(request).metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/cache", response_model=None)
async def cache(request: Request) -> dict[str, Any]:
    """What the cache holds, as the last request left it."""
    return figures(_serving(request))


@router.delete("/v1/cache", response_model=None)
async def clear(request: Request) -> dict[str, Any]:
    """Forget everything stored, pins included; running replies go on."""
    serving = _serving(request)
    await asyncio.to_thread(serving.loaded.cache.clear)
    return figures(serving)


@router.get("/v1/cache/recent", response_model=None)
async def recent(request: Request) -> dict[str, Any]:
    """What the cache did for the last requests, newest first."""
    return {"object": "list", "data": [one.body() for one in _serving(request).recent]}


@router.post("/v1/cache/warm", response_model=None)
async def warm(body: PrefixBody, request: Request) -> dict[str, Any]:
    """Read the beginning of prompts to come, and store it."""
    serving = _serving(request)
    return await _warm(await _prefix(body, serving), serving)


@router.post("/v1/cache/pin", response_model=None)
async def pin(body: PrefixBody, request: Request) -> dict[str, Any]:
    """The same, and keep it whatever comes."""
    serving = _serving(request)
    prefix = await _prefix(body, serving)
    found = await _warm(prefix, serving)
    kept = await asyncio.to_thread(prefix.cache.pin, prefix.tokens, cache_salt=prefix.salt)
    return {**found, "pinned": True, "position": kept}


@router.delete("/v1/cache/pin", response_model=None)
async def unpin(body: PrefixBody, request: Request) -> dict[str, Any]:
    """Treat it like everything else again."""
    prefix = await _prefix(body, _serving(request))
    kept = await asyncio.to_thread(prefix.cache.unpin, prefix.tokens, cache_salt=prefix.salt)
    return {"pinned": False, "position": kept}


@router.post("/v1/cache/drop", response_model=None)
async def drop(body: PrefixBody, request: Request) -> dict[str, Any]:
    """Forget it with what goes on behind it. What something else begins with stays, and pins refuse."""
    prefix = await _prefix(body, _serving(request))
    left = await asyncio.to_thread(prefix.cache.drop, prefix.tokens, cache_salt=prefix.salt)
    return {"dropped": True, "position": left}


@dataclass(frozen=True, slots=True)
class _Prefix:
    """What a request names, as tokens. Of a prompt the last one is not stored by reading it."""

    loaded: Loaded
    tokens: list[int]
    salt: str | None
    is_stored: bool = False

    @property
    def cache(self) -> HybridPromptCache:
        return self.loaded.cache

    def to_read(self) -> list[int]:
        """The prompt that is warm when all of it is meant to be."""
        return [*self.tokens, self.tokens[-1]] if self.is_stored else self.tokens


async def _prefix(body: PrefixBody, serving: Serving) -> _Prefix:
    if [body.messages, body.prompt, body.key].count(None) != 2:
        raise refuse("Give either messages or a prompt, or the key of what is stored.", "messages")
    if not serving.settings.uses_cache:
        raise refuse("The cache is turned off (--prompt-cache-size 0).")
    loaded = await serving.model(body.model)
    if body.key is not None:
        return await asyncio.to_thread(_stored, body.key, loaded)
    if body.prompt is not None:
        rendered = await serving.render(partial(loaded.renderer.text, body.prompt))
        return _Prefix(loaded, rendered.tokens, body.cache_salt)
    conversation = Conversation(
        messages=body.messages or [],
        tools=body.tools,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    tokens = await serving.render(partial(loaded.renderer.prefix, conversation))
    return _Prefix(loaded, tokens, body.cache_salt)


def _stored(key: str, loaded: Loaded) -> _Prefix:
    own = Namespace(loaded.cache.engine.settings)
    found = find(Forest().shelves(loaded.cache.outlines, own), key)
    if found is None:
        raise ApiError(404, f"Nothing is stored under {key!r} any more.", code="not_stored")
    shelf, tokens = found
    if shelf.salt is None:
        raise ApiError(
            409,
            "This was stored for another model, or for a salt that no request has named since the "
            "start; `mlx-hybridcache cache` looks after it.",
            code="other_namespace",
        )
    return _Prefix(loaded, tokens.tolist(), shelf.salt, is_stored=True)


async def _warm(prefix: _Prefix, serving: Serving) -> dict[str, Any]:
    cache, tokens, salt = prefix.cache, prefix.to_read(), prefix.salt
    most = serving.settings.max_prompt_tokens
    if most is not None and len(tokens) > most:
        raise refuse(f"This prefix has {len(tokens):,} tokens; at most {most:,} are read.")
    served = Served.now(cache.engine, tokens, salt)
    async with serving.reading_slots:
        ready = await asyncio.to_thread(cache.prefill, tokens, max_tokens=1, cache_salt=salt)
        ready.release()
    if serving.recorder is not None:
        serving.recorder.put(served)
    found = await asyncio.to_thread(cache.lookup, tokens, cache_salt=salt)
    await asyncio.to_thread(cache.stats)  # so that the figures no longer count what was released
    return {**asdict(ready.report), "position": found.restored_tokens, "pinned": False}


# The page


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """What the cache is doing, to look at."""
    return asset("index.html")


@router.get("/page/{name}", include_in_schema=False)
async def page_file(name: str, request: Request) -> Response:
    """What the page is made of."""
    return asset(name, needs_key=_serving(request).settings.api_key is not None)


@router.post("/v1/cache/watch", include_in_schema=False)
async def watching(body: WatchBody, request: Request) -> Response:
    """The page's events."""
    serving = _serving(request)
    check_watchable(serving)
    return EventStream(watch(serving, body))
