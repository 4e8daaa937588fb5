"""A reply on its way to the client: its choices, run together, as one object or as a stream."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi.sse import format_sse_event

from ..errors import ApiError
from ..generation.merge import merged
from ..generation.pieces import Count, Piece, PromptProgress
from ..generation.serving import RunningReply, Serving
from ..http.event_stream import LastChunk, StreamFormat
from ..http.keepalive import COMMENT, progress_comment
from ..http.wire import event
from ..log import CLIENTS
from .choices import Choice
from .envelope import Envelope, usage

log = logging.getLogger(CLIENTS)


def failure(error: ApiError) -> bytes:
    """What a stream ends with that ends too early."""
    return event(error.body())


STREAM = StreamFormat(
    keepalive=COMMENT,
    failure=failure,
    end=format_sse_event(data_str="[DONE]"),
)


@dataclass(frozen=True, slots=True)
class Reply:
    """The choices of one reply, grouped by prompt."""

    serving: Serving
    envelope: Envelope
    groups: Sequence[Sequence[Choice]]
    wants_usage: bool = False

    async def whole(self) -> dict[str, Any]:
        """All choices, once the last has ended."""
        by_run = self._by_run()
        async with aclosing(self._pieces()) as pieces:
            async for run, item in pieces:
                if not isinstance(item, PromptProgress):
                    await by_run[run].take(item)
        choices = [choice.whole() for choice in by_run.values()]
        body = self.envelope.around(choices, usage=self._usage(), timings=self._timings())
        log.debug("Reply: %s", body)
        return body

    def keepalive(self) -> bytes:
        """How far the first of its prompts is, for who hears of nothing else."""
        run = self.groups[0][0].run
        return progress_comment(run.read_tokens, run.count.prompt)

    def failure(self, error: ApiError) -> bytes:
        return failure(error)

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Chunks as server-sent events, and comments that tell how far the prompt is read."""
        by_run = self._by_run()
        more: dict[str, Any] = {"usage": None} if self.wants_usage else {}
        async with aclosing(self._pieces()) as pieces:
            async for run, item in pieces:
                if isinstance(item, PromptProgress):
                    yield progress_comment(item.read, item.total)
                    continue
                chunk = await by_run[run].take(item)
                if chunk is None:
                    continue
                is_last = item.finish is not None and not self.wants_usage
                timings = {"timings": run.timings()} if is_last else {}
                yield event(self.envelope.around([chunk], **more, **timings))
        if self.wants_usage:
            told = self.envelope.around([], usage=self._usage(), timings=self._timings())
            yield LastChunk(event(told))

    def _pieces(self) -> AsyncGenerator[tuple[RunningReply, Piece | PromptProgress]]:
        return merged([choice.run for group in self.groups for choice in group])

    def _by_run(self) -> dict[RunningReply, Choice]:
        return {choice.run: choice for group in self.groups for choice in group}

    def _usage(self) -> dict[str, Any]:
        return usage(
            # A prompt was read, or restored, once: by the first of its choices.
            choice.run.count
            if choice is group[0]
            else Count(completion=choice.run.count.completion, reasoning=choice.run.count.reasoning)
            for group in self.groups
            for choice in group
        )

    def _timings(self) -> dict[str, float]:
        each = [choice.run.timings() for group in self.groups for choice in group]
        return {name: round(sum(one[name] for one in each), 3) for name in each[0]}
