"""What every node of all trees counts for, kept up to date by looking only at what changed.

What a checkpoint is worth depends on what stands around it: the nearest one above, the next ones below,
how deep its conversations reach. A change in one place moves these numbers along its own path, so
they are put right there and nowhere else: the trees note what changed (`tree.Noted`), and `settle` reads it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import cast

from ..tree import AnyMatch, AnyNode, Noted
from . import soft_pins
from .conversations import Conversations
from .pins import Pins
from .policy import Weights
from .ranking import Ranking
from .soft_pins import SoftPins

Weigh = Callable[[int, int, int, int, int, bool], Weights]
"""What a checkpoint is worth, from `policy.weights`' numbers; the least goes first."""

UNKNOWN = -1


@dataclass(eq=False, slots=True)
class Standing:
    """What is known of one node: positions of checkpoints around it, what it was counted as, its rank.

    `above` is the nearest checkpoint above it, `below` the farthest of the next ones below (or of ends),
    `for_above` what it is itself to those above, `for_below` to those below.
    """

    parent: AnyNode | None = None
    above: int = UNKNOWN
    below: int = UNKNOWN
    for_above: int = UNKNOWN
    for_below: int = UNKNOWN
    tokens: int = 0
    branches: int = 0
    has_checkpoint: bool = False
    is_end: bool = False
    rank: int | None = None
    weights: Weights | None = None


@dataclass(eq=False)
class NodeValues:
    """The nodes of one store. Where they need checkpoints, these are what restores; else any leaf may go.

    The counts are those of the last `settle`. `ends` are leaves that restore something.
    """

    weigh: Weigh
    conversations: Conversations | None = field(default=None, init=False)
    """Those of the same store, where somebody wants them in order."""
    noted: Noted = field(default_factory=Noted, init=False)
    ranking: Ranking = field(default_factory=Ranking, init=False)
    pins: Pins = field(default_factory=lambda: Pins(lambda node: node.pinned), init=False)
    soft: SoftPins = field(default_factory=SoftPins, init=False)
    settlings: int = field(default=0, init=False)
    nodes: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)
    checkpoints: int = field(default=0, init=False)
    ends: int = field(default=0, init=False)
    barren: dict[AnyNode, None] = field(default_factory=dict, init=False)
    """Leaves at which nothing stands though something must."""
    _ranked: dict[int, AnyNode] = field(default_factory=dict, init=False)
    _dead: list[tuple[float, int, AnyNode]] = field(default_factory=list, init=False)

    def settle(self) -> None:
        """Put right what has changed since the last time."""
        changed, passed = self.noted.changed, self.noted.passed
        if not changed and not passed:
            return
        self.noted.changed, self.noted.passed = {}, {}
        self.settlings += 1
        moved = dict.fromkeys(passed)
        if changed:
            self._settle(changed, moved)
        for node in moved:
            if node.standing is not None:
                self._rank(node)

    def _settle(self, changed: dict[AnyNode, None], moved: dict[AnyNode, None]) -> None:
        here = sorted((node for node in changed if node.parent is not None), key=_END)
        lost: dict[AnyNode, None] = {}
        for node in changed:
            if node.parent is None and node.standing is not None:
                self._leave(node, lost)
        for node in here:
            moved[node] = None
            if node.standing is None:
                node.standing = Standing()
                self.nodes += 1
            self._look_up(node, moved)
        self._look_down(here, lost, moved)
        for node in here:
            for top in self._count(node):
                moved[leaf_below(top)] = None  # what goes with it may have changed
                if self.conversations is not None:
                    self.conversations.note(top)
        self.soft.settle(changed)
        self.pins.settle(changed)

    def _leave(self, node: AnyNode, lost: dict[AnyNode, None]) -> None:
        """A node was taken out."""
        standing: Standing = node.standing
        _lose(standing.parent, standing.for_above, lost)
        self.nodes -= 1
        self.tokens -= standing.tokens
        self.checkpoints -= standing.has_checkpoint
        self.ends -= standing.is_end
        self.barren.pop(node, None)
        self._unrank(standing)
        node.standing = None

    def _count(self, node: AnyNode) -> Iterator[AnyNode]:
        """Count it as what it is now; below which nodes its change decides what goes with what."""
        standing: Standing = node.standing
        children, stands = node.children or {}, node.checkpoint is not None
        is_end = not children and (stands or not node.needs_checkpoint)
        self.tokens += len(node.tokens) - standing.tokens
        self.checkpoints += stands - standing.has_checkpoint
        self.ends += is_end - standing.is_end
        was, standing.branches = standing.branches, len(children)
        standing.tokens, standing.has_checkpoint = len(node.tokens), stands
        standing.is_end = is_end
        if children or is_end:
            self.barren.pop(node, None)
        elif node not in self.barren:
            self.barren[node] = None
            heapq.heappush(self._dead, (node.serial, id(node), node))
        if len(children) <= 1:
            yield node
        elif was <= 1:
            yield from children.values()

    def _look_up(self, node: AnyNode, moved: dict[AnyNode, None]) -> None:
        """The nearest checkpoint above it, and above those below for which that has become another."""
        waiting = [node]
        while waiting:
            each = waiting.pop()
            standing: Standing | None = each.standing
            if standing is None:
                continue  # it is new, and its turn will come
            above = _checkpoint_above(each)
            if above != standing.above:
                standing.above = above
                moved[each] = None
            for_below = each.end if each.checkpoint is not None else above
            if for_below != standing.for_below:
                standing.for_below = for_below
                waiting += (each.children or {}).values()

    def _look_down(
        self, here: Iterable[AnyNode], lost: dict[AnyNode, None], moved: dict[AnyNode, None]
    ) -> None:
        """The farthest of the next checkpoints below, from the deepest node that changed upwards.

        Of very many branches all are looked at only where the one is `lost` that reached farthest.
        """
        gained: dict[AnyNode, int] = {}
        waiting = [(-node.end, node.serial, node) for node in {**dict.fromkeys(here), **lost}]
        heapq.heapify(waiting)
        known = {node for _, _, node in waiting}

        def look_at(node: AnyNode | None) -> None:
            if node is not None and node not in known:
                known.add(node)
                heapq.heappush(waiting, (-node.end, node.serial, node))

        while waiting:
            _, _, node = heapq.heappop(waiting)
            above = node.parent
            if above is None:
                continue  # the root, or taken out meanwhile
            standing: Standing = node.standing
            below = _farthest(node, gained.get(node, node.end), is_less=node in lost)
            if below != standing.below:
                standing.below = below
                moved[node] = None
            was = standing.for_above
            is_next = node.checkpoint is not None or not node.children
            standing.for_above = node.end if is_next else below
            before, standing.parent = standing.parent, above
            if before is not above or standing.for_above < was:
                look_at(_lose(before, was, lost))
            elif standing.for_above == was:
                continue
            gained[above] = max(gained.get(above, above.end), standing.for_above)
            look_at(above)

    def conversations_stored(self) -> int:
        """Leaves with what leads to them alone, where anything stands in that."""
        return self.ends + sum(
            leaf.needs_checkpoint and any(each.checkpoint is not None for each in leaf.unshared())
            for leaf in self.barren
        )

    def hold(
        self, match: AnyMatch, lifetimes: Mapping[int, float], now: float, most_bytes: int
    ) -> set[int]:
        """Soft pins for what restores these positions; where they stand, unless one alone is too heavy."""
        held = set()
        for node, seconds in soft_pins.places(match, lifetimes):
            if soft_pins.weight(node) <= most_bytes:
                self.soft.hold(node, seconds, now)
                held.add(node.end)
        self.lift(now, most_bytes)
        return held

    def lift(self, now: float, most_bytes: int) -> None:
        """Soft pins go whose time is over, and those that weigh too much together."""
        self.soft.expire(now)
        self.settle()
        while self.soft.nbytes > most_bytes and self.soft.lift_first():
            self.settle()

    # What may go

    def may_rank(self, node: AnyNode) -> bool:
        """Whether it may go at all, and not first of all."""
        if node.pinned or node.soft_pin is not None:
            return False
        return node.checkpoint is not None if node.needs_checkpoint else not node.children

    def _rank(self, node: AnyNode) -> None:
        standing: Standing = node.standing
        if not self.may_rank(node):
            self._unrank(standing)
            return
        if standing.rank is None:
            standing.rank = self.ranking.add()
            self._ranked[standing.rank] = node
        standing.weights = self.weights(node)
        self.ranking.put(
            standing.rank, standing.weights, node.last_used, node.last_passed, node.serial
        )

    def _unrank(self, standing: Standing) -> None:
        if standing.rank is not None:
            self.ranking.remove(standing.rank)
            del self._ranked[standing.rank]
            standing.rank = None

    def weights(self, node: AnyNode, kept: Collection[AnyNode] = ()) -> Weights:
        """What it is worth while the rows of `kept` nodes stay, from what stands around it."""
        standing: Standing = node.standing
        freed = node.checkpoint.nbytes if node.checkpoint is not None else 0
        is_leaf = not node.children
        if is_leaf:
            freed += sum([dead.rows_nbytes for dead in self.dead_with(node, kept)])
        end = node.end
        return self.weigh(
            # Where rows alone restore, only this node's own run would be read again.
            end - (standing.above if node.needs_checkpoint else node.start),
            standing.below - end,
            node.deepest - end,
            freed,
            node.returns,
            is_leaf and node in kept,
        )

    def least(
        self, clock: int, interior: float, hidden: Iterable[AnyNode]
    ) -> tuple[float, AnyNode] | None:
        """What goes first of all that is worth something and not `hidden`, with what it is worth."""
        ranks = [node.standing.rank for node in hidden if node.standing is not None]
        found = self.ranking.least(clock, interior, [rank for rank in ranks if rank is not None])
        return None if found is None else (found[0], self._ranked[found[1]])

    def first_dead(self, may_go: Callable[[AnyNode], bool]) -> AnyNode | None:
        """Of the leaves whose rows restore nothing the one made first that may go."""
        passed_over: list[tuple[float, int, AnyNode]] = []
        found = None
        while self._dead and found is None:
            *_, node = self._dead[0]
            if node in self.barren and may_go(node):
                found = node
            elif node in self.barren:
                passed_over.append(heapq.heappop(self._dead))
            else:
                heapq.heappop(self._dead)
        for each in passed_over:
            heapq.heappush(self._dead, each)
        return found

    def dead_with(self, node: AnyNode, kept: Collection[AnyNode] = ()) -> Iterator[AnyNode]:
        """The nodes whose rows nothing needs any more once `node` restores nothing, bottom up."""
        if node.children or node in kept:
            return
        yield node
        above = node.parent
        while above is not None and self.only_joins(above, kept):
            yield above
            above = above.parent

    def only_joins(self, node: AnyNode, kept: Collection[AnyNode] = ()) -> bool:
        """Whether `node` is a boundary that nothing stands at and nothing branches from."""
        return (
            node.needs_checkpoint
            and node.parent is not None
            and node.checkpoint is None
            and len(node.children or ()) == 1
            and node not in kept
            and not node.pinned
        )


def leaf_below(node: AnyNode) -> AnyNode:
    """The leaf that `node` leads to, if to one only and no checkpoint stands on the way; or itself."""
    below = node
    while (children := below.children) and len(children) == 1:
        (below,) = children.values()
        if below.children and below.checkpoint is not None:
            return node
    return node if below.children else below


def _lose(above: AnyNode | None, reached: int, lost: dict[AnyNode, None]) -> AnyNode | None:
    """Something below `above` reaches no longer as far as it did; `above` if that was farthest."""
    if above is None or above.parent is None or reached < above.standing.below:
        return None
    lost[above] = None
    return above


def _checkpoint_above(node: AnyNode) -> int:
    above = cast("AnyNode", node.parent)
    if above.checkpoint is not None:
        return above.end
    return 0 if above.standing is None else cast("Standing", above.standing).above


def _farthest(node: AnyNode, gained: int, *, is_less: bool) -> int:
    """How far the next checkpoints below reach, of which those that changed reach to `gained`."""
    if not node.children:
        return node.end
    standing: Standing = node.standing
    if gained >= standing.below != UNKNOWN or not (is_less or standing.below == UNKNOWN):
        return max(gained, standing.below)
    farthest = node.end
    for child in node.children.values():
        farthest = max(farthest, child.standing.for_above)
        if farthest == standing.below:
            break  # nothing that did not change reaches farther
    return farthest


_END = attrgetter("end")
