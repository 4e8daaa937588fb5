"""A request on its way: what was asked, and the account kept of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..caches.room import request_rows
from ..report import CacheReport, Divergence, Reason
from ..store.match import AnyFound
from ..tokens import Namespace, Tokens
from ..worker.turns import Job

Progress = Callable[[int, int], None]
"""Called with the prompt's tokens read so far and all of them, on the worker thread."""


def _nobody(read: int, total: int) -> None:
    """Nobody wants to hear of it."""


@dataclass(eq=False)
class Account:
    """What happened to a request so far.

    `read` tokens are restored or read, in `forwards`; `taken` and `refused` are checkpoints,
    `rejected` files that were not what they should be, `soft_pins` positions of soft pins. `stops` are positions on the way at which
    others wait for a checkpoint.
    """

    report: CacheReport | None = None
    divergence: Divergence | None = None
    forwards: int = 0
    taken: int = 0
    refused: int = 0
    rejected: int = 0
    read: int = 0
    soft_pins: set[int] = field(default_factory=set)
    stops: set[int] = field(default_factory=set)

    def amend(self, **changes: Any) -> None:
        """What happened since the prompt was read."""
        assert self.report is not None
        self.report = replace(self.report, forwards=self.forwards, **changes)


@dataclass(frozen=True, eq=False)
class Request:
    """What was asked.

    An `exact` one is read in whole slices of the grid, and goes on only where one of those ended;
    `detail` says why, if that is not what its cache was made for. A `best_effort` reply ends where
    nothing more fits. `lifetimes` are positions in `[1, len(tokens))`, with the seconds for which what
    restores them has a soft pin. `job` is what the worker knows of it. `room`, if any, are the rows that its caches
    are made for, where the tokens do not tell them.
    """

    tokens: Tokens
    namespace: Namespace
    max_tokens: int
    boundaries: tuple[int, ...] = ()
    lifetimes: Mapping[int, float] = field(default_factory=dict)
    exact: bool = False
    best_effort: bool = False
    detail: str = ""
    room: int = 0
    on_progress: Progress = _nobody
    job: Job = field(default_factory=lambda: Job(left=1))
    account: Account = field(default_factory=Account)

    @property
    def rows(self) -> int:
        """How many its caches are made for."""
        if self.room:
            return self.room
        return request_rows(len(self.tokens), self.max_tokens, best_effort=self.best_effort)

    def advance(self, read: int) -> None:
        """`read` tokens are read: say how many more until someone's first token."""
        self.account.read = read
        ahead = [stop for stop in self.account.stops if stop > read]
        self.job.left = max(1, min([len(self.tokens), *ahead]) - read)

    def matched(self, found: AnyFound) -> None:
        """Note where the prompt parts ways with what is stored, if it does."""
        tokens, at, around = self.tokens, found.match.matched, Divergence.AROUND
        self.account.divergence = (
            Divergence(
                position=at,
                before=tuple(tokens[max(0, at - around) : at].tolist()),
                asked=tuple(tokens[at : at + around].tolist()),
                stored=tuple(found.match.continuation()[:around].tolist()),
            )
            if found.match.contradicted
            else None
        )

    def report(self, found: AnyFound, reason: Reason, seconds: float = 0.0) -> CacheReport:
        """What was found, and what was done about it so far, in `seconds` of reading."""
        tokens, account = len(self.tokens), self.account
        return CacheReport(
            prompt_tokens=tokens,
            matched_tokens=found.match.matched,
            restored_tokens=found.position,
            replayed_tokens=tokens - found.position,
            forwards=account.forwards,
            tier=found.tier if found.position else "none",
            reason=reason,
            diverged_at=found.match.matched if found.match.contradicted else None,
            prefill_seconds=seconds,
            checkpoints_taken=account.taken,
            checkpoints_refused=account.refused,
            soft_pins=len(account.soft_pins),
            detail=self.detail,
        )

    def uncached_report(self, why: Sequence[str], unsupported: Sequence[str]) -> CacheReport:
        """The report when it is served without the cache, because of `why` or of the model's layers."""
        return CacheReport(
            prompt_tokens=len(self.tokens),
            matched_tokens=0,
            restored_tokens=0,
            replayed_tokens=len(self.tokens),
            reason=Reason.DISABLED if why else Reason.UNSUPPORTED_LAYER,
            detail=", ".join(why or unsupported),
        )
