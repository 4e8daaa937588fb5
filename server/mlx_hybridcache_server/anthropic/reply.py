"""A message on its way to the client, as one object or as a stream of events."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ..errors import ApiError
from ..generation.pieces import Piece, PromptProgress
from ..generation.serving import RunningReply
from ..http.event_stream import StreamFormat
from ..http.keepalive import progress_comment
from ..http.wire import named_event
from ..log import CLIENTS
from ..replies.message import ChatMessage
from .content import Content, Event

log = logging.getLogger(CLIENTS)

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def new_id() -> str:
    """A fresh message's, in Anthropic's form."""
    return f"msg_{secrets.token_hex(12)}"


def failure(error: ApiError) -> bytes:
    """The last event of a stream that ends too early."""
    return named_event(error.body(as_anthropic=True))


PING = named_event({"type": "ping"})
STREAM = StreamFormat(keepalive=PING, failure=failure)


@dataclass(slots=True)
class MessagesReply:
    """One message of `model`'s."""

    model: str
    run: RunningReply
    message: ChatMessage
    content: Content = field(default_factory=Content)
    stop_reason: str | None = None
    stop_sequence: str | None = None
    has_begun: bool = False

    async def whole(self) -> dict[str, Any]:
        """The message, once it has ended."""
        async for _ in self._events():
            pass
        body = self._message(self.content.whole()) | {"timings": self.run.timings()}
        log.debug("Reply: %s", body)
        return body

    def keepalive(self) -> bytes:
        return PING

    def failure(self, error: ApiError) -> bytes:
        return failure(error)

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The events. The first says what was restored, so it comes when the prompt is read."""
        async with aclosing(self._events()) as events:
            async for each in events:
                if isinstance(each, PromptProgress):
                    yield progress_comment(each.read, each.total)
                else:
                    yield named_event(each)

    async def _events(self) -> AsyncGenerator[Event | PromptProgress]:
        async with aclosing(self.run.pieces()) as pieces:
            async for item in pieces:
                if isinstance(item, PromptProgress):
                    yield item
                    continue
                for each in self._begin():
                    yield each
                for part in await self.message.take(item):
                    for each in self.content.add(part):
                        yield each
                if item.finish is not None:
                    self._end(item)
        for each in (*self._begin(), *self.content.end()):
            yield each
        delta = {"stop_reason": self.stop_reason, "stop_sequence": self.stop_sequence}
        timings = self.run.timings()
        yield {"type": "message_delta", "delta": delta, "usage": self._usage(), "timings": timings}
        yield {"type": "message_stop"}

    def _begin(self) -> Iterator[Event]:
        """The first event, once. A reply may end without a piece: it was cancelled."""
        if not self.has_begun:
            self.has_begun = True
            yield {"type": "message_start", "message": self._message([])}

    def _end(self, piece: Piece) -> None:
        self.stop_sequence = piece.stop
        reason = self.message.finish_reason(piece)
        self.stop_reason = "stop_sequence" if piece.stop else STOP_REASONS[reason or "stop"]

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.run.reply_id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": self.stop_reason,
            "stop_sequence": self.stop_sequence,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        """The prompt in three parts: restored, read and stored, and read alone."""
        count, report = self.run.count, self.run.report
        fresh = count.prompt - count.cached
        stored = fresh - 1 if report is not None and report.checkpoints_taken else 0
        return {
            "input_tokens": fresh - stored,
            "cache_creation_input_tokens": stored,
            "cache_read_input_tokens": count.cached,
            "output_tokens": count.completion,
        }
