"""A trace replayed through the real store, tree, schedule and policy, with payloads that are sizes only.

The order of events is the engine's: match, claim the running request's bytes, make room for each slice,
save at its cuts, save the reply's end unless the template strips it, take over what the caches lend.
Requests come one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from mlx_hybridcache.caches.room import rounded
from mlx_hybridcache.errors import BudgetError
from mlx_hybridcache.prefill.replay import Plan
from mlx_hybridcache.prefill.schedule import (
    Grid,
    Reading,
    cuts_for,
    partings,
)
from mlx_hybridcache.store.budget import Claim
from mlx_hybridcache.store.eviction.policy import Weights, weights
from mlx_hybridcache.store.eviction.values import Weigh
from mlx_hybridcache.store.lazy_rows import (
    BorrowedRows,
    Column,
    Lender,
    Ranges,
)
from mlx_hybridcache.store.match import Found
from mlx_hybridcache.store.materialize import Loans
from mlx_hybridcache.store.store import Store
from mlx_hybridcache.store.tree import Rows
from mlx_hybridcache.tokens import Namespace, Tokens

from .traces import TracedRequest

SPACE = Namespace("trace")
GRID = Grid()
MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model's caches weigh, in bytes: one token's rows, one checkpoint's states."""

    name: str
    row_bytes: int
    checkpoint_bytes: int
    arrays: int  # layers with rows, times two
    states: int  # layers without

    def running_bytes(self, asked: TracedRequest) -> int:
        """A live request: rows for its prompt and its reply, rounded as buffers are, and one state."""
        rows = rounded(len(asked.tokens) + asked.reply_tokens)
        return rows * self.row_bytes + self.checkpoint_bytes

    def prefix_bytes(self, tokens: int) -> int:
        """A copy of everything that restores `tokens` tokens."""
        return tokens * self.row_bytes + self.checkpoint_bytes


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "qwen3-next-80b", 12 * 2 * 2 * 256 * 2, 36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2), 24, 36
        ),
        Shape(
            "qwen3.5-35b", 10 * 2 * 2 * 256 * 2, 30 * (32 * 128 * 128 * 4 + 3 * 8192 * 2), 20, 30
        ),
    )
}


@dataclass(frozen=True, slots=True)
class SizedRows:
    """Rows of `[start, end)` without their contents."""

    start: int
    end: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        return (self.end - self.start) * self.row_bytes

    def split(self, position: int) -> tuple[SizedRows, SizedRows]:
        """Two stretches, `[start, position)` and `[position, end)`."""
        return (
            SizedRows(self.start, position, self.row_bytes),
            SizedRows(position, self.end, self.row_bytes),
        )


@dataclass(slots=True)
class SizedColumn:
    """One layer's buffer of keys or of values."""

    nbytes: int
    row_bytes: int

    def surrender(self, ranges: Ranges) -> None:
        self.nbytes = 0


@dataclass(eq=False)
class SizedLender(Lender):
    """A running request's caches with `capacity` rows, without their contents."""

    shape: Shape = field(kw_only=True)
    capacity: int = field(kw_only=True)
    is_standing: bool = field(default=True, init=False)

    def let_go(self) -> None:
        self.is_standing = False

    def view(self, start: int, end: int) -> Rows:
        return SizedRows(start, end, self.row_bytes)

    def passing_bytes(self, tokens: int) -> int:
        return max(
            tokens * self.row_bytes // self.shape.arrays,
            self.shape.checkpoint_bytes // self.shape.states,
        )

    def copies(self, ranges: Ranges) -> list[Rows]:
        return [self.view(start, end) for start, end in ranges]

    def columns(self) -> list[Column]:
        each = self.row_bytes // self.shape.arrays
        return [SizedColumn(self.capacity * each, each) for _ in range(self.shape.arrays)]

    def surrendered(self, ranges: Ranges) -> list[Rows]:
        return self.copies(ranges)


@dataclass(frozen=True, slots=True)
class SizedCheckpoint:
    """A state without its contents."""

    position: int
    nbytes: int


def recency(*_: int) -> Weights:
    """Least recently used goes first, and nothing else counts."""
    return Weights(1.0, 0.0, 0.0)


Cuts = Callable[[Reading], Sequence[int]]


def our_cuts(reading: Reading) -> Sequence[int]:
    """The schedule of a model with a capture hook."""
    return cuts_for(reading, GRID)


def coarse_cuts(reading: Reading) -> Sequence[int]:
    """Every 8,192 tokens and the prompt's end."""
    cuts = {*range(8192, reading.end, 8192), reading.end}
    return sorted(cut for cut in cuts if cut > reading.start)


class Simulation:
    """One store that a trace is replayed through."""

    def __init__(
        self,
        trace: Sequence[TracedRequest],
        shape: Shape,
        budget_bytes: int,
        *,
        weigh: Weigh = weights,
        cuts: Cuts = our_cuts,
    ) -> None:
        self.trace = trace
        self.shape = shape
        self.store = Store(budget_bytes, needs_checkpoints=True, weigh=weigh)
        self.loans = Loans(self.store)
        self._cuts = cuts

    def serve(self, index: int) -> int:
        """Request `index` of the trace, as `engine.answer` treats it; returns the tokens replayed."""
        asked, store = self.trace[index], self.store
        store.tick()
        found = store.find(SPACE, asked.tokens)
        need = self.shape.running_bytes(asked)
        lender = SizedLender(
            SPACE,
            asked.tokens,
            self.shape.row_bytes,
            shape=self.shape,
            capacity=rounded(len(asked.tokens) + asked.reply_tokens),
        )
        claim = None
        for spends in (False, True):
            with suppress(BudgetError):
                claim, _ = self.loans.claim_for(need, found, lender, spends_checkpoint=spends)
                break
        else:
            try:
                claim = store.claim(need)
            except BudgetError:
                return len(asked.tokens)  # served by nobody at this budget, counted as read in full
            found = Found(found.match, 0, None)
        claim.shrink(need)
        if found.position:
            store.use(found)
        lender.alike = [(0, found.position)]
        self.loans.lend(lender)
        self._read(asked, found, lender)
        if asked.keeps_reply:
            self._end(asked.history, lender, claim)
        self.loans.take_over(lender, claim)
        claim.release()
        return len(asked.tokens) - found.position

    def _read(self, asked: TracedRequest, found: Found, lender: Lender) -> None:
        tokens = asked.tokens
        reading = Reading(
            found.position, len(tokens) - 1, turn_starts=asked.turns, branch=found.match.matched
        )
        parted = partings(reading, GRID, is_inside=found.is_inside)
        cuts = tuple(self._cuts(reading))
        plan = Plan(reading.start, reading.end, cuts, must_pause=False, cuts_every_slice=False)
        a = plan.start
        while a < plan.end:
            b = plan.slice_end(a, GRID.step)
            for cut in self._afford(tokens, b, plan.cuts_in(a, b), parted):
                is_end, is_parting = cut == reading.end, cut in parted
                self._save(tokens[:cut], lender, is_end=is_end, is_parting=is_parting)
            self.loans.own(lender)
            a = b

    def _afford(self, tokens: Tokens, b: int, cuts: list[int], parted: Container[int]) -> list[int]:
        return self.store.afford(
            SPACE,
            tokens[:b],
            cuts,
            partings=parted,
            row_bytes=0,  # they lie in the running caches
            snapshot_bytes=self.shape.checkpoint_bytes,
        )

    def _save(
        self, tokens: Tokens, lender: Lender, *, is_end: bool, is_parting: bool = False
    ) -> bool:
        end = len(tokens)
        return self.store.save(
            SPACE,
            tokens,
            lambda start: BorrowedRows(start, end, lender),
            cast("Any", SizedCheckpoint(end, self.shape.checkpoint_bytes)),
            row_bytes=0,
            is_end=is_end,
            is_parting=is_parting,
        )

    def _end(self, history: Tokens, lender: Lender, claim: Claim) -> None:
        """The running state itself becomes the checkpoint."""
        lender.tokens = history
        claim.shrink(claim.nbytes - self.shape.checkpoint_bytes)
        self._save(history, lender, is_end=True)
