"""From pieces to OpenAI's shapes: deltas, messages, log-probabilities, usage."""

from __future__ import annotations

import math
import platform
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import accumulate
from typing import Any

from ..adapter import NORMAL, REASONING, TOOL
from ..calls.formats import ToolFormat
from ..calls.incoming import Arguments, Begin
from ..generation.listen import Piece, TokenLogprob

LEAST = -9999.0
"""OpenAI's number for a token that cannot come; JSON has no infinity."""

FINGERPRINT = "-".join(
    (
        f"mlx_hybridcache_{version('mlx-hybridcache')}",
        f"mlx_lm_{version('mlx-lm')}",
        f"mlx_{version('mlx')}",
        platform.system(),
        platform.machine(),
    )
)


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


class TokenNames:
    """Log-probabilities in OpenAI's shapes, with mlx_lm.server's `id` beside them."""

    def __init__(self, bytes_of: Callable[[int], bytes]):
        self.bytes_of = bytes_of

    def entry(self, found: TokenLogprob) -> dict[str, Any]:
        """An entry of `logprobs.content`."""
        top = [self._named(token, logprob) for token, logprob in found.top]
        return {**self._named(found.token, found.logprob), "top_logprobs": top}

    def legacy(self, found: list[TokenLogprob], start: int, *, with_top: bool) -> dict[str, Any]:
        """The shape of `/v1/completions`; `start` is the text offset of the first token."""
        names = [self.text(each.token) for each in found]
        lengths = accumulate(map(len, names), initial=start)
        top = [{self.text(t): _finite(p) for t, p in reversed(each.top)} for each in found]
        return {
            "tokens": names,
            "token_logprobs": [_finite(each.logprob) for each in found],
            "top_logprobs": top if with_top else None,
            "text_offset": list(lengths)[:-1],
        }

    def text(self, token: int) -> str:
        """A token as text, `�` where it is part of a character."""
        return self.bytes_of(token).decode("utf-8", "replace")

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.bytes_of(token)
        return {
            "token": raw.decode("utf-8", "replace"),
            "logprob": _finite(logprob),
            "bytes": list(raw),
            "id": token,
        }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST


@dataclass(slots=True)
class Count:
    """Tokens of one choice."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0


def usage(counts: Iterable[Count]) -> dict[str, Any]:
    """OpenAI's usage. A prompt with several choices must be counted in one of them only."""
    total = Count()
    for count in counts:
        total.prompt += count.prompt
        total.cached += count.cached
        total.completion += count.completion
        total.reasoning += count.reasoning
    return {
        "prompt_tokens": total.prompt,
        "completion_tokens": total.completion,
        "total_tokens": total.prompt + total.completion,
        "prompt_tokens_details": {"cached_tokens": total.cached},
        "completion_tokens_details": {"reasoning_tokens": total.reasoning},
    }


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every object of one reply has in common."""

    id: str
    object: str
    model: str
    created: int

    @classmethod
    def new(cls, prefix: str, kind: str, model: str) -> Envelope:
        """A fresh one, named as OpenAI names them: chatcmpl-..., cmpl-..."""
        return cls(f"{prefix}-{secrets.token_hex(12)}", kind, model, int(time.time()))

    def around(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The whole object."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            **more,
        }
