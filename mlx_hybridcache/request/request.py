"""A request on its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..caches.live import CacheLender
from ..caches.room import request_rows
from ..report import CacheReport, Divergence
from ..tokens import Namespace, Tokens
from ..worker.worker import Job

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
