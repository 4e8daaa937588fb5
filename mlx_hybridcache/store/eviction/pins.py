"""What pins keep: the pinned nodes, all that leads to them, and what that weighs."""

from __future__ import annotations

from collections.abc import Callable, Collection

from ..tree import AnyNode


class Pins:
    """`nodes` are kept with so many bytes each, `nbytes` in all: rows, and the checkpoints that are pinned.

    `is_pinned` says of a node that is there whether it is.
    """

    def __init__(self, is_pinned: Callable[[AnyNode], bool]) -> None:
        self._is_pinned = is_pinned
        self.pinned: dict[AnyNode, None] = {}
        self.nodes: dict[AnyNode, int] = {}
        self.nbytes = 0

    def settle(self, changed: Collection[AnyNode]) -> None:
        """These nodes have changed, came, or were taken out."""
        for node in changed:
            if node.parent is not None and self._is_pinned(node):
                self.pinned[node] = None
            else:
                self.pinned.pop(node, None)
            if node.parent is None:
                self.nbytes -= self.nodes.pop(node, 0)
        for node in changed:
            if node in self.pinned or node in self.nodes:
                self._keep(node)
        for node in changed:
            self._let_go(node)
            self._let_go(node.parent)

    def _keep(self, node: AnyNode) -> None:
        """Weigh a node again, and what leads to it where that is new."""
        above: AnyNode = node
        while above.parent is not None and (above is node or above not in self.nodes):
            weight = above.rows_nbytes
            if above in self.pinned and above.checkpoint is not None:
                weight += above.checkpoint.nbytes
            self.nbytes += weight - self.nodes.get(above, 0)
            self.nodes[above] = weight
            above = above.parent

    def _let_go(self, node: AnyNode | None) -> None:
        """Forget a node that leads to no pin any more, and those above it that led to this one alone."""
        while (
            node is not None
            and node in self.nodes
            and node not in self.pinned
            and not any(child in self.nodes for child in (node.children or {}).values())
        ):
            self.nbytes -= self.nodes.pop(node)
            node = node.parent
