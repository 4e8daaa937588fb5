"""The content of a reply as Anthropic's clients read it: blocks, and the events that add up to them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from typing import Any

from ..adapter import REASONING
from ..calls.incoming import Arguments, Begin
from ..calls.parts import Part
from ..prompts.messages import arguments

Event = dict[str, Any]
Block = dict[str, Any]


class Content:
    """Blocks as a reply is written: of thoughts, text, and calls, one after the other."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._open = ""
        self._written: list[str] = []

    def add(self, part: Part) -> Iterator[Event]:
        """What is told of the next part."""
        if isinstance(part, Begin):
            yield from self._begin(
                {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
            )
        elif isinstance(part, Arguments):
            yield from self._write("input_json_delta", "partial_json", part.text)
        elif part[0] == REASONING:
            if self._open != "thinking":
                yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
            yield from self._write("thinking_delta", "thinking", part[1])
        else:
            if self._open != "text":
                yield from self._begin({"type": "text", "text": ""})
            yield from self._write("text_delta", "text", part[1])

    def end(self) -> Iterator[Event]:
        """The block that is being written is complete."""
        if not self._open:
            return
        block, text = self._blocks[-1], "".join(self._written)
        if self._open == "tool_use":
            block["input"] = arguments(text)
        else:
            block[self._open] = text
        if self._open == "thinking":
            block["signature"] = _signature(text)
            yield self._delta("signature_delta", "signature", block["signature"])
        self._open, self._written = "", []
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def whole(self) -> list[Block]:
        """All blocks, once the last has ended."""
        return self._blocks

    def _begin(self, block: Block) -> Iterator[Event]:
        yield from self.end()
        self._open = block["type"]
        self._blocks.append(block)
        index = len(self._blocks) - 1
        yield {"type": "content_block_start", "index": index, "content_block": {**block}}

    def _write(self, kind: str, name: str, text: str) -> Iterator[Event]:
        self._written.append(text)
        if text:
            yield self._delta(kind, name, text)

    def _delta(self, kind: str, name: str, text: str) -> Event:
        index = len(self._blocks) - 1
        return {"type": "content_block_delta", "index": index, "delta": {"type": kind, name: text}}


def _signature(thought: str) -> str:
    """Clients send it back with the thought and need one that is not empty. Nobody here reads it."""
    return base64.b64encode(hashlib.sha256(thought.encode()).digest()).decode()
