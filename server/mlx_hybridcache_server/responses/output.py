"""The output of a response: its items, and the events that add up to them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

from ..adapter import REASONING
from ..calls.incoming import Arguments, Begin
from ..calls.parts import Part
from ..prompts.messages import arguments
from .conversation import sealed

Event = dict[str, Any]
Item = dict[str, Any]

PREFIXES = {
    "reasoning": "rs",
    "message": "msg",
    "function_call": "fc",
    "custom_tool_call": "ctc",
}


class Output:
    """Items as a reply is written: thoughts, a message, calls, one after the other.

    `custom` names the tools whose calls have a text; with `seals` thoughts are there a second time, as
    what clients send back that keep nothing else.
    """

    def __init__(self, custom: frozenset[str] = frozenset(), *, seals: bool = False) -> None:
        self.items: list[Item] = []
        self._custom = custom
        self._seals = seals
        self._open = ""
        self._written: list[str] = []

    def add(self, part: Part) -> Iterator[Event]:
        """What is told of the next part."""
        if isinstance(part, Begin):
            kind = "custom_tool_call" if part.name in self._custom else "function_call"
            given = "input" if part.name in self._custom else "arguments"
            yield from self._begin(kind, call_id=part.id, name=part.name, **{given: ""})
        elif isinstance(part, Arguments):
            yield from self._write("response.function_call_arguments.delta", part.text)
        elif part[0] == REASONING:
            if self._open != "reasoning":
                yield from self._begin("reasoning", summary=[], content=[])
                yield self._part("added", _thought(""))
            yield from self._write("response.reasoning_text.delta", part[1], content_index=0)
        else:
            if self._open != "message":
                yield from self._begin("message", role="assistant", content=[])
                yield self._part("added", _text(""))
            yield from self._write(
                "response.output_text.delta", part[1], content_index=0, logprobs=[]
            )

    def end(self, status: str = "completed") -> Iterator[Event]:
        """The item that is being written ends so."""
        if not self._open:
            return
        item, text = self.items[-1], "".join(self._written)
        yield from self._ended(item, text)
        item["status"] = status
        self._open, self._written = "", []
        yield {"type": "response.output_item.done", **self._place(), "item": {**item}}

    def _ended(self, item: Item, text: str) -> Iterator[Event]:
        if self._open == "reasoning":
            item["content"] = [_thought(text)]
            if self._seals:
                item["encrypted_content"] = sealed(text)
            yield self._event("response.reasoning_text.done", content_index=0, text=text)
            yield self._part("done", _thought(text))
        elif self._open == "message":
            item["content"] = [_text(text)]
            yield self._event("response.output_text.done", content_index=0, text=text, logprobs=[])
            yield self._part("done", _text(text))
        elif self._open == "function_call":
            item["arguments"] = text
            yield self._event(
                "response.function_call_arguments.done", arguments=text, name=item["name"]
            )
        else:
            item["input"] = said = _given(text)
            yield self._event("response.custom_tool_call_input.delta", delta=said)
            yield self._event("response.custom_tool_call_input.done", input=said)

    def _begin(self, kind: str, **fields: Any) -> Iterator[Event]:
        yield from self.end()
        self._open = kind
        own = f"{PREFIXES[kind]}_{secrets.token_hex(12)}"
        self.items.append({"type": kind, "id": own, "status": "in_progress", **fields})
        yield {"type": "response.output_item.added", **self._place(), "item": {**self.items[-1]}}

    def _write(self, kind: str, text: str, **more: Any) -> Iterator[Event]:
        self._written.append(text)
        if text and self._open != "custom_tool_call":  # whose text is known when its JSON ends
            yield self._event(kind, **more, delta=text)

    def _part(self, what: str, part: Item) -> Event:
        return self._event(f"response.content_part.{what}", content_index=0, part=part)

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "item_id": self.items[-1]["id"], **self._place(), **fields}

    def _place(self) -> dict[str, int]:
        return {"output_index": len(self.items) - 1}


def _text(text: str) -> Item:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def text_part(text: str, *, by_user: bool) -> Item:
    """A text as a part of a message."""
    return {"type": "input_text", "text": text} if by_user else _text(text)


def _thought(text: str) -> Item:
    return {"type": "reasoning_text", "text": text}


def _given(text: str) -> str:
    """What a custom tool was given: the text in its arguments, or what was written in their place."""
    given = arguments(text)
    said = given.get("input")
    return said if isinstance(said, str) else json.dumps(given, ensure_ascii=False)
