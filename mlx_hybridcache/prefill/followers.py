"""Reading a shared prefix once: who reads on whose behalf, and who waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..caches.layout import Layout
from ..caches.live import LiveCaches
from ..request.request import Request
from ..store.tree import common_length
from ..worker.turns import PAUSE, Pause
from .schedule import Grid


@dataclass(eq=False)
class Followers:
    """The requests that read their prompts now, and the rule by which others wait for one of them.

    `reach(request, live)` is the position from which a request could go on at this moment.
    """

    layout: Layout
    grid: Grid
    reach: Callable[[Request, LiveCaches], int]
    under_way: list[Request] = field(default_factory=list, init=False)

    def join(self, request: Request, live: LiveCaches) -> Iterator[Pause]:
        """Let those who are at it read what this prompt shares with theirs, then become one of them.

        A leader that goes away is a leader no more, and the first of its followers to look takes
        its place, from the last checkpoint that it left.
        """
        while True:
            position = self.reach(request, live)
            request.advance(position)
            request.job.waits = self._follows(request, position)
            if not request.job.waits:
                break
            yield PAUSE
        self.under_way.append(request)
        try:
            yield PAUSE  # how much it has to read is known now: its turn may come later
        except BaseException:
            self.leave(request)
            raise

    def leave(self, request: Request) -> None:
        """It reads no more, for whatever reason."""
        self.under_way.remove(request)

    def _follows(self, request: Request, position: int) -> bool:
        """Whether somebody is about to read a slice or more of this prompt; asks for a checkpoint.

        There is one at most: of two who read now the later one waited for what all three share.
        """
        for other in self.under_way:
            if other.namespace != request.namespace:
                continue
            shared = common_length(request.tokens, other.tokens)
            end = len(other.tokens) - 1
            stop = min(shared, len(request.tokens) - 1, end)
            stop -= stop % (self.grid.step if request.exact else 1)
            # At its end a checkpoint is taken anyway; one that is taken for us must be worth it.
            worth = 1 if stop == end else self.grid.shared_step
            if other.account.read < stop and stop - position >= worth:
                if self.layout.needs_snapshots:
                    other.account.stops.add(stop)
                    other.advance(other.account.read)
                return True
        return False
