"""The engine of a rank: the same steps, told to the others on rank 0, and compared on each."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import greedy_sampler

from ..caches.live import LiveCaches
from ..decode.sampling import Sampler
from ..engine import Engine
from ..errors import HybridCacheError, SettingError
from ..machine import SECONDS_BETWEEN, memory_left
from ..report import CacheReport
from ..request.request import Request
from ..store.match import AnyFound
from ..worker.turns import Pause
from .acts import Acts, Telling
from .figures import RankFigures

T = TypeVar("T")

ONE_MACHINE = "is not possible with several ranks: leave it out, or start the model on one machine."


@dataclass(eq=False)
class RankEngine(Engine):
    """One rank's. `acts` are what it tells or hears."""

    acts: Acts = field(kw_only=True)

    def _resume(self, request: Request, live: LiveCaches) -> Generator[Pause, None, AnyFound]:
        found = yield from super()._resume(request, live)
        self.acts.agree(found.position)
        return found

    def between_turns(self) -> None:
        """When rank 0 says so."""

    def figures(self) -> RankFigures:
        """This rank's. What it can spare is reckoned beside rank 0's reserve. Any thread may ask."""
        acts = self.acts
        spare = memory_left().left_bytes - acts.own_reserve_bytes + acts.reserve_bytes
        return RankFigures.of(acts.group.rank, self, spare)

    @property
    def ranks(self) -> tuple[RankFigures, ...]:
        return (self.figures(),)


@dataclass(eq=False)
class LeadingEngine(RankEngine):
    """Rank 0's: what it is asked for is told first, turn by turn, and then done."""

    acts: Telling = field(kw_only=True)
    _numbers: Iterator[int] = field(default_factory=count, init=False)
    _relieved_at: float = field(default=0.0, init=False)

    @property
    def ranks(self) -> tuple[RankFigures, ...]:
        """All ranks', as they were told last."""
        return (self.figures(), *(each for _, each in sorted(self.acts.figures.items())))

    # In turns

    def answer(
        self, request: Request, options: dict[str, Any]
    ) -> Iterator[GenerationResponse | Pause]:
        held = Held()
        request, options = held.request(request), held.options(options)
        return self._told("answer", request, held, super().answer(request, options))

    def warm(self, request: Request) -> Iterator[CacheReport | Pause]:
        held = Held()
        request = held.request(request)
        return self._told("warm", request, held, super().warm(request))

    def _told(self, what: str, request: Request, held: Held, steps: Iterator[T]) -> Iterator[T]:
        """Each turn of a request, after the others know of it.

        What a caller's own function raises is raised behind the turn, on every rank at the same place.
        """
        number = next(self._numbers)
        told: dict[str, Any] = {"do": "begin", "what": what, **asked(request)}
        while True:
            self.acts.tell(**told, number=number)
            try:
                item = self._next(steps)
            except StopIteration:
                return
            if held.error is not None:
                self.acts.tell("fail_request", number=number)
                steps.throw(held.error)  # type: ignore[attr-defined]
            try:
                yield item
            except GeneratorExit:
                self.acts.tell("close", number=number)
                steps.close()  # type: ignore[attr-defined]
                raise
            told = {"do": "step"}

    def _next(self, steps: Iterator[T]) -> T:
        """A turn. What is refused is refused on every rank; what MLX cannot do others may have done."""
        try:
            return next(steps)
        except HybridCacheError:
            raise
        except (RuntimeError, MemoryError) as error:
            raise self.acts.group.fail(f"Rank 0 failed: {error}") from error

    # At once

    def close(self) -> None:
        self.acts.tell("stop")
        super().close()

    def clear(self) -> None:
        self.acts.tell("clear")
        super().clear()

    def drop(self, salt: str, tokens: Any) -> int:
        self.acts.tell("drop", salt=salt, tokens=tokens)
        return super().drop(salt, tokens)

    def pin(self, salt: str, tokens: Any, *, is_pinned: bool) -> int:
        self.acts.tell("pin", salt=salt, tokens=tokens, is_pinned=is_pinned)
        return super().pin(salt, tokens, is_pinned=is_pinned)

    def publish(self) -> None:
        self.acts.tell("publish")
        super().publish()

    def lookup(self, request: Request) -> CacheReport:
        self.acts.tell("lookup", **asked(request))
        return super().lookup(request)

    def is_writing(self) -> bool:
        self.acts.tell("is_writing")
        return super().is_writing()

    def is_written(self) -> bool:
        self.acts.tell("is_written")
        return super().is_written()

    def between_turns(self) -> None:
        now = time.monotonic()
        is_due = self.acts.has_begun and now >= self._relieved_at
        if is_due and self.acts.group.failure is None:
            self._relieved_at = now + SECONDS_BETWEEN
            self.acts.tell("relieve")
            self.relief.relieve()

    # Not at all

    def prepare(self, request: Request, *, read: bool) -> Iterator[LiveCaches | Pause]:
        raise SettingError(f"Handing over caches {ONE_MACHINE}")

    def answer_uncached(
        self, request: Request, why: list[str], options: dict[str, Any]
    ) -> Iterator[GenerationResponse | Pause]:
        raise SettingError(f"{', '.join(why)} {ONE_MACHINE}")


def asked(request: Request) -> dict[str, Any]:
    """What another rank needs to know of a request."""
    return {
        "tokens": request.tokens,
        "salt": request.namespace.salt,
        "max_tokens": request.max_tokens,
        "boundaries": [*request.boundaries],
        "lifetimes": [[at, seconds] for at, seconds in request.lifetimes.items()],
        "best_effort": request.best_effort,
    }


class Held:
    """The first error of a request's own functions, which run on rank 0 alone, until its turn is over."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def request(self, request: Request) -> Request:
        """The same, whose progress callback raises nothing."""
        return replace(request, on_progress=self._guarded(request.on_progress, lambda *told: None))

    def options(self, options: dict[str, Any]) -> dict[str, Any]:
        """The same, whose sampler and processors raise nothing: any token then, as nobody gets to see it."""
        held = dict(options)
        if (sampler := options.get("sampler")) is not None:
            held["sampler"] = self._guarded(sampler, greedy_sampler)
        processors = options.get("logits_processors") or ()
        held["logits_processors"] = [
            self._guarded(each, lambda tokens, logits: logits) for each in processors
        ]
        return held

    def _guarded(self, function: Callable[..., Any], instead: Callable[..., Any]) -> Any:
        def guarded(*args: Any) -> Any:
            try:
                return function(*args)
            except Exception as error:
                self.error = self.error or error
                return instead(*args)

        return guarded


def drawn_by_rank_0(ranks: mx.distributed.Group) -> Callable[[Sampler | None], Sampler]:
    """What makes a sampler that gives each rank the token that rank 0 draws, `(batch,)`.

    Machines of different kinds compute other last bits, and only rank 0 has a request's sampler and grammar.
    """

    def agreed(sampler: Sampler | None) -> Sampler:
        def drawn(logprobs: mx.array) -> mx.array:
            if ranks.rank():
                # Behind the forward, so that all ranks come to their collectives in the same order.
                nothing = mx.zeros(logprobs.shape[:-1], mx.int32)
                own = mx.depends(nothing, logprobs)
            else:
                own = (sampler or greedy_sampler)(logprobs).astype(mx.int32)
            return mx.distributed.all_sum(own, group=ranks)

        return drawn

    return agreed
