"""mlx-lm's own path, for what the cache cannot serve: only its bytes are claimed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse, stream_generate

from ..caches.room import ROW_STEP
from ..errors import BudgetError
from ..request.request import Request
from ..store.budget import Claim
from ..worker.turns import Pause
from .responses import Room
from .sampling import seeded


def respond_uncached(
    model: Any,
    tokenizer: Any,
    request: Request,
    claim: Claim,
    options: dict[str, Any],
    *,
    step: int,
    growth: Callable[[int, int], int],
    room: Room,
) -> Iterator[GenerationResponse | Pause]:
    """A reply to all of the prompt, read in slices of `step` tokens. `claim` pays for the request's rows.

    `growth` is what so many rows more weigh beside so many. `options` are mlx-lm's and a `seed`. A best-effort reply ends where `claim` cannot grow. It waits for `room` that there is soon.
    """
    began, capacity, account = time.perf_counter(), request.rows, request.account
    seed = options.pop("seed", None)
    responses = stream_generate(
        *(model, tokenizer, mx.array(request.tokens)),
        max_tokens=request.max_tokens,
        stream=mx.default_stream(mx.default_device()),  # its own would outlive this thread
        prefill_step_size=step,
        prompt_progress_callback=request.on_progress,
        **options,
    )
    with closing(responses):
        for response in seeded(responses, seed):
            if response.generation_tokens == 1:
                account.amend(prefill_seconds=time.perf_counter() - began)
            mx.eval(response.logprobs)
            is_full = len(request.tokens) + response.generation_tokens >= capacity
            if is_full and response.finish_reason is None:
                nbytes = growth(capacity, ROW_STEP)
                if not (yield from room(partial(_grew, claim, nbytes, request.best_effort))):
                    response.finish_reason = "length"
                capacity += ROW_STEP
            yield response
            if response.finish_reason is not None:
                return


def _grew(claim: Claim, nbytes: int, best_effort: bool) -> bool:
    """Whether there was room; raises `BudgetError` where there must be, or will be soon."""
    try:
        claim.grow(nbytes)
    except BudgetError as error:
        if error.fits_soon or not best_effort:
            raise
        return False
    return True
