"""From pieces to what a reply says, in order and in no protocol's shape."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

from ..adapter import NORMAL, REASONING, TOOL
from ..calls.incoming import Arguments, Begin
from ..calls.parts import Part
from ..generation.pieces import Piece

if TYPE_CHECKING:
    from ..calls.formats import ToolFormat


class ChatMessage:
    """One reply to a chat as it is written.

    Of what it gives, a `Begin` has an id, and the `Arguments` behind it are its own; a span is content
    or reasoning and is not empty.
    """

    def __init__(self, tools: ToolFormat | None = None):
        self._tools = tools
        self._blank = ""  # white space that is content only if more than a call follows
        self._call: list[str] | None = None
        self._has_calls = False
        self._has_content = False

    async def take(self, piece: Piece) -> list[Part]:
        """What `piece` adds."""
        said: list[Part] = []
        for part in piece.parts:
            if isinstance(part, tuple) and part[0] == TOOL:
                self._call = [*(self._call or ()), part[1]]
                continue
            await self._close_call(said, is_whole=True)
            if isinstance(part, Begin):
                self._begin(said, part)
            elif isinstance(part, Arguments):
                said.append(part)
            elif part[0] == REASONING:
                _add(said, REASONING, part[1])
            elif part[0] == NORMAL:
                self._write(said, part[1])
        if piece.finish is not None:
            await self._close_call(said, is_whole=False)
            if not self._has_calls:
                _add(said, NORMAL, self._blank)
        return said

    def finish_reason(self, piece: Piece) -> str | None:
        """Why it ended: `tool_calls`, or the piece's own reason."""
        return "tool_calls" if piece.finish == "stop" and self._has_calls else piece.finish

    def _begin(self, said: list[Part], call: Begin) -> None:
        said.append(call if call.id else replace(call, id=f"call_{secrets.token_hex(12)}"))
        self._has_calls = True

    def _write(self, said: list[Part], text: str) -> None:
        self._blank += text
        if self._has_content or self._blank.strip():
            self._has_content = True
            _add(said, NORMAL, self._blank)
            self._blank = ""

    async def _close_call(self, said: list[Part], *, is_whole: bool) -> None:
        if self._call is None:
            return
        text, self._call = "".join(self._call), None
        assert self._tools is not None, "only its calls come as they were written"
        calls = await self._tools.others(text)
        if calls is None:  # nothing that a model wrote may vanish
            self._write(said, f"{self._tools.start}{text}{self._tools.end * is_whole}")
            return
        for call in calls:
            self._begin(said, Begin(call["name"], call["id"]))
            said.append(Arguments(call["arguments"]))


def _add(said: list[Part], state: str, text: str) -> None:
    if text:
        said.append((state, text))
