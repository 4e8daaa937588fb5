"""Which conversation was used longest ago, without looking at all of them.

A conversation is a leaf with what leads to it alone, so a prompt and its reply are one and every further
branch, such as a regenerated reply, is one more. It was used when anything of it was. Leaves wait in the
order of when they were used at least: whoever comes first is looked at, and waits again if it was used since.
"""

from __future__ import annotations

import heapq
import itertools

from ..tree import AnyNode

PASSED = 64
"""So many conversations with a soft pin are passed over in one look for one without."""

SPARE = 64
"""Leaves that are no longer any may wait beside as many as are."""


class Conversations:
    """The leaves of one store. Where checkpoints are needed, only those with one in what is theirs count."""

    def __init__(self) -> None:
        self._queue: list[tuple[int, float, int, AnyNode]] = []
        self._entries = itertools.count()  # of entries alike in all else none is compared further
        self._waiting: dict[AnyNode, int] = {}  # since when at least, by leaf

    def note(self, node: AnyNode) -> None:
        """Something changed here: if one leaf only is below, its conversation may have become another."""
        while node.children and len(node.children) == 1:
            (node,) = node.children.values()
        if not node.children and node.last_used < self._waiting.get(node, node.last_used + 1):
            self._wait(node, node.last_used)

    def stands(self, own: list[AnyNode]) -> bool:
        """Whether nodes that lead to one leaf alone are a conversation."""
        return not own[0].needs_checkpoint or any(node.checkpoint is not None for node in own)

    def oldest(self, written: AnyNode) -> AnyNode | None:
        """The leaf of the one used longest ago, except that of `written` and those with a pin.

        With a soft pin it is one only where no other is found before `PASSED` of them.
        """
        found: AnyNode | None = None
        soft: list[tuple[AnyNode, int]] = []
        passed_over: list[tuple[AnyNode, int]] = []
        while self._queue and found is None and len(soft) < PASSED:
            used, _, _, leaf = self._queue[0]
            own = leaf.unshared()
            latest = max(node.last_used for node in own)
            if self._waiting.get(leaf) != used:
                heapq.heappop(self._queue)
            elif leaf.parent is None or leaf.children or not self.stands(own):
                self._leave()
            elif latest > used:
                self._leave()
                self._wait(leaf, latest)
            elif any(node.pinned for node in own):
                self._leave()  # it is noted again when the pin is lifted
            elif any(node is written for node in own):
                self._leave()
                passed_over.append((leaf, used))
            elif any(node.soft_pin is not None for node in own):
                self._leave()
                soft.append((leaf, used))
            else:
                found = leaf
        for leaf, used in (*passed_over, *soft):
            self._wait(leaf, used)
        return soft[0][0] if found is None and soft else found

    def _wait(self, leaf: AnyNode, used: int) -> None:
        self._waiting[leaf] = used
        heapq.heappush(self._queue, (used, leaf.serial, next(self._entries), leaf))
        if len(self._queue) > 2 * len(self._waiting) + SPARE:
            self._tidy()

    def _leave(self) -> None:
        *_, leaf = heapq.heappop(self._queue)
        del self._waiting[leaf]

    def _tidy(self) -> None:
        """Forget leaves that are none any more."""
        self._waiting = {
            leaf: used
            for leaf, used in self._waiting.items()
            if leaf.parent is not None and not leaf.children
        }
        self._queue = [
            (used, leaf.serial, next(self._entries), leaf) for leaf, used in self._waiting.items()
        ]
        heapq.heapify(self._queue)
