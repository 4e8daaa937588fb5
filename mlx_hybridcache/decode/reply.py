"""A reply under way, and who it takes its steps with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from ..caches.layout import Layout
from ..caches.live import LiveCaches
from ..caches.room import REPLY_ROOM, ROW_STEP, rounded
from ..store.budget import Claim
from .batch import Batch, Made
from .sampling import Draws, Guard
from .speculate.speculation import Speculation


@dataclass(eq=False)
class Reply:
    """One reply. Its caches have read `start` tokens of a prompt and those in `read`.

    `made` are the last of these, which nobody took yet. It ends with a token of `ends`, or when `left`
    more are made; negative means no limit. `draws` is its random stream, if it has one. Its caches are
    `live` while it is alone; `speculation` is what it drafts with, if it does.
    """

    start: int
    ends: Collection[int]
    left: int
    live: LiveCaches
    guard: Guard
    draws: Draws | None
    steps: Steps = field(init=False)
    speculation: Speculation | None = None
    read: list[int] = field(default_factory=list)
    made: deque[Made] = field(default_factory=deque)

    @property
    def position(self) -> int:
        """Where its caches stand."""
        return self.start + len(self.read)

    @property
    def has_caches(self) -> bool:
        """False when its batch failed, until it is revived."""
        return bool(self.steps.batch.caches)

    @property
    def coming(self) -> int:
        """The token that is drawn already and that its caches read next."""
        return self.steps.batch.coming

    def takes(self, made: Made) -> None:
        """Its next token is there; its caches have read it."""
        self.read.append(made.token)
        self.left -= 1
        self.made.append(made)
        if self.live.is_standing:
            self.live.position = self.position

    def takes_only(self, made: Made) -> None:
        """Its only token is there, which its caches have not read."""
        self.left -= 1
        self.made.append(made)

    @property
    def is_last(self) -> bool:
        """Whether it ends with the token made last."""
        return self.left == 0 or (bool(self.read) and self.read[-1] in self.ends)


class Steps(ABC):
    """Who takes steps together, with `capacity` rows each that `claim` pays for."""

    is_merged: bool

    def __init__(self, batch: Batch, replies: list[Reply]):
        self.batch = batch
        self.replies = replies

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Rows of each reply."""

    @property
    @abstractmethod
    def claim(self) -> Claim:
        """What pays for the caches."""

    @property
    @abstractmethod
    def more_rows(self) -> int:
        """How many rows each gets when there is none left."""

    @abstractmethod
    def grow(self) -> None:
        """Get them. Raises `BudgetError`."""

    @property
    def has_room(self) -> bool:
        """Whether there are rows for the next step."""
        return max(reply.position for reply in self.replies) < self.capacity


class Alone(Steps):
    """One reply on its own plain caches."""

    is_merged = False

    def __init__(self, batch: Batch, reply: Reply):
        super().__init__(batch, [reply])
        self._live = reply.live

    @property
    def capacity(self) -> int:
        return self._live.capacity

    @property
    def claim(self) -> Claim:
        return self._live.claim

    @property
    def more_rows(self) -> int:
        """As many as it has written, so that it is copied seldom, but no more than it may write."""
        (reply,) = self.replies
        more = min(REPLY_ROOM, max(ROW_STEP, rounded(len(reply.read))))
        return more if reply.left < 0 else min(more, rounded(reply.left))

    def grow(self) -> None:
        self._live.grow(self.more_rows)


class Together(Steps):
    """Several replies on merged caches. What each was `granted` before, in bytes, stays theirs until it leaves."""

    is_merged = True
    more_rows = ROW_STEP

    def __init__(
        self,
        layout: Layout,
        batch: Batch,
        replies: list[Reply],
        capacity: int,
        claim: Claim,
        granted: dict[Reply, int],
    ):
        super().__init__(batch, replies)
        self._layout = layout
        self._capacity = capacity
        self._claim = claim
        self.granted = granted

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def claim(self) -> Claim:
        return self._claim

    def grow(self) -> None:
        """While the old buffers and the new ones are both held for a moment; mlx-lm makes them.

        Out of what was granted, as far as that goes.
        """
        count, more = len(self.replies), self.more_rows
        need = count * more * self._layout.row_bytes
        passing = count * self._layout.largest_buffer_bytes(self._capacity)
        left = self._claim.nbytes - self._needed()
        self._claim.grow(max(0, need - left), passing=max(0, passing - max(0, left - need)))
        self._capacity += more

    def _needed(self) -> int:
        return len(self.replies) * self._layout.running_bytes(self._capacity)

    def remove(self, reply: Reply) -> None:
        """Take a reply out; the others close up. The padding that only it needed goes with it."""
        self.batch.remove(self.replies.index(reply), len(self.replies))
        self.replies.remove(reply)
        del self.granted[reply]
        if not self.replies:
            self._claim.release()
            return
        self._capacity -= max(0, reply.position - max(other.position for other in self.replies))
        self._claim.shrink(max(self._needed(), sum(self.granted.values())))
