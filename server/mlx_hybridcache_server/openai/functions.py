"""Replies to OpenAI's first form of tools, `functions`: one `function_call` in place of `tool_calls`."""

from __future__ import annotations

from typing import Any

from ..generation.pieces import Piece
from .choices import Choice


class FunctionChoice:
    """A chat's choice as clients of that time read it."""

    def __init__(self, choice: Choice):
        self.run = choice.run
        self._choice = choice

    async def take(self, piece: Piece) -> dict[str, Any] | None:
        chunk = await self._choice.take(piece)
        return None if chunk is None else _in_old_form(chunk, "delta")

    def whole(self) -> dict[str, Any]:
        return _in_old_form(self._choice.whole(), "message")


def _in_old_form(choice: dict[str, Any], part: str) -> dict[str, Any]:
    said = {name: value for name, value in choice[part].items() if name != "tool_calls"}
    if calls := choice[part].get("tool_calls"):
        said["function_call"] = calls[0]["function"]
    finish = choice["finish_reason"]
    finish = "function_call" if finish == "tool_calls" else finish
    return {**choice, part: said, "finish_reason": finish}
