"""One measured request: a streaming POST, its clock, and what the server says that it re-used."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx2

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
DONE = "[DONE]"

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. Seconds since the request was sent; token counts from the reply's `usage`.

    `first_seconds` is the time to the first token of any kind: content, reasoning or a tool call.
    Comments and deltas without text do not count. `first_cpu_seconds` is the processor time that
    the server spent on it, where it is known.
    """

    first_seconds: float
    last_seconds: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: str | None
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    first_cpu_seconds: float | None = None

    @property
    def read_tokens(self) -> int:
        """Tokens of the prompt that the server had to read."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def generated_per_second(self) -> float | None:
        """Tokens a second after the first one; None when the reply is too short to tell."""
        seconds = self.last_seconds - self.first_seconds
        if self.completion_tokens < 16 or seconds <= 0:
            return None
        return (self.completion_tokens - 1) / seconds

    def message(self) -> Message:
        """The assistant's turn as a client sends it back with the next request.

        Without the blank lines that stand between reasoning and content: templates write their own.
        """
        message: Message = {"role": "assistant", "content": self.content.strip()}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message

    def same_as(self, other: Reply) -> bool:
        """Whether two servers wrote the same, but for white space at the ends and ids of calls.

        Of a reply that `max_tokens` cuts within a tool call, one server may show what there is of
        the call as text and the other nothing; so the longer content may go on.
        """
        ours, theirs = self.content.strip(), other.content.strip()
        is_cut = self.finish_reason == other.finish_reason == "length"
        return (
            self.completion_tokens == other.completion_tokens
            and self.reasoning.strip() == other.reasoning.strip()
            and [call["function"] for call in self.tool_calls]
            == [call["function"] for call in other.tool_calls]
            and (
                ours == theirs or (is_cut and (ours.startswith(theirs) or theirs.startswith(ours)))
            )
        )


class RequestFailed(Exception):  # noqa: N818  # a fact of the run, reported in its table
    """The server refused the request, failed while answering, or dropped the connection."""


class Client:
    """Requests to one server, over one kept connection where the server keeps it.

    `cpu_clock` reads the processor time of the server's process.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 600.0,
        cpu_clock: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._cpu_clock = cpu_clock
        self._http = httpx2.Client(base_url=url, timeout=timeout_seconds, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back."""
        self._http.close()

    def ask(self, path: str, body: dict[str, Any]) -> Reply:
        """POST `body` as a greedy stream and read it to its end. Raises `RequestFailed`."""
        content = json.dumps(
            {
                "temperature": 0.0,
                **body,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        headers = {"Content-Type": "application/json"}
        collected = _Collected(self._cpu_clock, self._cpu_clock(), time.perf_counter())
        try:
            with self._http.sse(path, method="POST", content=content, headers=headers) as events:
                if events.response.status_code != 200:
                    said = events.response.read().decode("utf-8", "replace")
                    raise RequestFailed(f"status {events.response.status_code}: {said[:300]}")
                return collected.read(event.data for event in events)
        except httpx2.HTTPError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error


@dataclass(slots=True)
class _Collected:
    """A reply while it arrives. The clocks stand where they stood when the request was sent."""

    cpu_clock: Callable[[], float | None]
    cpu_sent: float | None
    sent: float
    first: float | None = None
    first_cpu: float | None = None
    last: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)

    def read(self, events: Iterable[str]) -> Reply:
        """The whole reply. Raises `RequestFailed` for an error, and for an end before `[DONE]`."""
        for data in events:
            if data == DONE:
                break
            chunk = json.loads(data)
            if "error" in chunk:
                raise RequestFailed(f"the stream says: {chunk['error']}")
            self._add(chunk)
        else:
            raise RequestFailed("the stream broke off before its end")
        if self.first is None:
            raise RequestFailed("the stream ended without a reply")
        details = self.usage.get("prompt_tokens_details") or {}
        return Reply(
            first_seconds=self.first,
            last_seconds=self.last,
            prompt_tokens=self.usage.get("prompt_tokens", 0),
            cached_tokens=details.get("cached_tokens", 0),
            completion_tokens=self.usage.get("completion_tokens", 0),
            finish_reason=self.finish_reason,
            content="".join(self.content),
            reasoning="".join(self.reasoning),
            tool_calls=tuple(self.calls[index] for index in sorted(self.calls)),
            first_cpu_seconds=self.first_cpu,
        )

    def _add(self, chunk: dict[str, Any]) -> None:
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices") or []:
            delta = choice.get("delta") or {}
            content = delta.get("content") or choice.get("text") or ""
            reasoning = delta.get("reasoning") or delta.get("reasoning_content") or ""
            calls = delta.get("tool_calls") or []
            # A reply may end before anything of it could be shown; then its end is its first sign.
            if content or reasoning or calls or choice.get("finish_reason"):
                self._mark()
            self.content.append(content)
            self.reasoning.append(reasoning)
            for call in calls:
                self._add_call(call)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def _mark(self) -> None:
        self.last = time.perf_counter() - self.sent
        if self.first is None:
            self.first = self.last
            cpu = self.cpu_clock()
            if cpu is not None and self.cpu_sent is not None:
                self.first_cpu = cpu - self.cpu_sent

    def _add_call(self, call: dict[str, Any]) -> None:
        """Join the pieces of a call: a new index opens one, its arguments may come in parts."""
        given = call.get("function") or {}
        index = call.get("index", len(self.calls))
        joined = self.calls.setdefault(
            index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        )
        joined["id"] = call.get("id") or joined["id"] or f"call_{index}"
        joined["function"]["name"] += given.get("name") or ""
        joined["function"]["arguments"] += given.get("arguments") or ""
