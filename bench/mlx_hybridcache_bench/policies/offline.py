"""What somebody who knew the future would replay: a clairvoyant heuristic, and a floor that nobody passes.

`floor`: every request replays what is beyond its longest match with any earlier prompt or reply. No
policy of any budget replays less.

`Clairvoyant` keeps to a budget. It knows which earlier positions later requests part ways at, takes checkpoints
at exactly those, at any token, and lets go of whatever saves fewest tokens per byte and per request that
it has to wait. Rows that a running request holds are held once, as ours are. To choose the best set is a hard
problem, so this is a strong heuristic and no proven bound.

Two that know less say how much of that only a look into the future can save. `UNORDERED` still knows
which prefixes will be asked for, how deep and how often, but not when. `PLACES` knows the one thing that a better
schedule of checkpoints could know: at which tokens the requests to come will part ways. Which conversations
come back, and when, it guesses from when they were last used, as anybody must who sees only the past.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np
import numpy.typing as npt

from .baselines import Overlaps
from .sized import Shape
from .traces import TracedRequest

Numbers = npt.NDArray[np.int64]


def floor(trace: Sequence[TracedRequest], overlaps: Overlaps) -> int:
    """Tokens that a cache of unbounded size with a checkpoint at every token would replay."""
    total = 0
    longest = np.zeros(len(trace), dtype=np.int64)
    for index, asked in enumerate(trace):
        total += len(asked.tokens) - min(int(longest[index]), len(asked.tokens) - 1)
        longest = np.maximum(longest, overlaps.of_prompts(index))
    return total


class Knows(Enum):
    """What is known of the requests to come."""

    ALL = "all of them in their order"
    UNORDERED = "all of them, but not their order"
    PLACES = "at which tokens they part ways"


class Clairvoyant:
    """A set of prefixes, each the first `_ends[i]` tokens of request `_owners[i]` and its reply."""

    def __init__(
        self,
        trace: Sequence[TracedRequest],
        overlaps: Overlaps,
        shape: Shape,
        budget_bytes: int,
        *,
        knows: Knows = Knows.ALL,
    ) -> None:
        self.trace = trace
        self.overlaps = overlaps
        self.shape = shape
        self.budget_bytes = budget_bytes
        self.knows = knows
        self._limits = np.array([len(asked.tokens) - 1 for asked in trace])
        self._owners: list[int] = []
        self._used: Numbers = np.zeros(0, dtype=np.int64)  # the request that last restored each
        self._ends: Numbers = np.zeros(0, dtype=np.int64)
        self._serves = np.zeros((0, len(trace)), dtype=bool)
        self._common = np.zeros((0, 0), dtype=np.int64)
        self._nbytes = 0

    def serve(self, index: int) -> int:
        """Request `index` of the trace; returns the tokens replayed."""
        asked = self.trace[index]
        length, room = len(asked.tokens), self.budget_bytes - self.shape.running_bytes(asked)
        if room < 0:
            return length
        self._fit(index - 1, index, room)
        restored = int(self._ends[self._serves[:, index]].max(initial=0))
        self._used[self._serves[:, index] & (self._ends == restored)] = index
        later = self.overlaps.of_prompts(index)[index + 1 :]
        ends = np.unique(np.minimum(later, self._limits[index + 1 :]))
        for end in ends[ends > restored]:
            self._add(index, int(end))
        self._fit(index, index, room)
        return length - restored

    def _add(self, owner: int, end: int) -> None:
        common = np.array(
            [
                min(end, e, self.overlaps.shared(owner, o))
                for o, e in zip(self._owners, self._ends, strict=True)
            ],
            dtype=np.int64,
        )
        self._nbytes += self.shape.prefix_bytes(end - int(common.max(initial=0)))
        size = len(self._owners)
        grown = np.zeros((size + 1, size + 1), dtype=np.int64)
        grown[:size, :size] = self._common
        grown[size, :size] = grown[:size, size] = common
        self._common = grown
        self._owners.append(owner)
        self._used = np.append(self._used, owner)
        self._ends = np.append(self._ends, end)
        serves = (self.overlaps.of_prompts(owner) >= end) & (self._limits >= end)
        self._serves = np.vstack([self._serves, serves[None]])

    def _fit(self, now: int, running: int, room: int) -> None:
        while self._nbytes - self._shared(running) * self.shape.row_bytes > room:
            gone, nbytes = self._least_useful(now)
            self._nbytes -= nbytes
            del self._owners[gone]
            self._used = np.delete(self._used, gone)
            self._ends = np.delete(self._ends, gone)
            self._serves = np.delete(self._serves, gone, axis=0)
            self._common = np.delete(np.delete(self._common, gone, 0), gone, 1)

    def _shared(self, running: int) -> int:
        """Tokens whose rows the running request's caches hold, so that they need not be held twice."""
        lengths = [
            min(int(end), int(self.overlaps.of_prompts(owner)[running]))
            for owner, end in zip(self._owners, self._ends, strict=True)
        ]
        return max(lengths, default=0)

    def _least_useful(self, now: int) -> tuple[int, int]:
        """What saves fewest tokens per byte and per request waited, and the bytes that frees."""
        alone = self._common.max(axis=1, initial=0)
        freed = (self._ends - alone) * self.shape.row_bytes + self.shape.checkpoint_bytes
        saved = self._saves(now) if self.knows is not Knows.PLACES else self._seems_to_save(now)
        gone = int((saved / freed).argmin())
        return gone, int(freed[gone])

    def _saves(self, now: int) -> npt.NDArray[np.float64]:
        """Tokens that each prefix saves the requests behind `now`, by the requests that they wait."""
        ends = np.where(self._serves[:, now + 1 :], self._ends[:, None], 0)
        has_order = self.knows is Knows.ALL
        waits = np.arange(1, ends.shape[1] + 1) if has_order else np.ones(ends.shape[1])
        size = len(self._owners)
        saved = np.zeros(size)
        if size and ends.shape[1]:
            best = ends.argmax(axis=0)
            top = ends.max(axis=0)
            rest = ends.copy()
            rest[best, np.arange(ends.shape[1])] = 0
            np.maximum.at(saved, best, (top - rest.max(axis=0)) / waits)
        return saved

    def _seems_to_save(self, now: int) -> npt.NDArray[np.float64]:
        """Tokens behind the next prefix above each, by the requests since it was last used."""
        is_above = (self._common == self._ends) & (self._ends < self._ends[:, None])
        above = np.where(is_above, self._ends, 0).max(axis=1, initial=0)
        worth: npt.NDArray[np.float64] = (self._ends - above) / (1.0 + now - self._used)
        return worth
