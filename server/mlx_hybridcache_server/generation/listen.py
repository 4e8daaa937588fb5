"""From responses to pieces, on the worker thread: stop texts, states, log-probabilities.

Here and not on the event loop, because a reply must end, and be stored, exactly where its stop text
says, and because log-probabilities are MLX arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from mlx_lm.generate import GenerationResponse

from mlx_hybridcache.worker.turns import PAUSE, Pause

from ..adapter import NORMAL
from ..calls.parts import Part, Parts
from .pieces import Piece, PromptProgress, TokenLogprob
from .stop_text import StopText


@dataclass(eq=False)
class Listener:
    """One reply's view of its responses. `split` makes what splits it into parts, if it has any.

    `top_logprobs` is None when no log-probabilities are wanted. A token of `ends` ends the reply and
    is not part of it. `bytes_of` is given for a text that goes on where its prompt ends: mlx-lm's
    detokenizers drop the space before a first word.
    """

    stops: Sequence[str]
    split: Callable[[], Parts] | None
    top_logprobs: int | None
    bytes_of: Callable[[int], bytes] | None = None
    ends: frozenset[int] = frozenset()
    progress: PromptProgress | None = None
    _restored: int | None = field(default=None, init=False)

    def on_progress(self, read: int, total: int) -> None:
        """The library's progress callback; what it says goes out at the next pause.

        A hot prompt whose rest is read in one slice says nothing: its reply is next.
        """
        is_next = bool(self._restored) and read >= total - 1
        self.progress = None if is_next else PromptProgress(read, total)
        # Behind the first slice there is something to tell, and from then on all of it is told.
        self._restored = read if self._restored is None else 0

    def listen(
        self, responses: Iterator[GenerationResponse | Pause]
    ) -> Iterator[Piece | PromptProgress | Pause]:
        """The pieces, with progress between the slices of the prompt."""
        stop, parts = StopText(self.stops), self.split() if self.split is not None else None
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
            finish = "stop" if is_end else response.finish_reason
            was_reasoning = parts is not None and parts.is_reasoning
            said = list(_until(stop, parts.feed(written) if parts else [(NORMAL, written)]))
            if stop.found or (parts is not None and parts.is_done):
                finish = "stop"
            elif finish is not None:
                said += _ending(stop, parts, is_whole=finish == "stop")
                finish = "stop" if stop.found else finish
            yield Piece(
                token=response.token,
                parts=tuple(said),
                is_reasoning=parts is not None and (was_reasoning or parts.is_reasoning),
                logprob=self._logprob(response),
                finish=finish,
                stop=stop.found,
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


def _until(stop: StopText, parts: list[Part]) -> Iterator[Part]:
    """The parts before a stop text. It belongs to the content: reasoning and calls are not cut."""
    for part in parts:
        if isinstance(part, tuple) and part[0] == NORMAL:
            yield (NORMAL, stop.feed(part[1]))
            if stop.found:
                return
        else:
            yield (NORMAL, stop.interrupted())
            yield part


def _ending(stop: StopText, parts: Parts | None, *, is_whole: bool) -> list[Part]:
    """What was held back at the end of a reply."""
    said = list(_until(stop, parts.end(is_whole=is_whole))) if parts is not None else []
    if not stop.found:
        said.append((NORMAL, stop.end()))
    return said
