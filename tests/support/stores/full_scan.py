"""What goes first, read off the whole trees each time: slow, plain, and what `eviction` must agree with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from mlx_hybridcache.store.eviction.conversations import PASSED
from mlx_hybridcache.store.store import Store
from mlx_hybridcache.store.tree import Node
from stores.candidates import Candidate


@dataclass
class FullScan:
    """One look at all trees of a store, with the nodes that a request needs."""

    store: Store
    kept: frozenset[Node] = frozenset()
    spare: Node | None = None
    counted: dict[Node, float] = field(default_factory=dict)
    """What each counted for when it was looked at last: in one look never less than before."""

    def first(self) -> tuple[float, Node] | None:
        """What goes first with what it counts for; of several alike the one made first.

        What comes first by what it counted for is looked at, until one is worth no more than that.
        """
        trees = self.store._trees.values()
        around = {node: at for tree in trees for node, at in surroundings(tree.root).items()}
        may_go = [node for node in around if self.may_go(node)]
        for node in may_go:
            if node not in self.counted:
                self.counted[node] = self.worth(node, *around[node])
        while may_go:
            first = min(may_go, key=lambda node: (self.counted[node], node.serial))
            worth = self.worth(first, *around[first])
            if worth <= self.counted[first]:
                return self.counted[first], first
            self.counted[first] = worth
        return None

    def may_go(self, node: Node) -> bool:
        if node.pinned or node.soft_pin is not None or node is self.spare:
            return False
        if node.needs_checkpoint and node.checkpoint is not None:
            return True
        return not node.children and node not in self.kept

    def worth(self, node: Node, above: int, below: int, deepest: int) -> float:
        """What it is worth, from nothing but what stands around it in the tree."""
        store = self.store
        if node.needs_checkpoint and node.checkpoint is None:
            return -math.inf
        freed = node.checkpoint.nbytes if node.checkpoint is not None else 0
        freed += sum(dead.rows_nbytes for dead in self.dead_with(node))
        return Candidate(
            gap_tokens=node.end - (above if node.needs_checkpoint else node.start),
            below_tokens=below - node.end,
            to_end_tokens=deepest - node.end,
            freed_bytes=freed,
            age_ticks=store.clock - node.last_used,
            idle_ticks=store.clock - node.last_passed,
            returns=node.returns,
            goes_on=node in self.kept and not node.children,
            interior=store.branch_rate.interior,
        ).worth

    def dead_with(self, node: Node) -> list[Node]:
        if node.children or node in self.kept:
            return []
        dead = [node]
        above = node.parent
        while (
            node.needs_checkpoint
            and above.parent is not None
            and above.checkpoint is None
            and len(above.children) == 1
            and above not in self.kept
            and not above.pinned
        ):
            dead.append(above)
            above = above.parent
        return dead

    def fixed_bytes(self) -> int:
        """Bytes that would be left if everything went that may."""
        pinned = [node for node in self.store.nodes() if node.pinned]
        spared = [self.spare] if self.spare is not None else []
        stay = {above for node in (*self.kept, *pinned, *spared) for above in node.path()}
        states = {node for node in (*pinned, *spared) if node.checkpoint is not None}
        return sum(node.rows_nbytes for node in stay) + sum(
            node.checkpoint.nbytes for node in states
        )


def surroundings(root: Node) -> dict[Node, tuple[int, int, int]]:
    """Of every node below `root` the nearest checkpoint above, the farthest next one below, the deepest end."""
    above, below, deepest, next_below = {root: 0}, {}, {}, {}
    nodes = [*root.descendants()][1:]
    for node in nodes:
        parent = node.parent
        above[node] = above[parent] if parent.checkpoint is None else parent.end
    for node in reversed(nodes):
        children = [*(node.children or {}).values()]
        below[node] = max([node.end, *(next_below[child] for child in children)])
        deepest[node] = max([node.end, *(deepest[child] for child in children)])
        next_below[node] = node.end if node.checkpoint is not None else below[node]
    return {node: (above[node], below[node], deepest[node]) for node in nodes}


def conversations(store: Store) -> list[list[Node]]:
    """Of every stored conversation the nodes that only it needs, its leaf first."""
    return [
        own
        for own in (node.unshared() for node in store.nodes() if not node.children)
        if not own[0].needs_checkpoint or any(node.checkpoint is not None for node in own)
    ]


def surplus(store: Store, written: Node) -> Node | None:
    """The leaf of the conversation used longest ago, where there are more than may be."""
    every, most = conversations(store), store.limits.max_conversations
    if most is None or len(every) <= most:
        return None
    may_go = [own for own in every if not any(node.pinned or node is written for node in own)]
    may_go.sort(key=lambda own: (max(node.last_used for node in own), own[0].serial))
    soft = [own for own in may_go if any(node.soft_pin is not None for node in own)]
    plain = [own for own in may_go if own not in soft]
    before = may_go[: may_go.index(plain[0])] if plain else may_go
    if plain and len(before) < PASSED:
        return plain[0][0]
    return before[0][0] if before else None


def in_line(store: Store) -> list[Node]:
    """The nodes with a soft pin, whose time ends first before the others."""
    held = [node for node in store.nodes() if node.soft_pin is not None]
    return sorted(held, key=lambda node: (node.soft_pin.until, node.serial))


def kept_bytes(store: Store, pinned: list[Node]) -> int:
    """What these and all that leads to them weigh."""
    rows = {above for node in pinned for above in node.path()}
    states = [node.checkpoint.nbytes for node in pinned if node.checkpoint is not None]
    return sum(node.rows_nbytes for node in rows) + sum(states)


def check_values(store: Store) -> None:
    """Every number that is kept up to date is the one that looking at everything gives."""
    values: Any = store._values
    values.settle()
    nodes = [*store.nodes()]
    assert all(tree.root.children for tree in store._trees.values())
    assert values.nodes == len(nodes)
    assert values.tokens == sum(len(node.tokens) for node in nodes)
    assert values.checkpoints == sum(node.checkpoint is not None for node in nodes)
    assert values.conversations_stored() == len(conversations(store))
    assert set(values.pins.pinned) == {node for node in nodes if node.pinned}
    kept = {above for node in nodes if node.pinned for above in node.path()}
    assert set(values.pins.nodes) == kept
    assert values.pins.nbytes == FullScan(store).fixed_bytes()
    soft = in_line(store)
    assert set(values.soft.pinned) == set(soft)
    assert set(values.soft.nodes) == {above for node in soft for above in node.path()}
    assert values.soft.nbytes == kept_bytes(store, soft)
    assert values.soft.first() is (soft[0] if soft else None)
    ranked = set()
    for tree in store._trees.values():
        for node, (above, below, deepest) in surroundings(tree.root).items():
            standing = node.standing
            assert (standing.above, standing.below, node.deepest) == (above, below, deepest)
            if values.may_rank(node):
                ranked.add(standing.rank)
                assert values._ranked[standing.rank] is node
                assert standing.weights == values.weights(node)
            else:
                assert standing.rank is None
    assert set(values._ranked) == ranked
    bare = [node for node in nodes if not node.children and node.checkpoint is None]
    assert set(values.barren) == {node for node in bare if node.needs_checkpoint}
