"""The endpoints: put into a chat, hand over, shape the reply, keep it."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..errors import ApiError
from ..generation.admission import Admitted
from ..generation.serving import Serving, serving_of
from ..http.wire import JsonRoute
from ..replies import chat as chats
from ..replies.answer import answered
from ..replies.message import ChatMessage
from ..schema.responses import ResponsesBody
from .conversation import ResponsesChat, as_chat, custom_tools, input_items
from .kept import KeptResponses
from .output import Output
from .reply import STREAM, ResponsesReply, new_id

router = APIRouter(route_class=JsonRoute)

STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

SEALED_THOUGHTS = "reasoning.encrypted_content"


@router.post("/v1/responses", response_model=None, responses=STREAMED)
async def responses(body: ResponsesBody, request: Request) -> Response:
    """A response to a conversation, which may go on from one that is kept."""
    before = _kept(request).conversation(body.previous_response_id, body.cache_salt)
    chat = as_chat(body, [*before, *input_items(body)])
    return await answered(chat, request, 1, partial(_response, body, chat, _kept(request)), STREAM)


@router.get("/v1/responses/{name}", response_model=None)
async def kept(name: str, request: Request, cache_salt: str | None = None) -> dict[str, Any]:
    """One that is kept, as it ended."""
    return _kept(request).find(name, cache_salt).response


@router.get("/v1/responses/{name}/input_items", response_model=None)
async def items(name: str, request: Request, cache_salt: str | None = None) -> dict[str, Any]:
    """What its request added to the conversation, newest first."""
    added = _kept(request).find(name, cache_salt).added
    data = [
        {"type": "message", "id": f"{name.replace('resp', 'msg')}_{at}", **item}
        for at, item in enumerate(added)
    ][::-1]
    ids = {"first_id": data[0]["id"], "last_id": data[-1]["id"]}
    return {"object": "list", "data": data, "has_more": False, **ids}


@router.delete("/v1/responses/{name}", response_model=None)
async def forget(name: str, request: Request, cache_salt: str | None = None) -> dict[str, Any]:
    """Keep it no longer. Nothing can go on from it then."""
    _kept(request).drop(name, cache_salt)
    return {"id": name, "object": "response", "deleted": True}


@router.post("/v1/responses/{name}/cancel", response_model=None)
async def cancel(name: str, request: Request, cache_salt: str | None = None) -> dict[str, Any]:
    """End one that is being written. Its own request is told so, and what was read stays."""
    serving = serving_of(request)
    if not serving.cancel(name, cache_salt):
        found = _kept(request).find(name, cache_salt).response
        raise ApiError(400, f"The response {name!r} has ended; it is {found['status']}.")
    return {"id": name, "object": "response", "status": "cancelled"}


async def _response(
    body: ResponsesBody,
    chat: ResponsesChat,
    kept: KeptResponses,
    serving: Serving,
    admitted: Admitted,
    weight: int,
) -> ResponsesReply:
    loaded = await serving.model(admitted.held, body.model)
    begun = await chats.chat(chat, loaded, serving, admitted, weight)
    (run,) = begun.runs(new_id())

    def keep(response: dict[str, Any]) -> None:
        if body.store is not False:
            kept.keep(response, input_items(body), body.cache_salt)

    output = Output(custom_tools(body), seals=SEALED_THOUGHTS in (body.include or ()))
    message = ChatMessage(begun.calls)
    return ResponsesReply(body, body.model or loaded.id, run, message, output, keep)


def _kept(request: Request) -> KeptResponses:
    kept: KeptResponses = request.app.state.kept_responses
    return kept
