"""What the official clients say that replies and events are, held to the letter.

The clients themselves take whatever comes: they build their objects unchecked.
"""

from __future__ import annotations

from typing import Any

import anthropic.types
import openai.types.chat
import openai.types.responses
import openai.types.shared
from pydantic import TypeAdapter

RESPONSE = TypeAdapter(openai.types.responses.Response)
RESPONSE_EVENT = TypeAdapter(openai.types.responses.ResponseStreamEvent)
RESPONSE_ITEMS = TypeAdapter(openai.types.responses.ResponseItemList)
CHAT_REPLY = TypeAdapter(openai.types.chat.ChatCompletion)
CHAT_EVENT = TypeAdapter(openai.types.chat.ChatCompletionChunk)
OPENAI_ERROR = TypeAdapter(openai.types.shared.ErrorObject)
ANTHROPIC_ERROR = TypeAdapter(anthropic.types.ErrorResponse)
MESSAGE = TypeAdapter(anthropic.types.Message)
MESSAGE_EVENT = TypeAdapter(anthropic.types.RawMessageStreamEvent)


def check_chat(events: list[dict[str, Any]]) -> None:
    """Each event by its type and of one reply; one says why it ended, and none that follows says more."""
    for event in events:
        CHAT_EVENT.validate_python(event)
    assert len({each["id"] for each in events}) == 1
    choices = [choice for each in events for choice in each["choices"]]
    assert [choice["finish_reason"] is None for choice in choices] == [True] * (
        len(choices) - 1
    ) + [False]


def check_response(events: list[dict[str, Any]]) -> None:
    """Each event by its type, numbered without a gap; each item is added, then done, one at a time."""
    for event in events:
        RESPONSE_EVENT.validate_python(event)
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    places = [
        (each["type"].rsplit(".")[-1], each["output_index"])
        for each in events
        if each["type"].startswith("response.output_item.")
    ]
    assert places == [(what, at) for at in range(len(places) // 2) for what in ("added", "done")]


def check_message(events: list[dict[str, Any]]) -> None:
    """Each event by its type; each block begins, grows and stops before the next."""
    for event in events:
        MESSAGE_EVENT.validate_python(event)
    assert [events[0]["type"], *(each["type"] for each in events[-2:])] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]
    at, is_open = -1, False
    for event in events[1:-2]:
        begins = event["type"] == "content_block_start"
        at += begins
        assert (event["index"], is_open) == (at, not begins)
        is_open = event["type"] != "content_block_stop"
    assert not is_open
