"""What may go, what goes with it, and what goes first: the policy's numbers, read off the trees."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
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
        nodes: list[Node] = []
        candidates: list[Candidate] = []
        for tree in self.trees:
            for node, around in _surroundings(tree).items():
                is_free_leaf = not node.children and node not in self.kept
                if self.needs_checkpoints and is_free_leaf and node.checkpoint is None:
                    return node  # rows that nothing restores go first of all
                restores = node.checkpoint is not None if self.needs_checkpoints else is_free_leaf
                if restores and not node.pinned and node is not self.spare:
                    nodes.append(node)
                    candidates.append(self._candidate(node, around))
        return nodes[least_useful(candidates)] if nodes else None

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
