"""Which of many is worth least now, although what each is worth changes with every request.

What something is worth falls as time passes, by the time since it was used and since something was
stored behind it, and depends on one number that is the same for all (`policy.Weights`). So no order lasts,
and to sort again and again costs as much as there is. Here numbers lie in columns, in blocks of `BLOCK`,
and of each block a floor is known: what the least of it will be worth at the end of a period, which is no
more than it is worth before. To find the least of all, the block of the lowest floor is reckoned, and then those
whose floors are lower than what was found there: mostly none. The answer is exact, of several alike the
earliest made.

While room is made, what is let go changes what is around it. What is worth less by that goes no sooner
in the same round: else the first conversation that lost its end would be taken to pieces at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from .policy import Weights

BLOCK = 256
"""Items that are reckoned at once."""

PERIOD = 2048
"""Floors are made anew after one tick for so many items: then they are seldom more than 1 % too low."""

DRIFT = 0.03
"""How far the number that is common to all may have moved, as a part of it, before they are made anew."""

Numbers = npt.NDArray[np.float64]

_AT_ONCE, _IN_PASSING, _AT_MOST, _USED, _PASSED, _SERIAL, _HELD = range(7)
_EMPTY = (math.inf, 0.0, 0.0, 0.0, 0.0, math.inf, -math.inf)


class Ranking:
    """Items by number, each with its weights, two ticks of the clock, and a serial number."""

    def __init__(self) -> None:
        self._table: Numbers = np.empty((7, 0))
        self._floors: Numbers = np.empty(0)
        self._free: list[int] = []
        self._put: dict[int, tuple[float, ...]] = {}
        self._new: set[int] = set()
        self._round: dict[int, None] | None = None  # items that were put since a round began
        # Floors hold up to this tick, and for these values of what is common to all.
        self._until = -1
        self._from_interior, self._to_interior = math.inf, -math.inf

    def add(self) -> int:
        """A number for one item more."""
        if not self._free:
            size = self._table.shape[1]
            more = max(BLOCK, size // (2 * BLOCK) * BLOCK)
            self._table = np.hstack([self._table, np.tile(np.array([_EMPTY]).T, more)])
            self._floors = np.append(self._floors, np.full(more // BLOCK, math.inf))
            self._free = list(range(size + more - 1, size - 1, -1))
        item = self._free.pop()
        self._new.add(item)
        return item

    def put(self, item: int, weights: Weights, used: int, passed: int, serial: float) -> None:
        """What is known of an item now."""
        self._put[item] = (*weights, used, passed, serial, -math.inf)

    def remove(self, item: int) -> None:
        """It is ranked no more; another one may get its number."""
        self._put[item] = _EMPTY
        self._free.append(item)
        self._new.add(item)

    def begin(self, clock: int, interior: float) -> None:
        """A round of letting things go begins."""
        if self._round:
            self._table[_HELD, [*self._round]] = -math.inf
        self._round = None
        self.settle(clock, interior)
        self._round = {}

    def held(self, item: int) -> float:
        """What an item counts for at least in this round, because it was worth that before."""
        return float(self._table[_HELD, item])

    def gone(self, worth: float, clock: int, interior: float) -> None:
        """What was worth so much goes: what counted for less was looked at, and counts for what it is now."""
        if self._round:
            items = [*self._round]
            table = self._table[:, items]
            now = np.maximum(table[_HELD], _worth(table, clock, interior))
            self._table[_HELD, items] = np.where(table[_HELD] < worth, now, table[_HELD])

    def least(
        self, clock: int, interior: float, hidden: Collection[int] = ()
    ) -> tuple[float, int] | None:
        """What the least is worth, and its number; None when there is none but `hidden` ones."""
        self.settle(clock, interior)
        if not self._floors.size:
            return None
        kept = self._table[:, [*hidden]]  # a copy
        self._table[_AT_ONCE, [*hidden]] = math.inf
        first = int(self._floors.argmin())
        found = self._least_of(np.array([first]), clock, interior)
        others = np.flatnonzero(self._floors <= found[0])
        others = others[others != first]
        if others.size:
            found = min(found, self._least_of(others, clock, interior))
        if len(hidden):
            self._table[:, [*hidden]] = kept
            self._lower([*hidden], kept)
        worth, _, item = found
        return (worth, item) if worth < math.inf else None

    def settle(self, clock: int, interior: float) -> None:
        """Write down what was put since the last look."""
        items, columns = [*self._put], np.array([*self._put.values()]).T
        if items:
            if self._round is not None:
                columns[_HELD] = self._before(items, clock, interior)
                self._round.update(dict.fromkeys(items))
            self._table[:, items] = columns
            self._put.clear()
            self._new.clear()
        if clock <= self._until and self._from_interior <= interior <= self._to_interior:
            if items:
                self._lower(items, columns)
        else:
            self._until = clock + self._table.shape[1] // PERIOD
            self._from_interior = interior * (1 - DRIFT)
            self._to_interior = interior * (1 + DRIFT)
            floors = _worth(self._table, self._until, self._from_interior)
            self._floors = floors.reshape(-1, BLOCK).min(axis=1)

    def _least_of(
        self, blocks: npt.NDArray[np.intp], clock: int, interior: float
    ) -> tuple[float, float, int]:
        """What the least of these blocks is worth, its serial number, its number. Puts floors right."""
        table = self._table.reshape(7, -1, BLOCK)[:, blocks]
        worth = np.maximum(_worth(table, clock, interior), table[_HELD])
        self._floors[blocks] = _worth(table, self._until, self._from_interior).min(axis=1)
        least = float(worth.min())
        alike = np.flatnonzero(worth == least)
        at = int(alike[table[_SERIAL].ravel()[alike].argmin()])
        serial = float(table[_SERIAL].ravel()[at])
        return least, serial, int(blocks[at // BLOCK]) * BLOCK + at % BLOCK

    def _before(self, items: list[int], clock: int, interior: float) -> Numbers:
        """What these counted for before they were put again; without bound below for new ones."""
        table = self._table[:, items]
        worth = np.where(np.isinf(table[_HELD]), _worth(table, clock, interior), table[_HELD])
        is_new = np.fromiter((item in self._new for item in items), bool, len(items))
        return np.where(is_new | np.isinf(worth), -math.inf, worth)

    def _lower(self, items: list[int], columns: Numbers) -> None:
        """Let the floors of their blocks not be higher than these."""
        worth = _worth(columns, self._until, self._from_interior)
        np.minimum.at(self._floors, np.array(items) // BLOCK, worth)


def _worth(table: npt.NDArray[Any], clock: int, interior: float) -> Numbers:
    """`Weights.worth` of every column."""
    passing = np.minimum(table[_AT_MOST], table[_IN_PASSING] * interior)
    worth: Numbers = table[_AT_ONCE] / (clock + 1 - table[_USED])
    worth += passing / (clock + 1 - table[_PASSED])
    return worth
