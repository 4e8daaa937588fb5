"""A response on its way to the client, as one object or as a stream of numbered events."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ..errors import ApiError
from ..generation.pieces import Piece, PromptProgress
from ..generation.serving import RunningReply
from ..http.event_stream import StreamFormat
from ..http.keepalive import COMMENT, progress_comment
from ..http.wire import named_event
from ..log import CLIENTS
from ..replies.message import ChatMessage
from ..schema.responses import ResponsesBody
from .conversation import NAME
from .output import Event, Output

log = logging.getLogger(CLIENTS)

Response = dict[str, Any]

ENDS = {"stop": "completed", "tool_calls": "completed", "length": "incomplete"}
"""A response's status by why its reply ended. One that was cancelled did not end."""


CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
"""A failed response's code by its status: clients know a few of them only."""


def new_id() -> str:
    """A fresh response's, in OpenAI's form."""
    return f"resp_{secrets.token_hex(12)}"


def failure(error: ApiError) -> bytes:
    """What a stream ends with that never began."""
    said = error.body()["error"]
    return named_event(
        {
            "type": "error",
            "sequence_number": 0,
            **{k: said[k] for k in ("code", "message", "param")},
        }
    )


STREAM = StreamFormat(keepalive=COMMENT, failure=failure)


@dataclass(slots=True)
class ResponsesReply:
    """One response of `model`'s to `body`. `keep` is called with it when it has ended."""

    body: ResponsesBody
    model: str
    run: RunningReply
    message: ChatMessage
    output: Output
    keep: Callable[[Response], Awaitable[None]]
    created: float = field(default_factory=time.time)
    status: str = "in_progress"
    error: dict[str, Any] | None = None
    number: int = 0

    async def whole(self) -> Response:
        """The response, once it has ended."""
        async for _ in self._events():
            pass
        response = self._response()
        log.debug("Reply: %s", response)
        return response

    def keepalive(self) -> bytes:
        return progress_comment(self.run.read_tokens, self.run.count.prompt)

    def failure(self, error: ApiError) -> bytes:
        """The last event of a stream that ends too early: the response with the reason."""
        ended = [self._numbered(each) for each in self.output.end("incomplete")]
        self.status = "failed"
        code = CODES.get(error.status_code, "server_error")
        self.error = {"code": code, "message": error.detail}
        failed = self._numbered({"type": "response.failed", "response": self._response()})
        return b"".join((*ended, failed))

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The events, and comments that tell how far the prompt is read."""
        async with aclosing(self._events()) as events:
            async for each in events:
                if isinstance(each, PromptProgress):
                    yield progress_comment(each.read, each.total)
                else:
                    yield self._numbered(each)

    def _numbered(self, body: Event) -> bytes:
        sent = named_event({**body, "sequence_number": self.number})
        self.number += 1
        return sent

    async def _events(self) -> AsyncGenerator[Event | PromptProgress]:
        for kind in ("created", "in_progress"):
            yield {"type": f"response.{kind}", "response": self._response()}
        status = "cancelled"
        async with aclosing(self.run.pieces()) as pieces:
            async for item in pieces:
                if isinstance(item, PromptProgress):
                    yield item
                    continue
                for part in await self.message.take(item):
                    for each in self.output.add(part):
                        yield each
                status = self._status(item) or status
        for each in self.output.end("completed" if status == "completed" else "incomplete"):
            yield each
        self.status = status
        response = self._response()
        await self.keep(response)
        kind = "incomplete" if status == "cancelled" else status
        yield {"type": f"response.{kind}", "response": response}

    def _status(self, piece: Piece) -> str | None:
        return ENDS[self.message.finish_reason(piece) or "stop"] if piece.finish else None

    def _response(self) -> Response:
        body = self.body
        is_short = self.status == "incomplete"
        is_over = self.status not in ("in_progress", "failed")
        return {
            "id": self.run.reply_id,
            "object": "response",
            "created_at": self.created,
            "completed_at": time.time() if self.status == "completed" else None,
            "status": self.status,
            "background": False,
            "error": self.error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_short else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": [*self.output.items],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "store": body.store is not False,
            "temperature": body.temperature,
            "text": self._text(),
            "tool_choice": _dumped(body.tool_choice) or "auto",
            "tools": [*map(_declared, body.tools or ())],
            "top_p": body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": self._usage() if is_over else None,
            **({"timings": self.run.timings()} if is_over else {}),
        }

    def _text(self) -> dict[str, Any]:
        form = self.body.text and self.body.text.format
        if not form:
            return {"format": {"type": "text"}}
        named = {"name": NAME} if form.type == "json_schema" else {}
        return {"format": named | _dumped(form)}

    def _usage(self) -> dict[str, Any]:
        count = self.run.count
        return {
            "input_tokens": count.prompt,
            "input_tokens_details": {"cached_tokens": count.cached, "cache_write_tokens": 0},
            "output_tokens": count.completion,
            "output_tokens_details": {"reasoning_tokens": count.reasoning},
            "total_tokens": count.prompt + count.completion,
        }


def _declared(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with all fields that clients look for."""
    if tool["type"] != "function":
        return tool
    return {"parameters": None, "strict": None, **tool}


def _dumped(value: Any) -> Any:
    """A part of a request as the client wrote it."""
    is_plain = value is None or isinstance(value, str)
    return value if is_plain else value.model_dump(by_alias=True, exclude_none=True)
