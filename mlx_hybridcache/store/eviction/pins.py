"""What pins keep: the pinned nodes, all that leads to them, and what that weighs."""

from __future__ import annotations

from collections.abc import Iterable

from ..tree import AnyNode


class Pins:
    """`nodes` are kept with so many bytes each, `nbytes` in all: rows, and the checkpoints that are pinned."""

    def __init__(self) -> None:
        self.pinned: dict[AnyNode, None] = {}
        self.nodes: dict[AnyNode, int] = {}
        self.nbytes = 0

    def settle(self, changed: Iterable[AnyNode]) -> bool:
        """These nodes have changed, came, or were taken out. Whether a pin is no more."""
        is_less, kept = False, []
        for node in changed:
            is_pinned = node.pinned and node.parent is not None
            if not is_pinned and node in self.pinned:
                del self.pinned[node]
                is_less = True
            if is_pinned:
                self.pinned[node] = None
            if is_pinned or node in self.nodes:
                kept.append(node)
        if is_less:  # who else needs what led to it is found out by asking all
            self.nodes, self.nbytes, kept = {}, 0, [*self.pinned]
        for node in kept:
            self._keep(node)
        return is_less

    def _keep(self, node: AnyNode) -> None:
        """Weigh a node again, and what leads to it where that is new."""
        if node.parent is None:
            self.nbytes -= self.nodes.pop(node, 0)
            return
        above: AnyNode = node
        while above.parent is not None and (above is node or above not in self.nodes):
            weight = above.rows_nbytes
            if above.pinned and above.checkpoint is not None:
                weight += above.checkpoint.nbytes
            self.nbytes += weight - self.nodes.get(above, 0)
            self.nodes[above] = weight
            above = above.parent
