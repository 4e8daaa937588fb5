"""The memory tier: prefix trees behind `match` and `save`, inside one budget that is never exceeded.

Bytes are claimed before they are allocated. Running requests and the store share the budget; what
does not fit makes room by letting the least useful checkpoints go (`policy`), and what still does
not fit is refused and said.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import BudgetError, NotStoredError, SettingError
from ..tokens import Namespace, Tokens
from .budget import Budget, Claim, Holders, StoreStats
from .eviction.choose import Eviction, crowded
from .eviction.conversations import Conversations
from .eviction.policy import NEAR_TOKENS, Partings, weights
from .eviction.values import Census, Weigh
from .frozen import FrozenMap
from .lazy_rows import full_nbytes
from .match import Found
from .namespaces import Trees
from .outline import Outline
from .tree import Match, Node, PrefixTree, Rows

if TYPE_CHECKING:
    from ..caches.checkpoint import Checkpoint

log = logging.getLogger("mlx_hybridcache")

GHOSTS = 256
"""Evicted prefixes that are remembered by their digest, so that a report can say `evicted`."""


class Store(Budget):
    """All namespaces' trees, their bytes and their recency. Used on the worker thread only.

    Without `needs_checkpoints` rows restore at any multiple of `stride` tokens. A save lets the
    least recently used conversations beyond `max_conversations` go, except pinned ones, and leaves
    at most `max_checkpoints` on any path from the root to a leaf.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        needs_checkpoints: bool,
        stride: int = 1,
        max_conversations: int | None = None,
        max_checkpoints: int | None = None,
        holders: Holders | None = None,
        weigh: Weigh = weights,
    ):
        for name, most in (
            ("max_conversations", max_conversations),
            ("max_checkpoints", max_checkpoints),
        ):
            if most is not None and most < 1:
                raise SettingError(f"{name} is {most}; it must be >= 1, or None for no limit.")
        super().__init__(budget_bytes)
        self.needs_checkpoints = needs_checkpoints
        self.stride = stride
        self.max_conversations = max_conversations
        self.max_checkpoints = max_checkpoints
        self.holders = holders or Holders()
        conversations = Conversations(needs_checkpoints) if max_conversations is not None else None
        self._census = Census(needs_checkpoints, weigh, conversations)
        self._trees = Trees(self._census.noted)
        self.before_evicting: Callable[[], None] = lambda: (
            None
        )  # what costs nobody anything goes first
        self.clock = 0
        self.partings = Partings()
        self.evictions = 0
        self._refusals = 0
        self._ghosts: OrderedDict[tuple[Namespace, int, bytes], None] = OrderedDict()

    # Reading

    def find(self, namespace: Namespace, tokens: Tokens) -> Found:
        """The deepest place to resume `tokens`, at most one short of its end. Changes nothing."""
        match = self._match(namespace, tokens)
        limit = len(tokens) - 1
        if not self.needs_checkpoints:
            reach = min(match.matched, limit)
            return Found(match, reach - reach % self.stride, None)
        node = match.deepest_checkpoint(limit)
        return Found(match, node.end if node else 0, node)

    def known_elsewhere(self, namespace: Namespace, tokens: Tokens) -> int:
        """The longest match under other settings. Other salts are none of this request's business."""
        others = self._trees.others(namespace)
        return max((tree.match(tokens).matched for tree in others), default=0)

    def was_evicted(self, namespace: Namespace, tokens: Tokens) -> bool:
        """Whether a beginning of `tokens` had a checkpoint that was let go."""
        lengths = sorted({n for name, n, _ in self._ghosts if name == namespace})
        digest, read = hashlib.blake2b(digest_size=16), 0
        for length in lengths:
            if length > len(tokens):
                break
            digest.update(tokens[read:length].tobytes())
            read = length
            if (namespace, length, digest.copy().digest()) in self._ghosts:
                return True
        return False

    def stats(self) -> StoreStats:
        """Counts and bytes at this moment."""
        census = self._census
        census.settle()
        return StoreStats(
            budget_bytes=self.budget_bytes,
            rows_bytes=self.rows_bytes,
            snapshot_bytes=self.snapshot_bytes,
            running_bytes=self.running_bytes,
            lingering_bytes=self.lingering_bytes,
            checkpoints=census.checkpoints,
            conversations=census.conversations_stored(),
            nodes=census.nodes,
            pinned=len(census.pins.pinned),
            tokens=census.tokens,
            evictions=self.evictions,
            refusals=self._refusals,
        )

    def restoring(self) -> Iterator[tuple[Node, Namespace]]:
        """Every node that stands for itself: those with checkpoints, or every path's end."""
        for name, tree in self._trees.items():
            for node in tree.nodes():
                if node.checkpoint is not None if self.needs_checkpoints else not node.children:
                    yield node, name

    def checkpoints(self, namespace: Namespace) -> Iterator[tuple[Tokens, Node]]:
        """Every checkpoint with the tokens that lead to it."""
        tree = self._trees.get(namespace)
        for node in tree.nodes() if tree else ():
            if node.checkpoint is not None:
                yield _tokens_of(node), node

    # Claiming

    def claim(self, nbytes: int, found: Found | None = None) -> Claim:
        """Hold `nbytes` for a running request, letting go of anything but what `found` restores.

        Raises `BudgetError` when they do not fit.
        """
        if found is None:
            self.make_room(nbytes)
        else:
            self.make_room(nbytes, found.nodes(), spare=found.node)
        self.running_bytes += nbytes
        return Claim(self, nbytes)

    def claim_free(self, nbytes: int) -> Claim | None:
        """The same out of what is free: None where something stored would have to go for it."""
        if not self.has_room(nbytes):
            self.before_evicting()
        if not self.has_room(nbytes):
            return None
        self.running_bytes += nbytes
        return Claim(self, nbytes)

    def make_room(self, nbytes: int, keep: Iterable[Node] = (), spare: Node | None = None) -> None:
        """Until `nbytes` more fit, let go what running requests have too, then what is least useful.

        The rows of nodes in `keep` stay, and the checkpoint of `spare`. Raises `BudgetError` when
        they do not fit.
        """
        if not self.has_room(nbytes):
            self.before_evicting()
        if self.has_room(nbytes):
            return
        eviction = self._eviction(keep, spare)
        if nbytes + self.running_bytes > self.budget_bytes:
            raise BudgetError(
                f"This needs {nbytes:,} bytes beside the {self.running_bytes:,} of running requests; "
                f"the memory budget is {self.budget_bytes:,}. Raise memory_budget, shorten the "
                "prompt or max_tokens, or wait for running requests to end."
            )
        fixed = self.running_bytes + eviction.fixed_bytes()
        if nbytes + fixed > self.budget_bytes:  # known before anything is let go for nothing
            raise BudgetError(
                f"{nbytes:,} bytes do not fit: {fixed:,} of {self.budget_bytes:,} "
                "are held by running requests and pins. Raise memory_budget or unpin."
            )
        while not self.has_room(nbytes):
            node = eviction.first()
            if node is None:  # what was let go is held elsewhere for a moment longer
                raise BudgetError(
                    f"{nbytes:,} bytes do not fit before {self.lingering_bytes:,} that are being "
                    "written to disk are released. Try again, or raise memory_budget."
                )
            self._drop(node, eviction)

    def afford(
        self,
        namespace: Namespace,
        tokens: Tokens,
        cuts: Sequence[int],
        *,
        partings: Container[int],
        row_bytes: int,
        snapshot_bytes: int,
    ) -> list[int]:
        """Of the cuts in the slice that ends with `tokens`, ascending, those that are worth their room.

        Room is made for them, for the slice's rows and for cutting what is stored. A cut is left out
        rather than that something more useful goes for it; none is left where not even one fits.
        `partings` are where prompts part ways (`schedule.partings`).
        """
        match = self.find(namespace, tokens).match
        rows = (len(tokens) - match.matched) * row_bytes
        # The states are all there before the first is counted, so there must be room for this too.
        rows += self._split_nbytes(match, [*cuts, match.matched])
        if not self.has_room(rows + len(cuts) * snapshot_bytes):
            self.before_evicting()
        eviction = self._eviction(match.nodes())
        least = self.running_bytes + eviction.fixed_bytes() + rows + snapshot_bytes
        if not cuts or least > self.budget_bytes:
            return []
        above = max((n.end for n in match.path if n.checkpoint and n.end < cuts[0]), default=0)
        wanted = list(cuts)
        while not self.has_room(rows + len(wanted) * snapshot_bytes):
            worths = [
                self._census.weigh(
                    cut - up,
                    down - cut,
                    len(tokens) - cut,
                    snapshot_bytes,
                    int(cut in partings),
                    False,
                ).worth(0, 0, self.partings.interior)
                for up, cut, down in zip(
                    [above, *wanted[:-1]], wanted, [*wanted[1:], len(tokens)], strict=True
                )
            ]
            worst = min(range(len(wanted)), key=worths.__getitem__)
            if len(wanted) > 1 and worths[worst] <= eviction.least():
                del wanted[worst]
            elif (node := eviction.first()) is not None:
                self._drop(node, eviction)
            elif len(wanted) > 1:
                del wanted[worst]
            else:
                return []
        return wanted

    def shrink(self, nbytes: int) -> None:
        """Let `nbytes` of what is stored go, pins and running requests excepted, as far as that goes."""
        left = self.stored_bytes - nbytes
        self.before_evicting()
        eviction = self._eviction()
        while self.stored_bytes > left and (node := eviction.first()):
            self._drop(node, eviction)

    # Changing

    def tick(self) -> None:
        """One request has come: the logical clock goes on."""
        self.clock += 1

    def use(self, found: Found) -> None:
        """Refresh the recency of what was restored, and of nothing else."""
        self.partings.saw(is_inside=found.is_inside)
        nodes = found.match.path[-1:] if found.node is None else (found.node,)
        for node in nodes:
            node.last_used = self.clock
            node.returns += node.goes_beyond(node.end + NEAR_TOKENS)
            node.touch()

    def save(
        self,
        namespace: Namespace,
        tokens: Tokens,
        rows_of: Callable[[int], Rows | None],
        checkpoint: Checkpoint | None,
        *,
        row_bytes: int,
        is_end: bool = False,
        is_parting: bool = False,
    ) -> bool:
        """Store the rows of all of `tokens` and what stands at their end.

        `rows_of(start)` copies the rows of `[start, len(tokens))`, or says who has them, and is asked only
        for what the tree lacks; `row_bytes` is what the store will hold of each. The checkpoint's own bytes
        exist already; they and the rows are claimed before the copy is made. `is_parting` says that
        prompts part ways here. False when they did not fit, when `rows_of` no
        longer has the rows, or when pins and ends fill a path to `max_checkpoints`, and nothing was
        added then.
        """
        match = self._match(namespace, tokens)
        at_end = match.path[-1] if match.path and match.matched == len(tokens) else None
        if at_end is not None and not match.inside and at_end.checkpoint is not None:
            at_end.last_used, at_end.is_end = self.clock, at_end.is_end or is_end
            at_end.touch()
            self._keep_limits(at_end)
            return True
        if self._is_full(match, len(tokens)):
            self._refusals += 1
            return False
        need = (len(tokens) - match.matched) * row_bytes
        need += self._split_nbytes(match, [match.matched])
        need += checkpoint.nbytes if checkpoint is not None else 0
        try:
            self.make_room(need, match.nodes())
        except BudgetError:
            self._refusals += 1
            return False
        block = None
        if match.matched < len(tokens):
            block = rows_of(match.matched)
            if block is None:
                self._refusals += 1
                return False
        cut = match.inside.rows if match.inside is not None else ()
        tree = self._trees.planted(namespace)
        node = tree.extend(tokens, (block,) if block is not None else ())
        if match.inside is not None:
            self._settle_split(cut, match.inside)
        node.last_used, node.is_end = self.clock, node.is_end or is_end
        self.rows_bytes += block.nbytes if block is not None else 0
        if checkpoint is not None:
            node.checkpoint = checkpoint
            node.returns = int(is_parting)
            self.snapshot_bytes += checkpoint.nbytes
        node.touch()
        for above in node.path():
            above.pass_by(self.clock)
            if above is not node and self._census.only_joins(above):  # kept while this was written
                tree.merge(above)
        self._keep_limits(node)
        return True

    def pin(self, namespace: Namespace, tokens: Tokens) -> int:
        """Keep what restores `tokens` whatever comes; returns the position that is kept.

        Where rows alone restore, the run is cut there, so that nothing behind it is kept. Raises
        `BudgetError` when pins would weigh more than half the budget, or the cut does not fit,
        `NotStoredError` when nothing of `tokens` is stored.
        """
        match = self._match(namespace, tokens)
        position = self._restorable(match, tokens)
        node = match.deepest_checkpoint(position) or self._cut(namespace, tokens, match)
        self._census.settle()
        path = {*self._census.pins.nodes, *node.path()}
        weight = sum(full_nbytes(x) for x in path) + sum(
            x.checkpoint.nbytes for x in path if x.checkpoint and (x.pinned or x is node)
        )
        if weight > self.budget_bytes // 2:
            raise BudgetError(
                f"Pins would weigh {weight:,} bytes, more than half the budget of "
                f"{self.budget_bytes:,}. Unpin something or raise memory_budget."
            )
        node.pinned = True
        node.touch()
        return node.end

    def unpin(self, namespace: Namespace, tokens: Tokens) -> int:
        """Lift the last pin on the way to `tokens`; returns where it stood, or what restores them.

        Since it was set, more of `tokens` may have been stored.
        """
        match = self._match(namespace, tokens)
        position = self._restorable(match, tokens)
        for node in reversed(match.path):
            if node.pinned:
                node.pinned = False
                node.touch()
                return node.end
        return position

    def shared(self, namespace: Namespace, tokens: Tokens) -> tuple[int, int]:
        """Of `tokens`, how many are stored, and how many of those something else needs too.

        Something else is a run that parts ways with them before their end.
        """
        match = self._match(namespace, tokens)
        shared = match.matched if match.inside and match.matched < len(tokens) else 0
        for node in match.path:
            others = len(node.children or ()) - (match.matched > node.end)
            if others and node.end < len(tokens):
                shared = max(shared, node.end)
        return match.matched, shared

    def drop(self, namespace: Namespace, tokens: Tokens, start: int) -> None:
        """Forget the runs on the way to `tokens` that reach beyond `start`, and all below them.

        `start` is what others need of them (`shared`), in this store or elsewhere.
        """
        first = self._first_beyond(namespace, tokens, start)
        if first is None:
            return
        tree, above = self._trees[namespace], first.parent
        self.forget(first, rows=True)
        assert above is not None
        eviction = self._eviction()
        if self._restores_nothing(above):
            for gone in list(eviction.dead_with(above)):
                above = gone.parent
                self._remove(tree, gone)
        if above is not None and eviction.only_joins(above):
            tree.merge(above)

    def _restores_nothing(self, node: Node) -> bool:
        if node.parent is None or node.children or node.checkpoint is not None:
            return False
        return self.needs_checkpoints

    def pins(self, namespace: Namespace, tokens: Tokens, start: int) -> int:
        """How many pins `drop` would take with it."""
        first = self._first_beyond(namespace, tokens, start)
        return sum(node.pinned for node in first.descendants()) if first else 0

    def _first_beyond(self, namespace: Namespace, tokens: Tokens, start: int) -> Node | None:
        match = self._match(namespace, tokens)
        if match.matched <= start:
            return None
        return next(node for node in match.nodes() if node.end > start)

    def outlines(self, now: float | None) -> FrozenMap[Namespace, Outline]:
        """What any thread may look at, by namespace. `now` is the wall clock's seconds."""
        return self._trees.outlines(now)

    def clear(self) -> None:
        """Forget everything that is stored."""
        for tree in [*self._trees.values()]:
            for node in reversed(list(tree.nodes())):
                self._remove(tree, node)
        self._ghosts.clear()

    def nodes(self) -> Iterator[Node]:
        """Every node of every namespace, parents before children."""
        for tree in self._trees.values():
            yield from tree.nodes()

    def forget(self, node: Node, *, rows: bool) -> None:
        """What stands at `node` is of no use any more; with `rows`, neither is its run.

        Then all below it goes too, because nothing there can be restored.
        """
        if node.parent is None:
            return
        _, tree = self._trees.tree_of(node)
        self.let_checkpoint_go(node)
        if rows:
            for below in reversed(list(node.descendants())):
                self._remove(tree, below)

    def _match(self, namespace: Namespace, tokens: Tokens) -> Match:
        tree = self._trees.get(namespace)
        return tree.match(tokens) if tree else Match(0, (), None, contradicted=False)

    def _restorable(self, match: Match, tokens: Tokens) -> int:
        """How far `tokens` can be restored, all of them included. Raises `NotStoredError` for nowhere."""
        node = match.deepest_checkpoint(len(tokens))
        position = match.matched if not self.needs_checkpoints else node.end if node else 0
        if not position:
            raise NotStoredError("Nothing of this prompt is stored; prefill it first.")
        return position

    def _cut(self, namespace: Namespace, tokens: Tokens, match: Match) -> Node:
        """The node that ends where `tokens` and the tree part ways."""
        if match.inside is None:
            return match.path[-1]
        before = match.inside.rows
        self.make_room(self._split_nbytes(match, [match.matched]), match.nodes())
        node = self._trees[namespace].extend(tokens[: match.matched], ())
        self._settle_split(before, match.inside)
        return node

    def _eviction(self, keep: Iterable[Node] = (), spare: Node | None = None) -> Eviction:
        return Eviction(self._census, frozenset(keep), spare, self.clock, self.partings.interior)

    def _is_full(self, match: Match, position: int) -> bool:
        """Whether some path has no room for a checkpoint at `position`, and none that may go."""
        most = self.max_checkpoints
        return most is not None and not all(crowded(match.paths(position), position, most))

    def _keep_limits(self, written: Node) -> None:
        """Let go what is one too many now that `written` is stored."""
        if self.max_checkpoints is not None:
            paths = list(written.paths())
            for may_go in crowded(paths, written.end, self.max_checkpoints):
                eviction = self._eviction()
                self._drop(eviction.first_of(may_go), eviction)
        while (leaf := self._surplus(written)) is not None:
            self._drop(leaf, self._eviction())  # what is left of its conversation is next

    def _surplus(self, written: Node) -> Node | None:
        """The leaf of the least recently used conversation, where there are more than may be.

        The conversation of `written` stays, and so do those that a pin would keep in part.
        """
        most, conversations = self.max_conversations, self._census.conversations
        if most is None or conversations is None:
            return None
        self._census.settle()
        if self._census.conversations_stored() <= most:
            return None
        return conversations.oldest(written)

    def _drop(self, node: Node, eviction: Eviction) -> None:
        name, tree = self._trees.tree_of(node)
        dead = list(eviction.dead_with(node))
        if node.checkpoint is not None or not self.needs_checkpoints:
            self._remember(name, node)
        last = dead[-1].parent if dead else node
        self.let_checkpoint_go(node)
        for gone in dead:
            self._remove(tree, gone)
        if last is not None and eviction.only_joins(last):
            tree.merge(last)
        self.evictions += 1

    def let_checkpoint_go(self, node: Node) -> None:
        """What stands at `node` goes; its rows stay."""
        if node.checkpoint is not None:
            self.snapshot_bytes -= node.checkpoint.nbytes
            self.freed_bytes += node.checkpoint.nbytes
            self.lingering_bytes += self.holders.dropped(node.checkpoint)
            node.checkpoint = None
            node.touch()

    def _remove(self, tree: PrefixTree, leaf: Node) -> None:
        self.let_checkpoint_go(leaf)
        self.rows_bytes -= leaf.rows_nbytes
        self.freed_bytes += leaf.rows_nbytes
        self.lingering_bytes += sum(self.holders.dropped(rows) for rows in leaf.rows)
        tree.remove(leaf)
        self._trees.clear_away(tree)

    def _split_nbytes(self, match: Match, cuts: Sequence[int]) -> int:
        """Room that cutting what matches at each of `cuts`, one after another, takes for a moment."""
        return max(
            (
                self.holders.split_nbytes(rows)
                for node in match.nodes()
                for rows in node.rows
                if any(rows.start < cut < rows.end for cut in cuts)
            ),
            default=0,
        )

    def _settle_split(self, before: tuple[Rows, ...], lower: Node) -> None:
        """Tell of the rows that were replaced when a run was cut above `lower`."""
        assert lower.parent is not None
        after = {id(rows) for rows in (*lower.parent.rows, *lower.rows)}
        self.lingering_bytes += sum(
            self.holders.split(rows) for rows in before if id(rows) not in after
        )

    def _remember(self, name: Namespace, node: Node) -> None:
        tokens = _tokens_of(node)
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
        self._ghosts[(name, len(tokens), digest)] = None
        while len(self._ghosts) > GHOSTS:
            self._ghosts.popitem(last=False)


def _tokens_of(node: Node) -> Tokens:
    return np.concatenate([part.tokens for part in node.path()])
