"""What may go, what goes with it, and what goes first: the policy's numbers, read off the trees."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from .policy import Candidate, least_useful
from .tree import Node, PrefixTree


@dataclass(frozen=True, slots=True)
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
        candidates: dict[Node, Candidate] = {}
        for tree in self.trees:
            for node, around in _surroundings(tree).items():
                is_free_leaf = not node.children and node not in self.kept
                if self.needs_checkpoints and is_free_leaf and node.checkpoint is None:
                    return node  # rows that nothing restores go first of all
                restores = node.checkpoint is not None if self.needs_checkpoints else is_free_leaf
                if restores and not node.pinned and node is not self.spare:
                    candidates[node] = self._candidate(node, around)
        return _least_useful(candidates) if candidates else None

    def first_of(self, nodes: Collection[Node]) -> Node:
        """The one of these nodes whose checkpoint goes first."""
        return _least_useful(
            {
                node: self._candidate(node, around)
                for tree in self.trees
                for node, around in _surroundings(tree).items()
                if node in nodes
            }
        )

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
        branches = len(node.children or ())
        return Candidate(
            gap_tokens=node.end - around.above,
            below_tokens=around.below - node.end,
            to_end_tokens=around.deepest - node.end,
            freed_bytes=freed,
            age_ticks=self.clock - node.last_used,
            is_anchor=branches > 1 or (node.is_end and branches == 0),
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


def _least_useful(candidates: dict[Node, Candidate]) -> Node:
    return list(candidates)[least_useful(list(candidates.values()))]


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
