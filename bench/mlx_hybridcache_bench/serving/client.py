"""One measured request: a streaming POST, its clock, and what the server says that it re-used."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx2

from .events import DONE, NO_JSON, events, quiet

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

NO_USAGE = "does not say how many tokens a prompt has"
NO_CACHED = "does not say how many tokens came from its cache"
NO_STREAM = "answers in one piece instead of a stream: TTFT is the time of the whole reply"
NO_DONE = "ends its streams without [DONE]"

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. Seconds since the request was sent; token counts as the server tells them.

    Counts come from the reply's `usage`, else from llama.cpp's `timings`, else they are None.
    `first_seconds` is the time to the first token of any kind: content, reasoning or a tool call.
    Comments and deltas without text do not count. `first_cpu_seconds` is the processor time that
    the server spent on it, where it is known. `notes` say what is odd about the reply.
    """

    first_seconds: float
    last_seconds: float
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    finish_reason: str | None
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    first_cpu_seconds: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def read_tokens(self) -> int | None:
        """Tokens of the prompt that the server had to read."""
        if self.prompt_tokens is None or self.cached_tokens is None:
            return None
        return self.prompt_tokens - self.cached_tokens

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

    def repeats(self, other: Reply) -> bool:
        """Whether one server wrote the very same twice, but for the ids of calls."""
        return (self.content, self.reasoning, self.finish_reason, self._calls()) == (
            *(other.content, other.reasoning, other.finish_reason, other._calls()),
        )

    def same_as(self, other: Reply) -> bool:
        """Whether two servers wrote the same, but for white space at the ends and ids of calls.

        Of a reply that `max_tokens` cuts within a tool call, one server may show what there is of
        the call, as a call or as text, and the other nothing; so either may go on.
        """
        is_cut = self.finish_reason == other.finish_reason == "length"
        return (
            self.completion_tokens == other.completion_tokens
            and self.reasoning.strip() == other.reasoning.strip()
            and (self._calls() == other._calls() or (is_cut and self._cut_as(other)))
            and (
                self.content.strip() == other.content.strip()
                or (is_cut and _one_goes_on(self.content.strip(), other.content.strip()))
            )
        )

    def _cut_as(self, other: Reply) -> bool:
        """Whether the calls are the same but for one at the end, which is not whole."""
        fewer, more = sorted((self._calls(), other._calls()), key=len)
        return len(more) == len(fewer) + 1 and more[:-1] == fewer

    def _calls(self) -> list[Any]:
        return [call["function"] for call in self.tool_calls]


def _one_goes_on(ours: str, theirs: str) -> bool:
    return ours.startswith(theirs) or theirs.startswith(ours)


class RequestFailed(Exception):  # noqa: N818  # a fact of the run, reported in its table
    """The server refused the request, failed while answering, or dropped the connection.

    `status` is the refusal's, if it was one; `hung` says that nothing came for too long.
    """

    def __init__(self, sentence: str, *, status: int | None = None, hung: bool = False) -> None:
        super().__init__(sentence)
        self.status = status
        self.hung = hung


class Client:
    """Requests to one server, over one kept connection where the server keeps it.

    No request lasts longer than about `timeout_seconds`, whatever comments the server sends.
    `cpu_clock` reads the processor time of the server's process. `fields` are part of every
    request, such as `model`, and None leaves one out; `api_key` is sent as bearer token.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 600.0,
        cpu_clock: Callable[[], float | None] = lambda: None,
        fields: Mapping[str, Any] | None = None,
        api_key: str | None = None,
    ) -> None:
        self._cpu_clock = cpu_clock
        self._timeout_seconds = timeout_seconds
        usual = {"temperature": 0.0, "stream_options": {"include_usage": True}}
        self._fields = {
            name: value for name, value in (usual | dict(fields or {})).items() if value is not None
        }
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx2.Client(
            base_url=url, timeout=timeout_seconds, trust_env=False, headers=headers
        )

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

    def ask(
        self, path: str, body: dict[str, Any], on_comment: Callable[[], object] = quiet
    ) -> Reply:
        """POST `body` as a greedy stream and read it to its end. Raises `RequestFailed`.

        `on_comment` is called for each comment in the stream, by which servers tell of progress.
        """
        content = json.dumps({**self._fields, **body, "stream": True}).encode()
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        collected = _Collected(self._cpu_clock, self._cpu_clock(), time.perf_counter())
        until = collected.sent + self._timeout_seconds
        try:
            with self._http.stream("POST", path, content=content, headers=headers) as response:
                if response.status_code != 200:
                    said = response.read().decode("utf-8", "replace")
                    raise RequestFailed(
                        f"status {response.status_code}: {said[:300]}", status=response.status_code
                    )
                if "json" in response.headers.get("Content-Type", ""):
                    return collected.whole(response.read())
                for data in events(response.iter_bytes(), on_comment):
                    if time.perf_counter() > until:
                        raise RequestFailed(self._too_slow(), hung=True)
                    if data is None or collected.add(data):
                        continue
                    break
                return collected.reply()
        except httpx2.TimeoutException as error:
            raise RequestFailed(self._too_slow(), hung=True) from error
        except httpx2.HTTPError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error

    def _too_slow(self) -> str:
        return f"no whole reply within {self._timeout_seconds:g} s"


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
    timings: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    done: bool = False

    def add(self, data: str) -> bool:
        """Take one event; False when it was the last. Raises `RequestFailed` for an error."""
        if data.strip() == DONE:
            self.done = True
            return False
        try:
            chunk = json.loads(data)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            self.notes[NO_JSON] = None
            return True
        if chunk.get("error"):
            raise RequestFailed(f"the stream says: {chunk['error']}")
        self.usage = chunk.get("usage") or self.usage
        self.timings = chunk.get("timings") or self.timings
        for choice in chunk.get("choices") or []:
            self._add_choice(choice, choice.get("delta") or choice.get("message") or {})
        return True

    def whole(self, body: bytes) -> Reply:
        """A reply that came in one piece. Raises `RequestFailed`."""
        self.notes[NO_STREAM] = None
        self.add(body.decode("utf-8", "replace"))
        self.done = True
        return self.reply()

    def reply(self) -> Reply:
        """What all events together say. Raises `RequestFailed` when its end is missing."""
        if not self.done:
            if self.finish_reason is None:
                raise RequestFailed("the stream broke off before its end")
            self.notes[NO_DONE] = None
        if self.first is None:
            raise RequestFailed("the stream ended without a reply")
        prompt, cached = self._prompt_tokens()
        if prompt is None or cached is None:
            self.notes[NO_USAGE if prompt is None else NO_CACHED] = None
        return Reply(
            first_seconds=self.first,
            last_seconds=self.last,
            prompt_tokens=prompt,
            cached_tokens=cached,
            completion_tokens=self.usage.get("completion_tokens", self.timings.get("predicted_n")),
            finish_reason=self.finish_reason,
            content="".join(self.content),
            reasoning="".join(self.reasoning),
            tool_calls=tuple(self.calls[index] for index in sorted(self.calls)),
            first_cpu_seconds=self.first_cpu,
            notes=tuple(self.notes),
        )

    def _prompt_tokens(self) -> tuple[int | None, int | None]:
        """Tokens of the prompt, and how many of them were cached; llama.cpp counts the rest."""
        details = self.usage.get("prompt_tokens_details") or {}
        prompt, cached = self.usage.get("prompt_tokens"), details.get("cached_tokens")
        known, read = self.timings.get("cache_n"), self.timings.get("prompt_n")
        if cached is None:
            cached = known
        if prompt is None and known is not None and read is not None:
            prompt = known + read
        return prompt, cached

    def _add_choice(self, choice: dict[str, Any], delta: dict[str, Any]) -> None:
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
