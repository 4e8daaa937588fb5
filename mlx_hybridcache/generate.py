"""Decode: caches that have read the prompt but its last token in, mlx-lm's responses out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.generate import GenerationResponse, stream_generate

from .tokens import Tokens

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
T = TypeVar("T")


def decode(
    model: Any,
    tokenizer: Any,
    tokens: Tokens,
    caches: Sequence[Any],
    *,
    max_tokens: int,
    prefill_seconds: float,
    before_step: Callable[[int], None],
    logits_processors: Sequence[LogitsProcessor] | None = None,
    seed: int | None = None,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """mlx-lm's own token loop on `caches`, which stand at `len(tokens) - 1`.

    When the k-th response is yielded, `caches` stand at `len(tokens) + k`: mlx-lm feeds each token
    as it gives it out. `before_step(position)` is called before the cache is written up to that
    position. `seed` is the state of the random stream that samplers draw from, kept apart from
    other requests' on this thread.
    """
    if logits_processors:
        # mlx-lm shows processors the tokens it was given, which here is the last one only.
        read = mx.array(tokens[:-1])
        options["logits_processors"] = [_behind(read, each) for each in logits_processors]
    responses = stream_generate(
        model,
        tokenizer,
        mx.array(tokens[-1:]),
        max_tokens=max_tokens,
        prompt_cache=caches,
        **options,
    )
    steps = seeded(responses, seed)
    count, finished = 0, False
    try:
        while not finished:
            before_step(len(tokens) + count + 1)
            response = next(steps)
            mx.eval(response.logprobs)  # it leaves this thread, where nothing lazy may go
            count, finished = count + 1, response.finish_reason is not None
            yield replace(
                response,
                prompt_tokens=len(tokens),
                prompt_tps=len(tokens) / max(prefill_seconds, 1e-9),
            )
    finally:
        # Here, on its own thread: collected on another one, mlx-lm's stream context would leave
        # that thread with this one's stream.
        responses.close()


def seeded(steps: Iterator[T], seed: int | None) -> Iterator[T]:
    """The same steps, each drawing from a random stream of their own, which `seed` begins.

    MLX has one random state per thread and other requests take turns on it.
    """
    while True:
        if seed is not None:
            mx.random.seed(seed)
        try:
            step = next(steps)
        except StopIteration:
            return
        if seed is not None:
            seed = random_state()
        yield step


def random_state() -> int:
    """This thread's random state as the seed that would bring it back."""
    state: Any = mx.random.state  # mlx declares it as an object
    high, low = (int(word) for word in state[0].tolist())
    return high << 32 | low


def _behind(read: mx.array, processor: LogitsProcessor) -> LogitsProcessor:
    return lambda tokens, logits: processor(mx.concatenate([read, tokens]), logits)
