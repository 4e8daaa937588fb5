"""A reply as mlx-lm tells it: one response for each token that the decoder gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, Protocol, TypeVar

import mlx.core as mx
from mlx_lm.generate import GenerationResponse

from ..worker.turns import Pause
from .decoder import Decoder
from .reply import Reply

T = TypeVar("T")


class Room(Protocol):
    """Waits for room that there is soon."""

    def __call__(self, does: Callable[[], T], /) -> Generator[Pause, None, T]:
        """What `does` gives, which may be done several times: a `BudgetError` of its leaves nothing changed."""
        ...


def respond(
    decoder: Decoder,
    reply: Reply,
    tokenizer: Any,
    *,
    prompt_tokens: int,
    prefill_seconds: float,
    revive: Callable[[], Iterator[Pause]],
    room: Room,
    best_effort: bool = False,
) -> Iterator[GenerationResponse | Pause]:
    """A reply as mlx-lm's `stream_generate` gives it, to its end. `revive` helps it out of a failed batch.

    With `best_effort` it ends, with `length`, where there is no `room` for another token, nor soon. When the k-th
    response is yielded, its caches stand k tokens behind the prompt, or further by what a batch made ahead.
    """
    detokenizer, began, count, finish = tokenizer.detokenizer, time.perf_counter(), 0, None
    while finish is None:
        while (taken := (yield from room(partial(decoder.take, reply)))) is None:
            yield from revive()
        token, logprobs, from_draft = taken
        count += 1
        if token not in reply.ends:
            detokenizer.add_token(token)
        finish = yield from room(partial(_finish, decoder, reply, token, best_effort))
        if finish is not None:
            detokenizer.finalize()
        yield GenerationResponse(
            text=detokenizer.last_segment,
            token=token,
            logprobs=logprobs,
            from_draft=from_draft,
            prompt_tokens=prompt_tokens,
            prompt_tps=prompt_tokens / max(prefill_seconds, 1e-9),
            generation_tokens=count,
            generation_tps=count / max(time.perf_counter() - began, 1e-9),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish,
        )


def _finish(decoder: Decoder, reply: Reply, token: int, best_effort: bool) -> str | None:
    """Why the reply ends with `token`, as mlx-lm says it; None where it goes on."""
    if token in reply.ends:
        return "stop"
    is_last = reply.left == len(reply.made) == 0
    return "length" if is_last or (best_effort and not decoder.makes_room(reply)) else None
