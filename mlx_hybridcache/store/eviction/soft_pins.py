"""Soft pins: what is kept for a time, as long as anything else may go instead.

Nothing is refused for one. Together they weigh at most half the budget: beyond it the one whose time ends first
is lifted, and so it is where nothing else is left to go.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ..lazy_rows import full_nbytes
from ..tree import AnyMatch, AnyNode
from .pins import Pins

SPARE = 64
"""Pins that were lifted may wait in line beside as many as were not."""


class SoftPin(NamedTuple):
    """A time to live of so many seconds, which begins anew with each use, and when it ends as of now."""

    seconds: float
    until: float

    def again(self, now: float) -> SoftPin:
        """The same, begun now."""
        return SoftPin(self.seconds, now + self.seconds)


class SoftPins(Pins):
    """Those of one store, in the order in which their times end. `now` is in seconds of any clock."""

    def __init__(self) -> None:
        super().__init__(lambda node: node.soft_pin is not None)
        self._line: list[tuple[float, float, int, AnyNode]] = []
        self._entries = itertools.count()
        self._waiting: set[AnyNode] = set()

    def hold(self, node: AnyNode, seconds: float, now: float) -> None:
        """Keep what stands at `node` for `seconds` from now, if it is not kept for longer."""
        pin, had = SoftPin(seconds, now + seconds), node.soft_pin
        node.hold(pin if had is None or had.until < pin.until else had)
        if node not in self._waiting:
            self._wait(node)

    def first(self) -> AnyNode | None:
        """The one whose time ends first. Times only grow, so whoever is first in line is looked at."""
        while self._line:
            until, _, _, node = self._line[0]
            pin = node.soft_pin if node.parent is not None else None
            if pin is not None and pin.until == until:
                return node
            heapq.heappop(self._line)
            self._waiting.discard(node)
            if pin is not None:
                self._wait(node)
        return None

    def lift_first(self) -> bool:
        """Treat that one like everything else; whether there was one."""
        node = self.first()
        if node is not None:
            node.hold(None)
        return node is not None

    def expire(self, now: float) -> None:
        """Lift those whose time is over."""
        while (node := self.first()) is not None and node.soft_pin.until <= now:
            node.hold(None)

    def _wait(self, node: AnyNode) -> None:
        self._waiting.add(node)
        entry = (node.soft_pin.until, node.serial, next(self._entries), node)
        heapq.heappush(self._line, entry)
        if len(self._line) > 2 * len(self.pinned) + SPARE:
            self._tidy()

    def _tidy(self) -> None:
        """Forget nodes that have none any more."""
        left = [each for each in self._waiting if each.parent is not None and each.soft_pin]
        self._waiting = {*left}
        self._line = [
            (each.soft_pin.until, each.serial, next(self._entries), each) for each in left
        ]
        heapq.heapify(self._line)


def places(match: AnyMatch, lifetimes: Mapping[int, float]) -> Iterator[tuple[AnyNode, float]]:
    """The nodes that restore these positions of what matches, each with its seconds."""
    if not match.matched:
        return
    for position, seconds in lifetimes.items():
        node: AnyNode | None
        if match.nodes()[-1].needs_checkpoint:
            node = match.deepest_checkpoint(position)
        else:
            node = next((each for each in match.nodes() if each.end >= position), None)
        if node is not None:
            yield node, seconds


def weight(node: AnyNode) -> int:
    """What a pin of it alone keeps, in bytes."""
    held = node.checkpoint.nbytes if node.checkpoint is not None else 0
    return held + sum(full_nbytes(each) for each in node.path())


def renew(nodes: Iterable[AnyNode], now: float) -> None:
    """These were used: their times begin anew."""
    for node in nodes:
        node.hold(node.soft_pin.again(now))
