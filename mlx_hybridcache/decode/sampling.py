"""What one reply draws and changes by itself: its random stream, and errors of its sampler or processors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.sample_utils import greedy_sampler

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
Sampler = Callable[[mx.array], mx.array]
T = TypeVar("T")


class Guard:
    """Lets an error of one reply's sampler or processor end that reply, not its batch."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def sampler(self, sampler: Sampler) -> Sampler:
        """The same sampler, which never raises."""

        def guarded(logprobs: mx.array) -> mx.array:
            try:
                return sampler(logprobs)
            except Exception as error:
                self.error = self.error or error
                return greedy_sampler(logprobs)  # any token: nobody gets to see it

        return guarded

    def processor(self, processor: LogitsProcessor) -> LogitsProcessor:
        """The same processor, which never raises."""

        def guarded(tokens: mx.array, logits: mx.array) -> mx.array:
            try:
                return processor(tokens, logits)
            except Exception as error:
                self.error = self.error or error
                return logits

        return guarded


class Draws:
    """A sampler with a random stream of its own: MLX has one per thread, and replies take turns.

    `state` is where the stream stands.
    """

    def __init__(self, sampler: Sampler, seed: int):
        self._sampler = sampler
        self.state = seed

    def __call__(self, logprobs: mx.array) -> mx.array:
        mx.random.seed(self.state)
        token = self._sampler(logprobs)
        self.state = random_state()
        return token


def seeded(steps: Iterator[T], seed: int | None) -> Iterator[T]:
    """The same steps, each drawing from a random stream of their own, which `seed` begins."""
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


def take_random_state() -> int:
    """The calling thread's random state, and move it on, so that the next request draws anew.

    Without a number of MLX's own: for that the thread would need a stream, which stays when the thread ends.
    """
    state = random_state()
    mx.random.seed(Random(state).getrandbits(64))
    return state
