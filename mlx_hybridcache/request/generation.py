"""What callers hold of a request: a reply under way, or caches."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from ..caches.live import LiveCaches
from ..errors import ClosedError
from ..report import CacheReport, Divergence
from ..store.budget import Claim
from ..worker.stream import Stream
from ..worker.turns import Pause
from ..worker.worker import Worker, closed
from .request import Request

T = TypeVar("T")


class Generation(Generic[T]):
    """A reply under way: iterate with `for` on any thread, or with `async for` on any event loop.

    Its items are mlx-lm's `GenerationResponse`s, or what `through` makes of them. `report` says what
    the cache did, from the moment the prompt is read. Closing it, leaving its `with` or `async with`
    block, or dropping it cancels the request; what was read stays stored.
    """

    def __init__(self, request: Request, stream: Stream[T]):
        self._request = request
        self._stream = stream

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return next(self._stream)

    def __aiter__(self) -> AsyncIterator[T]:
        return aiter(self._stream)

    def cancel(self) -> None:
        """Ask it to stop, without waiting."""
        self._stream.cancel()

    def close(self) -> None:
        """Stop here. Returns when the work has stopped."""
        self._stream.close()

    async def aclose(self) -> None:
        """The same on an event loop."""
        self._stream.cancel()
        with suppress(ClosedError):  # the cache was closed first, and with it the request
            async for _ in self._stream:
                pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        report = self.report
        told = "not read yet" if report is None else f"{report.restored_tokens:,} restored"
        return f"<Generation for {len(self._request.tokens):,} tokens, {told}>"

    @property
    def report(self) -> CacheReport | None:
        """What the cache did for this request; None until its prompt is read."""
        return self._request.account.report

    @property
    def divergence(self) -> Divergence | None:
        """Where the prompt parted ways with what is stored, if it did."""
        return self._request.account.divergence


class HeldClaim:
    """A claim given back on the worker thread, at the latest when its holder is dropped."""

    def __init__(self, claim: Claim, worker: Worker):
        self._claim: Claim | None = claim
        self._worker = worker

    def release(self) -> None:
        """Give it back; once is enough."""
        claim, self._claim = self._claim, None
        if claim is not None:
            self._worker.post(claim.release)

    def __del__(self) -> None:
        self.release()


@dataclass(frozen=True, repr=False)
class Ready:
    """Caches for a framework that runs the model itself.

    `prompt_cache` are mlx-lm caches that stand at `position`; `rest` are the prompt's tokens from
    there on, at least one. They count against the budget until `release` is called, its `with` block
    is left, or this object is dropped.
    """

    prompt_cache: list[Any]
    rest: list[int]
    position: int
    report: CacheReport
    _claim: HeldClaim

    def release(self) -> None:
        """Say that the caches are no longer used."""
        self._claim.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return (
            f"<Ready at position {self.position:,}, {self.report.restored_tokens:,} restored, "
            f"{len(self.rest):,} to read>"
        )


def handed_over(
    steps: Iterator[LiveCaches | Pause], request: Request, worker: Worker
) -> Iterator[Ready | Pause]:
    """Caches as their caller gets them; made here, what nobody takes any more is given back too."""
    for step in steps:
        if isinstance(step, Pause):
            yield step
        else:
            report, rest = request.account.report, request.tokens[step.position :].tolist()
            assert report is not None
            caches, claim = step.hand_over()
            yield Ready(caches, rest, step.position, report, HeldClaim(claim, worker))
            del caches  # whoever took them has the only hold on them


def only(found: list[Ready]) -> Ready:
    """The one that a request for caches gives; raises `ClosedError` where the cache was closed before."""
    if not found:  # what the worker's end cuts short ends without an error
        raise closed()
    return found[0]


def passed_through(
    steps: Iterator[Any], through: Callable[[Iterator[Any]], Iterator[Any]]
) -> Iterator[Any]:
    """What `through` makes of a request's steps, which end with it."""
    with closing(steps):  # type: ignore[type-var]  # both ways of answering are generators
        yield from through(steps)
