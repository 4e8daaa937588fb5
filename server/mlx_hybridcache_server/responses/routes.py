"""The endpoints: put into a chat, hand over, shape the reply, keep it."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from ..errors import ApiError
from ..generation.admission import Admitted
from ..generation.serving import Serving, serving_of
from ..http.wire import JsonRoute, written
from ..replies import chat as chats
from ..replies.answer import answered
from ..replies.message import ChatMessage
from ..schema.responses import ResponsesBody
from .conversation import ResponsesChat, as_chat, custom_tools, input_items
from .kept import Kept, KeptResponses, kept_responses, weight_of
from .output import Output, text_part
from .reply import STREAM, ResponsesReply, new_id

router = APIRouter(route_class=JsonRoute)

STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

JSON = "application/json"

LISTED, MOST_LISTED = 20, 100
"""Items of one list, where a client does not say, and at most."""

NO_IDS = {"first_id": None, "last_id": None}

SEALED_THOUGHTS = "reasoning.encrypted_content"


@router.post("/v1/responses", response_model=None, responses=STREAMED)
async def responses(body: ResponsesBody, request: Request) -> Response:
    """A response to a conversation, which may go on from one that is kept."""
    kept = kept_responses(request)
    before = kept.conversation(body.previous_response_id, body.cache_salt)
    weight = weight_of(before, serving_of(request).settings.max_body_bytes)
    chat = await asyncio.to_thread(_chat, body, before)
    return await answered(chat, request, 1, partial(_response, body, chat, kept, weight), STREAM)


@router.get("/v1/responses/{name}", response_model=None)
async def kept(name: str, request: Request, cache_salt: str | None = None) -> Response:
    """One that is kept, as it ended."""
    found = kept_responses(request).find(name, cache_salt)
    return Response(found.response, media_type=JSON)


@router.get("/v1/responses/{name}/input_items", response_model=None)
async def items(
    name: str,
    request: Request,
    cache_salt: str | None = None,
    order: Literal["asc", "desc"] = "desc",
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = LISTED,
    after: str | None = None,
) -> Response:
    """What its request added to the conversation, newest first; `after` is the last item of a list before."""
    found = kept_responses(request).find(name, cache_salt)

    def listed() -> bytes:
        data = [_listed(name, at, item) for at, item in enumerate(found.input_items())]
        data = _behind(data if order == "asc" else data[::-1], after)
        page = data[:limit]
        ids = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else NO_IDS
        more = len(data) > limit
        return written({"object": "list", "data": page, "has_more": more, **ids})

    return Response(await asyncio.to_thread(listed), media_type=JSON)


def _behind(items: list[dict[str, Any]], after: str | None) -> list[dict[str, Any]]:
    """The items behind one of them. Raises `ApiError` 404 where that is not among them."""
    if after is None:
        return items
    for at, item in enumerate(items, 1):
        if item["id"] == after:
            return items[at:]
    raise ApiError(404, f"No item {after!r} is in this list.", param="after", code="item_not_found")


@router.delete("/v1/responses/{name}", response_model=None)
async def forget(name: str, request: Request, cache_salt: str | None = None) -> dict[str, Any]:
    """Keep it no longer. Nothing can go on from it then."""
    kept_responses(request).drop(name, cache_salt)
    return {"id": name, "object": "response", "deleted": True}


@router.post("/v1/responses/{name}/cancel", response_model=None)
async def cancel(name: str, request: Request, cache_salt: str | None = None) -> dict[str, Any]:
    """End one that is being written. Its own request is told so, and what was read stays."""
    serving = serving_of(request)
    if not serving.cancel(name, cache_salt):
        status = json.loads(kept_responses(request).find(name, cache_salt).response)["status"]
        raise ApiError(400, f"The response {name!r} has ended; it is {status}.")
    return {"id": name, "object": "response", "status": "cancelled"}


async def _response(
    body: ResponsesBody,
    chat: ResponsesChat,
    kept: KeptResponses,
    before: int,
    serving: Serving,
    admitted: Admitted,
    weight: int,
) -> ResponsesReply:
    loaded = await serving.slot.model(admitted.held, body.model, body.adapters)
    begun = await chats.chat(chat, loaded, serving, admitted, before + weight)
    (run,) = begun.runs(new_id())

    async def keep(response: dict[str, Any]) -> None:
        if body.store is not False:
            added = input_items(body)
            kept.keep(await asyncio.to_thread(Kept.of, response, added, body.cache_salt))

    output = Output(custom_tools(body), seals=SEALED_THOUGHTS in (body.include or ()))
    message = ChatMessage(begun.calls)
    return ResponsesReply(body, body.model or loaded.id, run, message, output, keep)


def _chat(body: ResponsesBody, before: list[Kept]) -> ResponsesChat:
    """Not for the event loop: a history may be as long as a body."""
    items = [item for kept in before for item in kept.items()]
    return as_chat(body, [*items, *input_items(body)])


def _listed(name: str, at: int, item: dict[str, Any]) -> dict[str, Any]:
    """An item under an id, with its text as a part, as clients read it."""
    listed = {**item, "id": item.get("id") or f"{name.replace('resp', 'msg')}_{at}"}
    if isinstance(said := item.get("content"), str):
        listed["content"] = [text_part(said, by_user=item["role"] != "assistant")]
    return listed
