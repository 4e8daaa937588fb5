"""What a part of a reply adds to a chat's message, as OpenAI's clients read it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..adapter import REASONING
from ..calls.incoming import Arguments, Begin
from ..calls.parts import Part


@dataclass(slots=True)
class Delta:
    """What is added to a message, or all of it."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, said: Iterable[Part], calls: int) -> Delta:
        """What these parts add behind so many calls."""
        delta = cls()
        for part in said:
            if isinstance(part, Begin):
                delta.call(calls, part)
                calls += 1
            elif isinstance(part, Arguments):
                delta.argue(calls - 1, part.text)
            elif part[0] == REASONING:
                delta.reasoning += part[1]
            else:
                delta.content += part[1]
        return delta

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

    def call(self, index: int, call: Begin) -> None:
        """A call begins, with no arguments yet."""
        function = {"name": call.name, "arguments": ""}
        self.tool_calls.append(
            {"index": index, "id": call.id, "type": "function", "function": function}
        )

    def argue(self, index: int, text: str) -> None:
        """More of the arguments of the last call, which may have begun in an earlier delta."""
        if not self.tool_calls:
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
