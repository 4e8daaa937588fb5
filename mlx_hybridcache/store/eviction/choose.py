"""What may go, what goes with it, and what goes first, while a request needs some of it."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

from ..tree import AnyNode, Held
from .values import NodeValues, leaf_below


@dataclass(slots=True)
class Eviction:
    """One look at all trees, to make room.

    `kept` nodes keep their rows and `spare` its checkpoint, because a request needs them now. `clock` is
    the store's logical time, `interior` how likely resuming further back is (`BranchRate`).
    """

    values: NodeValues
    kept: frozenset[AnyNode]
    spare: AnyNode | None
    clock: int
    interior: float
    _counted: dict[AnyNode, float] | None = field(default=None, init=False)
    """What nodes that are worth something else in this look counted for last; None before the first."""

    _found: tuple[int, tuple[float, AnyNode] | None] = field(default=(-1, None), init=False)
    """What was found last, and as of which settling."""

    def fixed_bytes(self) -> int:
        """Bytes that would be left if everything went that may."""
        self.values.settle()
        pins, nbytes = self.values.pins.nodes, self.values.pins.nbytes
        nbytes += sum(node.rows_nbytes for node in self._leading_to_kept() if node not in pins)
        if self.spare is not None and self.spare.checkpoint is not None and not self.spare.pinned:
            nbytes += self.spare.checkpoint.nbytes
        return nbytes

    def fixed(self) -> Iterator[Held]:
        """Rows and checkpoints that would be left then."""
        self.values.settle()
        pins = self.values.pins
        for node in {*pins.nodes, *self._leading_to_kept()}:
            yield from node.rows
            if node.checkpoint is not None and (node is self.spare or node in pins.pinned):
                yield node.checkpoint

    def _leading_to_kept(self) -> Iterator[AnyNode]:
        """The kept nodes and `spare` with all above them, each once."""
        seen: set[AnyNode] = set()
        for node in (*self.kept, self.spare):
            above = node
            while above is not None and above.parent is not None and above not in seen:
                seen.add(above)
                yield above
                above = above.parent

    def first(self) -> AnyNode | None:
        """The node whose checkpoint (or, without checkpoints, which leaf) goes first.

        Where nothing is left but soft pins they are lifted, one after another, until something may go.
        """
        while (found := self._least()) is None and self.values.soft.lift_first():
            pass
        return found[1] if found is not None else None

    def least(self) -> float:
        """What the first to go is worth; without bound where nothing may."""
        found = self._least()
        return found[0] if found is not None else inf

    def first_of(self, nodes: Collection[AnyNode]) -> AnyNode:
        """The one of these nodes whose checkpoint goes first."""
        self.values.settle()
        return min(nodes, key=lambda node: (_held_until(node), self._worth(node)))

    def last_of(self, nodes: Collection[AnyNode]) -> AnyNode:
        """The one of these nodes whose checkpoint goes last."""
        self.values.settle()
        return max(nodes, key=lambda node: (_held_until(node), self._worth(node)))

    def worths(
        self, above: int, cuts: Sequence[int], end: int, branch_points: Container[int], nbytes: int
    ) -> list[float]:
        """What checkpoints of `nbytes` would be worth at each of these cuts of a slice.

        The slice ends at `end`, and `above` is the last checkpoint before it.
        """
        return [
            self.values.weigh(
                cut - up, down - cut, end - cut, nbytes, int(cut in branch_points), False
            ).worth(0, 0, self.interior)
            for up, cut, down in zip([above, *cuts[:-1]], cuts, [*cuts[1:], end], strict=True)
        ]

    def _least(self) -> tuple[float, AnyNode] | None:
        """What goes first with what it counts for, looked for again only where something changed."""
        self.values.settle()
        settlings, found = self._found
        if settlings != self.values.settlings:
            found = self._look()
            self._found = self.values.settlings, found
        return found

    def _look(self) -> tuple[float, AnyNode] | None:
        """Rows that nothing restores go first of all; then what is worth least, and was made first."""
        values, now = self.values, (self.clock, self.interior)
        if self._counted is None:
            values.ranking.begin(*now)
        else:
            values.ranking.settle(*now)
        otherwise = dict.fromkeys(self._worth_otherwise())
        own = self._count(node for node in otherwise if values.may_rank(node))
        dead = values.first_dead(self._may_go)
        if dead is not None:
            return -inf, dead
        found = values.least(*now, [*otherwise, *self._spared()])
        ranked = [(worth, node) for node, worth in own.items() if self._may_go(node)]
        ranked += [found] if found is not None else []
        least = min(ranked, key=lambda each: (each[0], each[1].serial), default=None)
        if least is not None:
            values.ranking.gone(least[0], *now)
        return least

    def _count(self, nodes: Iterable[AnyNode]) -> dict[AnyNode, float]:
        """What these count for: in one look never less than before (`ranking`)."""
        before, found = self._counted or {}, {}
        for node in nodes:
            worth = self._worth(node)
            if node not in before and self._counted is not None:
                before[node] = self.values.ranking.held(node.standing.rank)
            found[node] = max(worth, before.get(node, -inf))
        self._counted = before | found
        return found

    def _spared(self) -> Iterator[AnyNode]:
        if self.spare is not None:
            yield self.spare

    def _worth_otherwise(self) -> Iterator[AnyNode]:
        """Nodes that free less while the kept ones stay, or are about to be read on from."""
        for node in self.kept:
            children = node.children
            if node.parent is None:
                continue
            if not children:
                yield node
            elif len(children) == 1 and node.checkpoint is None:
                leaf = leaf_below(node)
                if leaf is not node:
                    yield leaf

    def _may_go(self, node: AnyNode) -> bool:
        if node.pinned or node.soft_pin is not None or node is self.spare:
            return False
        if node.needs_checkpoint and node.checkpoint is not None:
            return True
        return not node.children and node not in self.kept

    def _worth(self, node: AnyNode) -> float:
        weights = self.values.weights(node, self.kept)
        age, idle = self.clock - node.last_used, self.clock - node.last_passed
        return weights.worth(age, idle, self.interior)

    def dead_with(self, node: AnyNode) -> Iterator[AnyNode]:
        """The nodes whose rows nothing needs any more once `node` restores nothing, bottom up."""
        return self.values.dead_with(node, self.kept)

    def only_joins(self, node: AnyNode) -> bool:
        """Whether `node` is a boundary that nothing stands at and nothing branches from."""
        return self.values.only_joins(node, self.kept)


def _held_until(node: AnyNode) -> float:
    """When its soft pin ends; before all others where it has none."""
    return -inf if node.soft_pin is None else float(node.soft_pin.until)
