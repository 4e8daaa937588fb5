"""The endpoints: put into a chat, hand over, shape the reply."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..generation.admission import Admitted
from ..generation.models import Loaded
from ..generation.serving import Serving
from ..http.wire import JsonResponse, JsonRoute
from ..replies import chat as chats
from ..replies.answer import answered, worked
from ..replies.message import ChatMessage
from ..replies.notices import warning_headers
from ..schema.messages import CountBody, MessagesBody
from .conversation import MessagesChat, as_chat, breakpoints
from .reply import STREAM, MessagesReply, new_id

router = APIRouter(route_class=JsonRoute)

STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


@router.post("/v1/messages", response_model=None, responses=STREAMED)
async def messages(body: MessagesBody, request: Request) -> Response:
    """A reply to a conversation."""
    chat, beginnings = await asyncio.to_thread(_chat, body)
    return await answered(chat, request, 1, partial(_message, chat, beginnings), STREAM)


@router.post("/v1/messages/count_tokens", response_model=None)
async def count_tokens(body: CountBody, request: Request) -> Response:
    """How many tokens a conversation's prompt has. It is rendered, and no more."""
    chat = await asyncio.to_thread(as_chat, body)
    tokens = await worked(request, partial(_counted, chat))
    headers = warning_headers(request.url.path, chat.warnings)
    return JsonResponse({"input_tokens": tokens}, headers=headers)


def _chat(body: MessagesBody) -> tuple[MessagesChat, list[chats.Breakpoint]]:
    """Not for the event loop: a history may be as long as a body."""
    chat = as_chat(body)
    return chat, breakpoints(body, chat)


async def _message(
    chat: MessagesChat,
    beginnings: list[chats.Breakpoint],
    serving: Serving,
    admitted: Admitted,
    weight: int,
) -> MessagesReply:
    loaded = await _model(chat, serving, admitted)
    begun = await chats.chat(chat, loaded, serving, admitted, weight, beginnings)
    (run,) = begun.runs(new_id())
    return MessagesReply(loaded.id, run, ChatMessage(begun.calls))


async def _counted(chat: MessagesChat, serving: Serving, admitted: Admitted, weight: int) -> int:
    loaded = await _model(chat, serving, admitted)
    rendered = await serving.rendering.steps(chats.rendering(chat, loaded.renderer), weight)
    return len(rendered.tokens)


async def _model(chat: MessagesChat, serving: Serving, admitted: Admitted) -> Loaded:
    """The one that is served, whatever its name, unless others may be loaded and one is named.

    With the adapter that is named, and with none where none is: others may have asked for one meanwhile.
    """
    slot, held = serving.slot, admitted.held
    if not serving.settings.allow_model_switching:
        own = chat.adapters is None
        return await (slot.any_model(held) if own else slot.model(held, None, chat.adapters))
    if not chat.names_any:
        return await slot.model(held, chat.model, chat.adapters)
    draft = slot.loaded.drafted_by if chat.adapters is None else None
    return await slot.model(held, slot.loaded.source, chat.adapters, draft)
