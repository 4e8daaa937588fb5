"""What may go, what goes with it, and what goes first: the policy's numbers, read off the trees."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .policy import Candidate
from .tree import Node, PrefixTree

Utility = Callable[[Candidate], float]
"""What a checkpoint is worth; the least goes first."""


@dataclass(slots=True)
class Eviction:
    """One look at all trees, to make room.

    `kept` nodes keep their rows and `spare` its checkpoint, because a request needs them now. With
    `needs_checkpoints`, checkpoints are what restores; without, any leaf may go. `clock` is the
    store's logical time.
    """

    trees: Collection[PrefixTree]
    kept: frozenset[Node]
    spare: Node | None
    needs_checkpoints: bool
    clock: int
    utility: Utility
    interior: float
    _ranked: list[tuple[float, int, Node]] | None = field(default=None, init=False)
    _order: Iterator[int] = field(default_factory=itertools.count, init=False)

    def fixed_bytes(self) -> int:
        """Bytes that would be left if everything went that may."""
        stay = {above for node in self.kept for above in node.path()} | pinned_nodes(self.trees)
        stay.update(self.spare.path() if self.spare is not None else ())
        return sum(node.rows_nbytes for node in stay) + sum(
            node.checkpoint.nbytes
            for node in stay
            if node.checkpoint is not None and (node.pinned or node is self.spare)
        )

    def first(self) -> Node | None:
        """The node whose checkpoint (or, without checkpoints, which leaf) goes first."""
        ranked = self._least()
        return ranked[2] if ranked is not None else None

    def least(self) -> float:
        """What the first to go is worth; without bound where nothing may."""
        ranked = self._least()
        return ranked[0] if ranked is not None else math.inf

    def is_leaf_now(self, node: Node) -> None:
        """What was below `node` has gone, so it may go next."""
        if self._ranked is not None and self._may_go(node):
            heapq.heappush(self._ranked, (self._worth(node), next(self._order), node))

    def first_of(self, nodes: Collection[Node]) -> Node:
        """The one of these nodes whose checkpoint goes first."""
        return min(nodes, key=self._worth)

    def _least(self) -> tuple[float, int, Node] | None:
        """The first of the ranking, which is made once and put right as far as is looked at.

        What is let go makes the checkpoints around it worth more, so a rank is too low at worst.
        """
        if self._ranked is None:
            self._ranked = list(self._ranking())
            heapq.heapify(self._ranked)
        while self._ranked:
            worth, order, node = self._ranked[0]
            if not self._may_go(node):
                heapq.heappop(self._ranked)
                continue
            now = self._worth(node)
            if now <= worth:
                return self._ranked[0]
            heapq.heapreplace(self._ranked, (now, order, node))
        return None

    def _ranking(self) -> Iterator[tuple[float, int, Node]]:
        for tree in self.trees:
            for node, around in _surroundings(tree).items():
                if self._may_go(node):
                    yield self._worth(node, around), next(self._order), node

    def _may_go(self, node: Node) -> bool:
        if node.parent is None or node.pinned or node is self.spare:
            return False
        if self.needs_checkpoints and node.checkpoint is not None:
            return True
        return not node.children and node not in self.kept

    def _worth(self, node: Node, around: _Surroundings | None = None) -> float:
        if self.needs_checkpoints and node.checkpoint is None:
            return -math.inf  # rows that nothing restores go first of all
        return self.utility(self._candidate(node, around or _around(node)))

    def conversations(self) -> list[list[Node]]:
        """Of every stored conversation the nodes that only it needs, its leaf first.

        A conversation is a leaf with what leads to it alone, so a prompt and its reply are one
        and every further branch, such as a regenerated reply, is one more.
        """
        leaves = (node for tree in self.trees for node in tree.nodes() if not node.children)
        return [
            own
            for own in map(Node.unshared, leaves)
            if not self.needs_checkpoints or any(node.checkpoint is not None for node in own)
        ]

    def surplus(self, most: int, written: Node) -> Node | None:
        """The leaf of the least recently used conversation, where there are more than `most`.

        The conversation of `written` stays, and so do those that a pin would keep in part.
        """
        every = self.conversations()
        if len(every) <= most:
            return None
        may_go = [own for own in every if not any(node.pinned or node is written for node in own)]
        oldest = min(may_go, key=lambda own: max(node.last_used for node in own), default=[None])
        return oldest[0]

    def _candidate(self, node: Node, around: _Surroundings) -> Candidate:
        freed = node.checkpoint.nbytes if node.checkpoint is not None else 0
        freed += sum(dead.rows_nbytes for dead in self.dead_with(node))
        return Candidate(
            # Where rows alone restore, only this node's own run would be read again.
            gap_tokens=node.end - (around.above if self.needs_checkpoints else node.start),
            below_tokens=around.below - node.end,
            to_end_tokens=around.deepest - node.end,
            freed_bytes=freed,
            age_ticks=self.clock - node.last_used,
            idle_ticks=self.clock - node.last_passed,
            returns=node.returns,
            goes_on=node in self.kept and not node.children,
            interior=self.interior,
        )

    def dead_with(self, node: Node) -> Iterator[Node]:
        """The nodes whose rows nothing needs any more once `node` restores nothing, bottom up."""
        if node.children or node in self.kept:
            return
        yield node
        above = node.parent
        while above is not None and self.only_joins(above):
            yield above
            above = above.parent

    def only_joins(self, node: Node) -> bool:
        """Whether `node` is a boundary that nothing stands at and nothing branches from."""
        return (
            self.needs_checkpoints
            and node.parent is not None
            and node.checkpoint is None
            and len(node.children or ()) == 1
            and node not in self.kept
            and not node.pinned
        )


def pinned_nodes(trees: Iterable[PrefixTree]) -> set[Node]:
    """Every node that a pin keeps: the pinned ones and their paths."""
    return {
        above for tree in trees for node in tree.nodes() if node.pinned for above in node.path()
    }


def crowded(paths: Iterable[Sequence[Node]], position: int, most: int) -> Iterator[list[Node]]:
    """Of each path with `most` checkpoints beside the one at `position`, those that may go for it.

    The path's last one stays, and so do pins.
    """
    for path in paths:
        others = [node for node in path if node.checkpoint is not None and node.end != position]
        if len(others) >= most:
            end = max(position, others[-1].end)
            yield [node for node in others if node.end < end and not node.pinned]


@dataclass(slots=True)
class _Surroundings:
    """Positions of the nearest checkpoint above a node, the farthest next one below, the deepest end."""

    above: int
    below: int
    deepest: int


def _surroundings(tree: PrefixTree) -> dict[Node, _Surroundings]:
    """Every node of `tree`, parents before children, with what stands around it."""
    found: dict[Node, _Surroundings] = {tree.root: _Surroundings(0, 0, 0)}
    for node in tree.nodes():
        parent = node.parent
        assert parent is not None
        above = found[parent].above if parent.checkpoint is None else parent.end
        found[node] = _Surroundings(above, node.end, node.end)
    for node, around in reversed(found.items()):
        if node.parent is not None:
            up = found[node.parent]
            next_below = around.below if node.checkpoint is None else node.end
            up.below, up.deepest = max(up.below, next_below), max(up.deepest, around.deepest)
    del found[tree.root]
    return found


def _around(node: Node) -> _Surroundings:
    """The same for one node of a tree that has changed since."""
    above = node.parent
    while above is not None and above.checkpoint is None:
        above = above.parent
    below = deepest = node.end
    stack = list((node.children or {}).values())
    while stack:
        under = stack.pop()
        deepest = max(deepest, under.end)
        if under.checkpoint is not None or not under.children:
            below = max(below, under.end)
            deepest = max(deepest, *(each.end for each in under.descendants()))
        else:
            stack.extend(under.children.values())
    return _Surroundings(above.end if above is not None else 0, below, deepest)
