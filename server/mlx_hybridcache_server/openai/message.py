"""From pieces to a chat's message, and to the deltas that add up to it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from ..adapter import NORMAL, REASONING, TOOL
from ..calls.formats import ToolFormat
from ..calls.incoming import Arguments, Begin
from ..generation.pieces import Piece


@dataclass(slots=True)
class Delta:
    """What a piece adds to a message."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls)

    def add(self, other: Delta) -> None:
        """Put `other` behind this one."""
        self.content += other.content
        self.reasoning += other.reasoning
        for call in other.tool_calls:
            if "id" in call:
                self.tool_calls.append({**call, "function": {**call["function"]}})
            else:
                self.argue(call["index"], call["function"]["arguments"])

    def argue(self, index: int, text: str) -> None:
        """More of a call's arguments."""
        if not self.tool_calls or self.tool_calls[-1]["index"] != index:
            self.tool_calls.append({"index": index, "function": {"arguments": ""}})
        self.tool_calls[-1]["function"]["arguments"] += text

    def fields(self) -> dict[str, Any]:
        """OpenAI's names; reasoning under both names that clients look for."""
        said: dict[str, Any] = {}
        if self.content:
            said["content"] = self.content
        if self.reasoning:
            said["reasoning"] = said["reasoning_content"] = self.reasoning
        if self.tool_calls:
            said["tool_calls"] = self.tool_calls
        return said


class ChatMessage:
    """One choice of a chat as it is written."""

    def __init__(self, tools: ToolFormat | None = None):
        self._tools = tools
        self._blank = ""  # white space that is content only if more than a call follows
        self._call: list[str] | None = None
        self._calls = 0
        self._has_content = False

    async def take(self, piece: Piece) -> Delta:
        """What `piece` adds."""
        delta = Delta()
        for part in piece.parts:
            if isinstance(part, tuple) and part[0] == TOOL:
                self._call = [*(self._call or ()), part[1]]
                continue
            await self._close_call(delta, is_whole=True)
            if isinstance(part, Begin):
                self._begin(delta, part.name, part.id)
            elif isinstance(part, Arguments):
                delta.argue(self._calls - 1, part.text)
            elif part[0] == REASONING:
                delta.reasoning += part[1]
            elif part[0] == NORMAL:
                self._write(delta, part[1])
        if piece.finish is not None:
            await self._close_call(delta, is_whole=False)
            if self._blank and not self._calls:
                delta.content += self._blank
        return delta

    def finish_reason(self, piece: Piece) -> str | None:
        """OpenAI's word for why it ended."""
        return "tool_calls" if piece.finish == "stop" and self._calls else piece.finish

    def _begin(self, delta: Delta, name: str, given: str) -> None:
        delta.tool_calls.append(
            {
                "index": self._calls,
                "id": given or f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": name, "arguments": ""},
            }
        )
        self._calls += 1

    def _write(self, delta: Delta, text: str) -> None:
        self._blank += text
        if self._has_content or self._blank.strip():
            self._has_content = True
            delta.content, self._blank = delta.content + self._blank, ""

    async def _close_call(self, delta: Delta, *, is_whole: bool) -> None:
        if self._call is None:
            return
        text, self._call = "".join(self._call), None
        assert self._tools is not None, "only its calls come as they were written"
        calls = await self._tools.others(text)
        if calls is None:  # nothing that a model wrote may vanish
            self._write(delta, f"{self._tools.start}{text}{self._tools.end * is_whole}")
            return
        for call in calls:
            self._begin(delta, call["name"], call["id"])
            delta.argue(self._calls - 1, call["arguments"])
