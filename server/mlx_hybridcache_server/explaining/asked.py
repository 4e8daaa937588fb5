"""A request as it would be sent to any of the endpoints, read as that endpoint reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mlx_hybridcache.tokens import Tokens

from ..anthropic.conversation import MessagesChat
from ..anthropic.conversation import as_chat as of_messages
from ..errors import refuse
from ..generation.models import DEFAULT_NAME, Loaded, Named
from ..prompts.chat import Renderer
from ..prompts.tokenizing import Steps
from ..replies.chat import rendering
from ..responses.conversation import as_chat as of_responses
from ..responses.conversation import input_items
from ..responses.kept import Kept
from ..schema.explain import ENDPOINTS
from ..schema.messages import CountBody
from ..schema.requests import ChatBody, CompletionBody
from ..schema.responses import ResponsesBody
from ..settings import Settings
from .kinds import Kind

Asked = ChatBody | CompletionBody
"""A chat, which requests of three endpoints are put into, or a prompt as it stands."""

B = TypeVar("B", bound=BaseModel)

CHAT, COMPLETIONS, MESSAGES, RESPONSES = ENDPOINTS

OF_MESSAGES = frozenset({"system", "stop_sequences", "anthropic_version", "context_management"})
"""Fields that only requests for messages have."""

BLOCKS = frozenset({"tool_use", "tool_result", "thinking", "redacted_thinking", "document"})
"""Kinds of blocks that only their messages have."""


def read(sent: dict[str, Any], endpoint: str | None, kept: Sequence[Kept] = ()) -> Asked:
    """What is asked for, behind the responses that are `kept` of its conversation.

    Not for the event loop. Raises `ApiError` 400 for what the endpoint would refuse.
    """
    endpoint = endpoint or recognised(sent)
    if endpoint == COMPLETIONS:
        return _checked(CompletionBody, sent, endpoint)
    if endpoint == MESSAGES:
        return of_messages(_checked(CountBody, sent, endpoint))
    if endpoint == RESPONSES:
        body = _checked(ResponsesBody, sent, endpoint)
        if body.previous_response_id is not None and not kept:
            raise refuse(
                "previous_response_id names what only the server knows that keeps it: ask that one, or "
                "send the conversation's items.",
                "previous_response_id",
            )
        before = [item for each in kept for item in each.items()]
        return of_responses(body, [*before, *input_items(body)])
    return _checked(ChatBody, sent, endpoint)


def recognised(sent: Mapping[str, Any]) -> str:
    """The endpoint that a request is for, by its fields. Raises `ApiError` 400."""
    if "messages" in sent:
        return MESSAGES if _is_for_messages(sent) else CHAT
    if "input" in sent:
        return RESPONSES
    if "prompt" in sent:
        return COMPLETIONS
    raise refuse(
        "This is no request: a chat has messages, a response input, a completion a prompt.",
        "requests",
    )


def _is_for_messages(sent: Mapping[str, Any]) -> bool:
    tools = sent["tools"] if isinstance(sent.get("tools"), list) else []
    return (
        bool(OF_MESSAGES & sent.keys())
        or any(isinstance(tool, dict) and "input_schema" in tool for tool in tools)
        or any(
            isinstance(block, dict) and str(block.get("type")) in BLOCKS for block in _blocks(sent)
        )
    )


def _blocks(sent: Mapping[str, Any]) -> Iterator[Any]:
    messages = sent["messages"] if isinstance(sent["messages"], list) else []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        yield from content if isinstance(content, list) else ()


def _checked(model: type[B], sent: dict[str, Any], endpoint: str) -> B:
    try:
        return model.model_validate(sent)
    except ValidationError as error:
        (first, *_) = error.errors()
        place = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise refuse(f"Not a request for {endpoint}: {place}: {said}.", "requests") from error


def tokens_of(asked: Asked, renderer: Renderer, *, opens_reply: bool = True) -> Steps[Tokens]:
    """Its prompt, rendered as for a reply. Raises `ApiError` 400."""
    if isinstance(asked, ChatBody):
        steps = rendering(asked, renderer, opens_reply=opens_reply)
    else:
        steps = renderer.text(prompt_of(asked), salt=asked.cache_salt)
    return (yield from steps).tokens


def prompt_of(asked: CompletionBody) -> str | list[int]:
    """Its only prompt. Raises `ApiError` 400."""
    prompts = asked.prompts()
    if len(prompts) > 1:
        raise refuse(
            "A request with several prompts cannot be explained: send one of them.", "prompt"
        )
    return prompts[0]


def apart(one: Asked, other: Asked, settings: Settings | None = None) -> Kind | None:
    """Why they share nothing; None where they may. Without a server's settings one model serves both."""
    if (one.cache_salt or "") != (other.cache_salt or ""):
        return Kind.OTHER_SALT
    if other.cache_prompt is False:
        return Kind.NOT_CACHED
    if settings is None or not settings.allow_model_switching:
        return None
    return Kind.OTHER_MODEL if _model(one, settings) != _model(other, settings) else None


def is_in_use(asked: Asked, loaded: Loaded, settings: Settings) -> bool:
    """Whether the model and the adapter that it is for are those of which there is to be known what is stored."""
    wanted = _model(asked, settings)
    is_named = wanted.name in loaded.names or (isinstance(asked, MessagesChat) and asked.names_any)
    return not settings.allow_model_switching or (is_named and wanted.adapter == loaded.adapter)


def _model(asked: Asked, settings: Settings) -> Named:
    return Named(asked.model or DEFAULT_NAME, asked.adapters).resolved(settings)
