"""From responses to pieces, on the worker thread: stop texts, states, log-probabilities.

Here and not on the event loop, because a reply must end, and be stored, exactly where its stop text
says, and because log-probabilities are MLX arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np
from mlx_lm.generate import GenerationResponse

from mlx_hybridcache.worker import PAUSE, Pause

from .adapter import REASONING, TOOL, Segmenter, Span


@dataclass(frozen=True, slots=True)
class Progress:
    """So many of the prompt's tokens are read."""

    read: int
    total: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log-probability and the most likely ones in its place, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token brought. `finish` is None until the last."""

    token: int
    spans: tuple[Span, ...]
    is_reasoning: bool
    logprob: TokenLogprob | None
    finish: str | None


class StopText:
    """Finds the first of several texts in a stream, however it is cut into chunks."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that is safe to give out; with `found`, all there is before the stop."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:  # the one that is complete first; so chunks do not matter
            self.found, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back and is text after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(eq=False)
class Listener:
    """One reply's view of its responses. `segmenter` makes one in the reply's first state.

    `top_logprobs` is None when no log-probabilities are wanted. `one_tool_call` ends the reply
    behind the first, and so does a token of `ends`, which is not part of it. `bytes_of` is given for a text that goes on where its prompt ends: mlx-lm's
    detokenizers drop the space before a first word.
    """

    stops: Sequence[str]
    segmenter: Callable[[], Segmenter] | None
    top_logprobs: int | None
    one_tool_call: bool
    bytes_of: Callable[[int], bytes] | None = None
    ends: frozenset[int] = frozenset()
    progress: Progress | None = None

    def on_progress(self, read: int, total: int) -> None:
        """The library's progress callback; what it says goes out at the next pause."""
        self.progress = Progress(read, total)

    def listen(
        self, responses: Iterator[GenerationResponse | Pause]
    ) -> Iterator[Piece | Progress | Pause]:
        """The pieces, with progress between the slices of the prompt."""
        stop = StopText(self.stops)
        spans, states = _Spans(self.segmenter), _Spans(self.segmenter)
        space = None
        for response in responses:
            if isinstance(response, Pause):
                yield self.progress or PAUSE
                continue
            is_end = response.token in self.ends
            written = "" if is_end else response.text
            if space is None:
                space = self._lost_space(response)
            if space and written:
                written, space = " " + written, ""
            text = stop.feed(written)
            finish = "stop" if is_end else response.finish_reason
            if stop.found:
                finish = "stop"
            elif finish is not None:
                text += stop.end()
            was = states.state
            states.feed(written)  # not held back by stop texts, so true for this very token
            said = spans.feed(text)
            if self.one_tool_call and _closes_tool(said):
                finish = finish or "stop"
            if finish is not None:
                said += spans.end()
            yield Piece(
                token=response.token,
                spans=tuple(said),
                is_reasoning=REASONING in (was, states.state),
                logprob=self._logprob(response),
                finish=finish,
            )
            if finish is not None:
                return

    def _lost_space(self, first: GenerationResponse) -> str:
        if self.bytes_of is None or first.text.startswith(" "):
            return ""
        return " " if self.bytes_of(first.token).startswith(b" ") else ""

    def _logprob(self, response: GenerationResponse) -> TokenLogprob | None:
        if self.top_logprobs is None:
            return None
        if self.top_logprobs == 0:
            own = response.logprobs[response.token].astype(mx.float32)
            return TokenLogprob(response.token, float(np.array(own)), ())
        row = np.array(response.logprobs.astype(mx.float32))
        count = min(self.top_logprobs, len(row))
        likeliest = np.argpartition(-row, count - 1)[:count]
        order = np.lexsort((likeliest, -row[likeliest]))
        top = tuple((int(token), float(row[token])) for token in likeliest[order])
        return TokenLogprob(response.token, float(row[response.token]), top)


class _Spans:
    """A segmenter, or plain text where the reply is not a chat's."""

    def __init__(self, make: Callable[[], Segmenter] | None):
        self._segmenter = make() if make is not None else None

    @property
    def state(self) -> str:
        return self._segmenter.state if self._segmenter is not None else "normal"

    def feed(self, text: str) -> list[Span]:
        return self._segmenter.feed(text) if self._segmenter is not None else [("normal", text)]

    def end(self) -> list[Span]:
        return self._segmenter.end() if self._segmenter is not None else []


def _closes_tool(spans: Sequence[Span]) -> bool:
    """Whether a tool call ends among `spans`: a tool's text is followed by another state."""
    states = [state for state, _ in spans]
    return any(a == TOOL and b != TOOL for a, b in pairwise(states))
