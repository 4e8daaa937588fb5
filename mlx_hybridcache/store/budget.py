"""One budget for what is stored and for what runs: its counters, which it alone writes, and claims on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .tree import AnyNode

Evict = Callable[[int, Iterable[AnyNode], AnyNode | None], None]
"""Let go of other things until so many bytes fit, but for the rows of these nodes and the checkpoint of one."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What the store holds: bytes really held, counts since it was made."""

    budget_bytes: int
    rows_bytes: int
    snapshot_bytes: int
    running_bytes: int
    lingering_bytes: int
    retained_bytes: int
    checkpoints: int
    conversations: int
    nodes: int
    pinned: int
    soft_pinned: int
    soft_pinned_bytes: int
    tokens: int
    evictions: int
    refusals: int
    taken_over: int

    @property
    def held_bytes(self) -> int:
        """Everything that counts against the budget."""
        stored = self.rows_bytes + self.snapshot_bytes
        return stored + self.running_bytes + self.lingering_bytes + self.retained_bytes


class Budget:
    """Bytes by what they are for. Nothing is added that does not fit into `limit_bytes` beside the rest.

    `in_flight_bytes` were let go of, but others hold them for a moment longer; `retained_bytes` are held for a
    request that may come, and go before anything else; `freed_bytes` were let
    go of since memory was last given back to the system. `evict` makes room where there is none, and
    raises `BudgetError` when it cannot.
    """

    def __init__(self, limit_bytes: int, evict: Evict):
        self._limit_bytes = limit_bytes
        self._evict = evict
        self._rows_bytes = 0
        self._snapshot_bytes = 0
        self._running_bytes = 0
        self._in_flight_bytes = 0
        self._retained_bytes = 0
        self._freed_bytes = 0
        self._used_bytes = 0

    @property
    def limit_bytes(self) -> int:
        """What the sum may come to."""
        return self._limit_bytes

    @property
    def rows_bytes(self) -> int:
        """Rows that the store owns."""
        return self._rows_bytes

    @property
    def snapshot_bytes(self) -> int:
        """What stands at checkpoints."""
        return self._snapshot_bytes

    @property
    def stored_bytes(self) -> int:
        """Rows and snapshots."""
        return self._rows_bytes + self._snapshot_bytes

    @property
    def running_bytes(self) -> int:
        """All claims."""
        return self._running_bytes

    @property
    def in_flight_bytes(self) -> int:
        """What others hold for a moment longer."""
        return self._in_flight_bytes

    @property
    def retained_bytes(self) -> int:
        """Buffers without a request, whose rows are stored too."""
        return self._retained_bytes

    @property
    def freed_bytes(self) -> int:
        """What may be given back to the system."""
        return self._freed_bytes

    @property
    def used_bytes(self) -> int:
        """Everything that counts against the limit."""
        return self._used_bytes

    def has_room(self, nbytes: int) -> bool:
        """Whether `nbytes` more fit beside everything that is held."""
        return self._used_bytes + nbytes <= self._limit_bytes

    def make_room(
        self, nbytes: int, keep: Iterable[AnyNode] = (), spare: AnyNode | None = None
    ) -> None:
        """Let go of other things until `nbytes` more fit.

        The rows of nodes in `keep` stay, and the checkpoint of `spare`. Raises `BudgetError` when
        they do not fit.
        """
        if not self.has_room(nbytes):
            self._evict(nbytes, keep, spare)

    def claim(self, nbytes: int) -> Claim:
        """Hold `nbytes`, for which there is room, for a running request."""
        self._change(running=nbytes)
        return Claim(self, nbytes)

    def keep(self, *, rows: int = 0, snapshots: int = 0) -> None:
        """So many bytes are stored now, for which there is room."""
        self._change(rows=rows, snapshots=snapshots)

    def free(self, *, rows: int = 0, snapshots: int = 0, in_flight: int = 0) -> None:
        """So many bytes are stored no longer, of which others hold `in_flight` until `settle`."""
        self._change(rows=-rows, snapshots=-snapshots, in_flight=in_flight)
        self._freed_bytes += rows + snapshots

    def hold(self, nbytes: int) -> None:
        """So many bytes more, for which there is room, are held by others until `settle`."""
        self._change(in_flight=nbytes)

    def resume(self, nbytes: int) -> Claim:
        """So many bytes that were retained are a running request's again."""
        self._change(retained=-nbytes, running=nbytes)
        return Claim(self, nbytes)

    def let_retained_go(self, nbytes: int) -> None:
        """So many bytes are retained no longer, and free."""
        self._change(retained=-nbytes)
        self._freed_bytes += nbytes

    def settle(self, nbytes: int) -> None:
        """So many bytes are in flight no longer."""
        self._change(in_flight=-nbytes)

    def limit(self, limit_bytes: int) -> None:
        """From now on the sum may come to this. What is over it stays until room is made."""
        self._limit_bytes = limit_bytes

    def given_back(self) -> None:
        """The system has what was freed."""
        self._freed_bytes = 0

    def change_claim(self, nbytes: int, in_flight: int = 0, retained: int = 0) -> None:
        """A claim has grown by so much, or shrunk if less than 0; for `Claim` alone."""
        self._change(running=nbytes, in_flight=in_flight, retained=retained)
        self._freed_bytes += max(0, -nbytes - in_flight - retained)

    def _change(
        self,
        *,
        rows: int = 0,
        snapshots: int = 0,
        running: int = 0,
        in_flight: int = 0,
        retained: int = 0,
    ) -> None:
        self._rows_bytes += rows
        self._snapshot_bytes += snapshots
        self._running_bytes += running
        self._in_flight_bytes += in_flight
        self._retained_bytes += retained
        more = rows + snapshots + running + in_flight + retained
        self._used_bytes += more
        self._check(more)

    def _check(self, more: int) -> None:
        """What holds after each change, by which `more` bytes are used now."""
        counters = (
            self._rows_bytes,
            self._snapshot_bytes,
            self._running_bytes,
            self._in_flight_bytes,
            self._retained_bytes,
        )
        assert min(counters) >= 0, f"less than nothing is held: {counters}"
        assert sum(counters) == self._used_bytes, f"{counters} are not {self._used_bytes}"
        assert more <= 0 or self._used_bytes <= self._limit_bytes, (
            f"{counters} are more than {self._limit_bytes}"
        )


class Claim:
    """Bytes of the budget held by one running request. Given back by `release`, once."""

    def __init__(self, budget: Budget, nbytes: int):
        self._budget = budget
        self.nbytes = nbytes

    def grow(
        self,
        nbytes: int,
        passing: int = 0,
        keep: Iterable[AnyNode] = (),
        spare: AnyNode | None = None,
    ) -> None:
        """Claim `nbytes` more, with room for `passing` bytes that are held for a moment only.

        `keep` and `spare` are as for `make_room`. Raises `BudgetError` when nothing is left to let go for them.
        """
        self._budget.make_room(nbytes + passing, keep, spare)
        self._budget.change_claim(nbytes)
        self.nbytes += nbytes

    def shrink(self, nbytes: int) -> None:
        """Give back what is more than `nbytes`, or all of it."""
        nbytes = max(nbytes, 0)
        if nbytes < self.nbytes:
            self._budget.change_claim(nbytes - self.nbytes)
            self.nbytes = nbytes

    def abandon(self, nbytes: int) -> int:
        """Of it so many bytes, or all, outlive the request: others hold them until the budget's `settle`.

        Returns how many.
        """
        nbytes = min(nbytes, self.nbytes)
        self._budget.change_claim(-nbytes, in_flight=nbytes)
        self.nbytes -= nbytes
        return nbytes

    def retain(self) -> int:
        """All of it is held on without a request, until room is needed. Returns how many bytes."""
        nbytes, self.nbytes = self.nbytes, 0
        self._budget.change_claim(-nbytes, retained=nbytes)
        return nbytes

    def release(self) -> None:
        """Give all of it back."""
        self.shrink(0)
