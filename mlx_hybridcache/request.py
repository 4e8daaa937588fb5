"""A request on its way, and what its caller holds of it: a generator, or caches."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from .caches.live import CacheLender
from .caches.room import request_rows
from .report import CacheReport, Divergence
from .store.budget import Claim
from .tokens import Namespace, Tokens
from .worker.worker import Job, Stream, Worker

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Called with the prompt's tokens read so far and all of them, on the worker thread."""


@dataclass(eq=False)
class Request:
    """What was asked, and the account kept of it.

    `read` tokens are restored or read so far, and `stops` are the positions on the way at which
    others wait for a checkpoint. Its caches are the `lender`'s, if the store may leave rows in them.
    An `exact` one is read in whole slices of the grid, and goes on only where one of those ended;
    `detail` says why, if that is not what its cache was made for. A `best_effort` reply ends where
    nothing more fits.
    """

    tokens: Tokens
    namespace: Namespace
    max_tokens: int
    boundaries: tuple[int, ...] = ()
    on_progress: Progress = field(default=lambda read, total: None)
    report: CacheReport | None = None
    divergence: Divergence | None = None
    forwards: int = 0
    taken: int = 0
    refused: int = 0
    rejected: int = 0
    lender: CacheLender | None = None
    job: Job = field(default_factory=lambda: Job(left=1))
    read: int = 0
    stops: set[int] = field(default_factory=set)
    exact: bool = False
    best_effort: bool = False
    detail: str = ""

    @property
    def rows(self) -> int:
        """How many its caches are made for."""
        return request_rows(len(self.tokens), self.max_tokens, best_effort=self.best_effort)

    def advance(self, read: int) -> None:
        """`read` tokens are read: say how many more until someone's first token."""
        self.read = read
        ahead = [stop for stop in self.stops if stop > read]
        self.job.left = max(1, min([len(self.tokens), *ahead]) - read)


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
        return self._request.report

    @property
    def divergence(self) -> Divergence | None:
        """Where the prompt parted ways with what is stored, if it did."""
        return self._request.divergence


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
