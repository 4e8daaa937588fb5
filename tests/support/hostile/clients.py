"""The clients of a hostile round: how fast each reads, when it leaves, and what its reply is drawn with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import oracle
import tiny

from mlx_hybridcache import BudgetError
from mlx_hybridcache.worker.turns import PAUSE, Load

EOS = tiny.VOCAB - 1


class Accompanied(Load):
    """The conductor is one of the worker's requests, but keeps nobody waiting."""

    __slots__ = ()

    @property
    def is_shared(self) -> bool:
        """Whether there are two others."""
        return self.reading + self.waiting + self.writing > 2


class BrokenSamplerError(Exception):
    """What a broken sampler raises."""


@dataclass
class Log:
    """What a reply was made of, seen on the worker's thread; `over` when no more comes."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[mx.array] = field(default_factory=list)
    over: bool = False

    def through(self, responses: Iterator[Any]) -> Iterator[Any]:
        """Responses as they come, noted."""
        try:
            for response in responses:
                if response is not PAUSE:
                    self.tokens.append(response.token)
                    self.logprobs.append(response.logprobs)
                yield response
        finally:
            self.over = True


@dataclass
class Reader:
    """A client: takes `pace` tokens a turn, none where it lags, and leaves after `patience` of them."""

    stream: Any
    log: Log
    pace: int
    patience: int
    is_broken: bool
    taken: int = 0

    def take(self) -> bool:
        """What it takes in one turn, without ever waiting. Whether it stays."""
        for _ in range(self.pace):
            if self.taken == self.patience:
                return False
            if self.taken == len(self.log.tokens):
                return not self.log.over or not self.hear_the_end()
            next(self.stream)
            self.taken += 1
        return True

    def hear_the_end(self) -> bool:
        """Its reply is over, or it was cancelled one turn ago."""
        try:
            for _ in self.stream:
                self.taken += 1
        except BudgetError:
            return True
        except BrokenSamplerError:
            assert self.is_broken
        return True


@dataclass
class Asked:
    """A request, with what came of it."""

    tokens: list[int]
    salt: str
    log: Log

    @property
    def history(self) -> list[int]:
        """The prompt and what was said."""
        return [*self.tokens, *self.log.tokens]


def ends(at: int) -> Callable[[mx.array], mx.array]:
    """A sampler that ends the reply with its token number `at`."""
    left = [at]

    def draw(logprobs: mx.array) -> mx.array:
        left[0] -= 1
        greedy = oracle.never_ending(logprobs)
        return mx.full(greedy.shape, EOS, greedy.dtype) if left[0] == 0 else greedy

    return draw


def breaks(at: int) -> Callable[[mx.array], mx.array]:
    """A sampler that fails at the reply's token number `at`."""
    left = [at]

    def draw(logprobs: mx.array) -> mx.array:
        left[0] -= 1
        if left[0] == 0:
            raise BrokenSamplerError
        return oracle.never_ending(logprobs)

    return draw
