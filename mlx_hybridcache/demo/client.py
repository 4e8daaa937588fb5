"""One call of the demo through OpenAI's own client: the reply, its clock, and what was re-used."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import openai

from ..errors import HybridCacheError
from .workloads import Call

REPLY_TOKENS = 12
TOP_LOGPROBS = 5
MODEL = "default_model"
"""The server's name for whatever it serves."""

Step = tuple[tuple[str, float], ...]
"""The token that was written and its log-probability, then the likeliest in its place."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a stream carried, with its usage and the seconds to the first token of any kind."""

    text: str
    reasoning: str
    finish_reason: str | None
    steps: tuple[Step, ...]
    prompt_tokens: int
    cached_tokens: int
    first_token_seconds: float

    def difference(self, other: Reply) -> float:
        """0.0 when every bit agrees, else the largest difference of a log-probability.

        Infinite when what was written differs, or only what might have been written in its place.
        """
        if self._said() != other._said():
            return float("inf")
        if self.steps == other.steps:
            return 0.0
        numbers = (
            (a, b)
            for mine, theirs in zip(self.steps, other.steps, strict=True)
            for (_, a), (_, b) in zip(mine, theirs, strict=False)
        )
        return max(abs(a - b) for a, b in numbers) or float("inf")

    def _said(self) -> tuple[Any, ...]:
        tokens = [step[0][0] for step in self.steps]
        return self.text, self.reasoning, self.finish_reason, tokens


class Client:
    """Greedy streams from the server at `url`."""

    def __init__(self, url: str) -> None:
        self._openai = openai.OpenAI(
            base_url=f"{url}/v1",
            # The server reads the same variable, and asks for this key if it is set.
            api_key=os.environ.get("MLX_HYBRIDCACHE_API_KEY") or "none",
            max_retries=0,  # a second try would be served from what the first one left
            http_client=openai.DefaultHttpxClient(trust_env=False),  # no proxy on this machine
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._openai.close()

    def ask(self, call: Call, *, through_cache: bool) -> Reply:
        """Stream a call's reply to its end. Raises `HybridCacheError` if the server fails."""
        try:
            return self._read(call, {} if through_cache else {"cache_prompt": False})
        except openai.APIError as error:
            raise HybridCacheError(f"{call.name}: the server failed: {error.message}") from error

    def last_report(self) -> dict[str, Any]:
        """What the cache did for the last request."""
        recent: Any = self._openai.get("/cache/recent", cast_to=object)
        report: dict[str, Any] = recent["data"][0]
        return report

    def _read(self, call: Call, fields: dict[str, Any]) -> Reply:
        text, reasoning, finish_reason = "", "", None
        steps: list[Step] = []
        usage: dict[str, Any] = {}
        first = None
        began = time.perf_counter()
        for chunk in self._chunks(call, fields):
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                said = choice.get("delta") or {"content": choice.get("text")}
                text += said.get("content") or ""
                reasoning += said.get("reasoning") or ""
                finish_reason = choice.get("finish_reason")
                if first is None and (text or reasoning or finish_reason):
                    first = time.perf_counter() - began
                steps += _steps(choice.get("logprobs") or {})
        if first is None or not steps:
            raise HybridCacheError(f"{call.name}: the stream held no reply.")
        return Reply(
            text,
            reasoning,
            finish_reason,
            tuple(steps),
            usage["prompt_tokens"],
            usage["prompt_tokens_details"]["cached_tokens"],
            first,
        )

    def _chunks(self, call: Call, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The stream as JSON. Chats and raw text differ in where they go, and in their shapes."""
        common: dict[str, Any] = {
            "model": MODEL,
            "max_tokens": REPLY_TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "extra_body": fields,
        }
        if isinstance(call.prompt, str):
            stream = self._openai.completions.create(
                prompt=call.prompt, logprobs=TOP_LOGPROBS, **common
            )
        else:
            messages: Any = call.prompt
            stream = self._openai.chat.completions.create(
                messages=messages, logprobs=True, top_logprobs=TOP_LOGPROBS, **common
            )
        with stream:
            for chunk in stream:
                yield chunk.to_dict(warnings=False)  # fields that OpenAI does not know are kept


def _steps(logprobs: dict[str, Any]) -> Iterator[Step]:
    """A chat's log-probabilities, or the older shape of `/v1/completions`."""
    for entry in logprobs.get("content") or ():
        top = ((one["token"], one["logprob"]) for one in entry["top_logprobs"])
        yield ((entry["token"], entry["logprob"]), *top)
    names = ("tokens", "token_logprobs", "top_logprobs")
    for token, logprob, top in zip(*(logprobs.get(name, ()) for name in names), strict=True):
        yield ((token, logprob), *top.items())
