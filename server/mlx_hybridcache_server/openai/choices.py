"""One choice of a reply, in chunks and as a whole."""

from __future__ import annotations

from typing import Any, Protocol

from ..generation.pieces import Piece, TokenLogprob
from ..generation.serving import RunningReply
from ..replies.message import ChatMessage
from .delta import Delta
from .logprobs import TokenNames


class Choice(Protocol):
    """What a kind of reply makes of a run's pieces."""

    run: RunningReply

    async def take(self, piece: Piece) -> dict[str, Any] | None:
        """The chunk that `piece` completes, if any."""
        ...

    def whole(self) -> dict[str, Any]:
        """All that was taken."""
        ...


class ChatChoice:
    """A choice of `/v1/chat/completions`."""

    def __init__(self, index: int, run: RunningReply, message: ChatMessage, names: TokenNames):
        self.run = run
        self._index = index
        self._message = message
        self._names = names
        self._said = Delta()
        self._entries: list[dict[str, Any]] = []
        self._sent_entries = 0
        self._sent_role = False
        self._finish: str | None = None

    async def take(self, piece: Piece) -> dict[str, Any] | None:
        delta = Delta.of(await self._message.take(piece), len(self._said.tool_calls))
        self._said.add(delta)
        if piece.logprob is not None:
            self._entries.append(self._names.entry(piece.logprob))
        if piece.finish is not None:
            self._finish = self._message.finish_reason(piece)
        if not delta and self._finish is None:
            return None
        fresh, self._sent_entries = self._entries[self._sent_entries :], len(self._entries)
        role = {} if self._sent_role else {"role": "assistant"}
        self._sent_role = True
        return {
            "index": self._index,
            "delta": {**role, **delta.fields()},
            "logprobs": {"content": fresh} if fresh else None,
            "finish_reason": self._finish,
        }

    def whole(self) -> dict[str, Any]:
        # OpenAI's clients take null for a reply that only calls.
        content = None if self._said.tool_calls else ""
        message = {"role": "assistant", "content": content, **self._said.fields()}
        if calls := message.get("tool_calls"):  # only a stream needs to number them
            message["tool_calls"] = [
                {key: value for key, value in call.items() if key != "index"} for call in calls
            ]
        return {
            "index": self._index,
            "message": message,
            "logprobs": {"content": self._entries} if self._entries else None,
            "finish_reason": self._finish,
        }


class TextChoice:
    """A choice of `/v1/completions`. `echo` is the prompt when it is to be repeated."""

    def __init__(self, index: int, run: RunningReply, names: TokenNames, echo: str):
        self.run = run
        self._index = index
        self._names = names
        self._text = self._pending = echo
        self._logprobs: list[TokenLogprob] = []
        self._sent_logprobs = 0
        self._offset = 0
        self._finish: str | None = None

    async def take(self, piece: Piece) -> dict[str, Any] | None:
        said = "".join(part[1] for part in piece.parts if isinstance(part, tuple))
        self._text += said
        self._pending += said
        if piece.logprob is not None:
            self._logprobs.append(piece.logprob)
        self._finish = piece.finish
        if not self._pending and self._finish is None:
            return None
        text, self._pending = self._pending, ""
        fresh, self._sent_logprobs = self._logprobs[self._sent_logprobs :], len(self._logprobs)
        choice = self._choice(text, fresh, self._offset)
        self._offset += sum(len(self._names.text(each.token)) for each in fresh)
        return choice

    def whole(self) -> dict[str, Any]:
        return self._choice(self._text, self._logprobs, 0)

    def _choice(self, text: str, logprobs: list[TokenLogprob], start: int) -> dict[str, Any]:
        with_top = bool(self.run.request.top_logprobs)
        return {
            "index": self._index,
            "text": text,
            "logprobs": self._names.legacy(logprobs, start, with_top=with_top)
            if logprobs
            else None,
            "finish_reason": self._finish,
        }
