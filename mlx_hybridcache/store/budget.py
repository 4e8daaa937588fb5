"""One budget for what is stored and for what runs: what is held, who claims it, who else holds it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from .tree import Held, Node


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What the store holds: bytes really held, counts since it was made."""

    budget_bytes: int
    rows_bytes: int
    snapshot_bytes: int
    running_bytes: int
    lingering_bytes: int
    checkpoints: int
    conversations: int
    nodes: int
    pinned: int
    tokens: int
    evictions: int
    refusals: int

    @property
    def held_bytes(self) -> int:
        """Everything that counts against the budget."""
        stored = self.rows_bytes + self.snapshot_bytes
        return stored + self.running_bytes + self.lingering_bytes


class Budget(ABC):
    """Bytes by what they are for. Their sum is never more than `budget_bytes`.

    `lingering_bytes` were let go of, but are held elsewhere for a moment longer; `freed_bytes` were let
    go of since memory was last given back to the system.
    """

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.running_bytes = 0
        self.lingering_bytes = 0
        self.rows_bytes = 0
        self.snapshot_bytes = 0
        self.freed_bytes = 0

    @property
    def stored_bytes(self) -> int:
        """Rows and snapshots."""
        return self.rows_bytes + self.snapshot_bytes

    def used_bytes(self) -> int:
        """Everything that counts against the budget."""
        return self.stored_bytes + self.running_bytes + self.lingering_bytes

    def has_room(self, nbytes: int) -> bool:
        """Whether `nbytes` more fit beside everything that is held."""
        return self.used_bytes() + nbytes <= self.budget_bytes

    def settle(self, nbytes: int) -> None:
        """So many lingering bytes are held no longer."""
        self.lingering_bytes -= nbytes

    def linger(self, nbytes: int) -> None:
        """So many bytes, given back by a request, are held until `settle`."""
        self.lingering_bytes += nbytes

    @abstractmethod
    def make_room(self, nbytes: int, keep: Iterable[Node] = (), spare: Node | None = None) -> None:
        """Let go of other things until `nbytes` more fit. Raises `BudgetError` when they do not."""


class Holders:
    """Who else holds what a store lets go of. Here nobody; a tier with other holders says so.

    `dropped` and `split` return the bytes that stay held although the store no longer has them.
    """

    def split_nbytes(self, rows: Held) -> int:
        """Room that cutting these rows in two takes for a moment: both parts are copies."""
        return rows.nbytes

    def dropped(self, payload: Held) -> int:
        """A checkpoint, or the rows of a node, left the store."""
        return 0

    def split(self, rows: Held) -> int:
        """Rows were replaced by two parts of their own."""
        return 0

    def is_held(self, payload: Held) -> bool:
        """Whether others hold it at this moment."""
        return False


class Claim:
    """Bytes of the budget held by one running request. Given back by `release`, once."""

    def __init__(self, budget: Budget, nbytes: int):
        self._budget = budget
        self.nbytes = nbytes

    def grow(self, nbytes: int, passing: int = 0) -> None:
        """Claim `nbytes` more, with room for `passing` bytes that are held for a moment only.

        Raises `BudgetError` when nothing is left to let go for them.
        """
        self._budget.make_room(nbytes + passing)
        self._budget.running_bytes += nbytes
        self.nbytes += nbytes

    def shrink(self, nbytes: int) -> None:
        """Give back what is more than `nbytes`, or all of it."""
        nbytes = max(nbytes, 0)
        if nbytes < self.nbytes:
            self._budget.running_bytes -= self.nbytes - nbytes
            self._budget.freed_bytes += self.nbytes - nbytes
            self.nbytes = nbytes

    def release(self) -> None:
        """Give all of it back."""
        self.shrink(0)
