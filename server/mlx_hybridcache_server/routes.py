"""The endpoints: parse, hand over, shape the reply."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from . import models
from .answer import Answer
from .asks import asks, check
from .choices import ChatChoice, TextChoice
from .errors import ApiError, refuse
from .models import Loaded
from .record import Served
from .replies import ChatMessage, Envelope
from .schema import ChatBody, CompletionBody, Conversation, PrefixBody
from .serving import Run, Serving

log = logging.getLogger("mlx_hybridcache.server")

router = APIRouter()
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
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "unavailable"}, 503)


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
    return _figures(_serving(request))


@router.delete("/v1/cache", response_model=None)
async def clear(request: Request) -> dict[str, Any]:
    """Forget everything stored, pins included; running replies go on."""
    serving = _serving(request)
    await asyncio.to_thread(serving.loaded.cache.clear)
    return _figures(serving)


def _figures(serving: Serving) -> dict[str, Any]:
    found, disk = serving.loaded.cache.summary, serving.loaded.cache.disk_summary
    return {
        "object": "cache",
        "model": serving.loaded.id,
        "enabled": serving.settings.uses_cache,
        "held_bytes": found.held_bytes,
        **asdict(found),
        "disk": None if disk is None else asdict(disk),
    }


@router.get("/v1/cache/recent", response_model=None)
async def recent(request: Request) -> dict[str, Any]:
    """What the cache did for the last requests, newest first."""
    return {"object": "list", "data": [one.body() for one in _serving(request).recent]}


@router.post("/v1/cache/warm", response_model=None)
async def warm(body: PrefixBody, request: Request) -> dict[str, Any]:
    """Read the beginning of prompts to come, and store it."""
    serving = _serving(request)
    loaded, tokens = await _prefix(body, serving)
    return await _warm(body, serving, loaded, tokens)


@router.post("/v1/cache/pin", response_model=None)
async def pin(body: PrefixBody, request: Request) -> dict[str, Any]:
    """The same, and keep it whatever comes."""
    serving = _serving(request)
    loaded, tokens = await _prefix(body, serving)
    found = await _warm(body, serving, loaded, tokens)
    kept = await asyncio.to_thread(loaded.cache.pin, tokens, cache_salt=body.cache_salt)
    return {**found, "pinned": True, "position": kept}


@router.delete("/v1/cache/pin", response_model=None)
async def unpin(body: PrefixBody, request: Request) -> dict[str, Any]:
    """Treat it like everything else again."""
    loaded, tokens = await _prefix(body, _serving(request))
    kept = await asyncio.to_thread(loaded.cache.unpin, tokens, cache_salt=body.cache_salt)
    return {"pinned": False, "position": kept}


async def _prefix(body: PrefixBody, serving: Serving) -> tuple[Loaded, list[int]]:
    if (body.messages is None) == (body.prompt is None):
        raise refuse("Give either messages or a prompt.", "messages")
    if not serving.settings.uses_cache:
        raise refuse("The cache is turned off (--prompt-cache-size 0).")
    loaded = await serving.model(body.model)
    if body.prompt is not None:
        rendered = await serving.render(partial(loaded.renderer.text, body.prompt))
        return loaded, rendered.tokens
    conversation = Conversation(
        messages=body.messages or [],
        tools=body.tools,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    return loaded, await serving.render(partial(loaded.renderer.prefix, conversation))


async def _warm(
    body: PrefixBody, serving: Serving, loaded: Loaded, tokens: list[int]
) -> dict[str, Any]:
    most = serving.settings.max_prompt_tokens
    if most is not None and len(tokens) > most:
        raise refuse(f"This prefix has {len(tokens):,} tokens; at most {most:,} are read.")
    served = Served.now(loaded.cache.engine, tokens, body.cache_salt)
    async with serving.reading_slots:
        ready = await asyncio.to_thread(
            loaded.cache.prefill, tokens, max_tokens=1, cache_salt=body.cache_salt
        )
        ready.release()
    if serving.recorder is not None:
        serving.recorder.put(served)
    found = await asyncio.to_thread(loaded.cache.lookup, tokens, cache_salt=body.cache_salt)
    return {**asdict(ready.report), "position": found.restored_tokens, "pinned": False}
