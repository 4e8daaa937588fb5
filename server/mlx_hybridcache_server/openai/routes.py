"""The endpoints: parse, hand over, shape the reply."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import PlainTextResponse, Response

from ..errors import ApiError
from ..generation import models
from ..generation.admission import Admitted
from ..generation.models import Loaded
from ..generation.serving import RunningReply, Serving, serving_of
from ..http.wire import JsonResponse, JsonRoute
from ..replies import chat as chats
from ..replies.answer import answered
from ..replies.message import ChatMessage
from ..replies.parse import parse
from ..schema.requests import ChatBody, CompletionBody, GenerationBody
from .choices import ChatChoice, Choice, TextChoice
from .envelope import Envelope
from .functions import FunctionChoice
from .logprobs import TokenNames
from .reply import STREAM, Reply

router = APIRouter(route_class=JsonRoute)
STARTED = int(time.time())
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


@router.post("/v1/chat/completions", response_model=None, responses=STREAMED)
@router.post("/chat/completions", response_model=None, responses=STREAMED)
async def chat(body: ChatBody, request: Request) -> Response:
    """A reply to a conversation."""
    return await answered(body, request, body.n or 1, partial(_chat, body), STREAM)


@router.post("/v1/completions", response_model=None, responses=STREAMED)
async def completions(body: CompletionBody, request: Request) -> Response:
    """A continuation of each prompt."""
    replies = len(body.prompts()) * (body.n or 1)
    return await answered(body, request, replies, partial(_completions, body), STREAM)


async def _model(body: GenerationBody, serving: Serving, admitted: Admitted) -> Loaded:
    """The one that the body names, with the draft model that it names."""
    return await serving.slot.model(admitted.held, body.model, body.adapters, body.draft_model)


async def _chat(body: ChatBody, serving: Serving, admitted: Admitted, weight: int) -> Reply:
    loaded = await _model(body, serving, admitted)
    begun = await chats.chat(body, loaded, serving, admitted, weight)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    envelope = Envelope.new("chatcmpl", kind, body.model or loaded.id)
    choices: list[Choice] = [
        ChatChoice(index, run, ChatMessage(begun.calls), TokenNames(loaded.token_bytes))
        for index, run in enumerate(begun.runs(envelope.id))
    ]
    if body.wants_function_call:
        choices = [FunctionChoice(choice) for choice in choices]
    return Reply(serving, envelope, [choices], body.wants_usage())


async def _completions(
    body: CompletionBody, serving: Serving, admitted: Admitted, weight: int
) -> Reply:
    loaded = await _model(body, serving, admitted)
    envelope = Envelope.new("cmpl", "text_completion", body.model or loaded.id)
    groups: list[list[TextChoice]] = []
    for prompt in body.prompts():
        steps = loaded.renderer.text(prompt, salt=body.cache_salt)
        rendered = await serving.rendering.steps(steps, len(prompt))
        constraint = await chats.constraint(body, rendered, serving, loaded)
        wanted = parse(body, rendered, serving.settings, loaded, constraint)
        echo = ""
        if body.echo:
            echo = await serving.rendering.call(partial(_text_of, prompt, loaded), len(prompt))
        first = len(groups) * len(wanted)
        groups.append(
            [
                TextChoice(
                    first + i,
                    RunningReply(serving, loaded, each, envelope.id, admitted),
                    TokenNames(loaded.token_bytes),
                    echo,
                )
                for i, each in enumerate(wanted)
            ]
        )
    return Reply(serving, envelope, groups, body.wants_usage())


def _text_of(prompt: str | list[int], loaded: Loaded) -> str:
    return prompt if isinstance(prompt, str) else str(loaded.tokenizer.decode(prompt))


@router.get("/health", responses={503: {"description": "The worker has ended"}})
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


@router.get("/v1/models/", response_model=None, include_in_schema=False)
@router.get("/v1/models", response_model=None)
async def list_models(request: Request) -> dict[str, Any]:
    """What may be named as `model`: the served one, and all on disk if switching is allowed."""
    return {"object": "list", "data": await _models(serving_of(request))}


@router.get("/v1/models/{name:path}", response_model=None)
async def one_model(name: str, request: Request) -> dict[str, Any]:
    """One of them, or the served one under any of its names. A path may lack its first slash."""
    serving = serving_of(request)
    for found in await _models(serving):
        if found["id"].lstrip("/") == name.lstrip("/"):
            return found
    if any(own.lstrip("/") == name.lstrip("/") for own in serving.loaded.names):
        return _entry(serving.loaded.id, serving.loaded.renderer.room.longest) | _state(serving)
    message = f"No model {name!r} is served; {serving.loaded.id!r} is."
    raise ApiError(404, message, param="model", code="model_not_found")


async def _models(serving: Serving) -> list[dict[str, Any]]:
    loaded = serving.loaded
    found = dict.fromkeys(loaded.shown, loaded.renderer.room.longest)
    if serving.settings.allow_model_switching:
        found = await asyncio.to_thread(models.contexts) | found
    ids = [*loaded.shown, *(name for name in found if name not in loaded.shown)]
    own = _state(serving)
    return [_entry(name, found[name]) | (own if name in loaded.shown else {}) for name in ids]


def _state(serving: Serving) -> dict[str, str]:
    """Whether the served model is there, where it may be let go of."""
    return {} if serving.settings.idle_unload is None else {"state": serving.slot.state}


def _entry(name: str, context: int | None) -> dict[str, Any]:
    """OpenAI's object, with what fits into a prompt and its reply under the names that clients know."""
    entry = {"id": name, "object": "model", "created": STARTED, "owned_by": "local"}
    return (
        entry if context is None else entry | {"context_length": context, "max_model_len": context}
    )


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    text = generate_latest(serving_of(request).metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
