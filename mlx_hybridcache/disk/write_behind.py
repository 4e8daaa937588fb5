"""Checkpoints that wait to be written, the most useful first, whatever their number."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable

from ..store.tree import Node
from ..tokens import Namespace


class Waiting:
    """Nodes of the memory tier with their namespaces. `is_there` says whether one is still of use.

    A node's place is found when it is added; one that was used meanwhile is added again by its request.
    """

    def __init__(self, is_there: Callable[[Node], bool], most: int):
        self._is_there = is_there
        self._most = self._limit = most
        self._names: dict[Node, Namespace] = {}
        self._heap: list[tuple[tuple[bool, int, int], int, Node]] = []
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._names)

    def add(self, node: Node, name: Namespace) -> None:
        """This one is due. Beyond the limit those go that memory has let go of."""
        self._names[node] = name
        usefulness = not node.is_end, -node.last_used, -node.end
        heapq.heappush(self._heap, (usefulness, next(self._order), node))
        if len(self._heap) > self._limit:
            self._names = {n: name for n, name in self._names.items() if self._is_there(n)}
            latest = {each[2]: each for each in self._heap if each[2] in self._names}
            self._heap = list(latest.values())
            heapq.heapify(self._heap)
            self._limit = max(self._most, 2 * len(self._heap))  # so that it is seldom

    def update(self, nodes: Iterable[tuple[Node, Namespace]]) -> None:
        """All of these are due."""
        for node, name in nodes:
            self.add(node, name)

    def pop(self) -> tuple[Node, Namespace] | None:
        """The most useful one, if memory still has it; None where it has not, or none is due."""
        while self._heap:
            _, _, node = heapq.heappop(self._heap)
            if (name := self._names.pop(node, None)) is not None:
                return (node, name) if self._is_there(node) else None
        return None

    def clear(self) -> None:
        """None is due."""
        self._names.clear()
        self._heap.clear()
