"""The memory tier: prefix trees behind `match` and `save`, inside one budget that is never exceeded.

Bytes are claimed before they are allocated. Running requests and the store share the budget; what
does not fit makes room by letting the least useful checkpoints go (`policy`), and what still does
not fit is refused and said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from math import inf

from ..errors import BudgetError, NotStoredError
from ..tokens import Namespace, Tokens
from .budget import Claim, StoreStats
from .counted import CountedTrees, tokens_to
from .evicted import Evicted
from .eviction.choose import Eviction
from .eviction.limits import Limits
from .eviction.policy import NEAR_TOKENS, BranchRate, weights
from .eviction.soft_pins import renew
from .eviction.values import NodeValues, Weigh
from .lazy_rows import full_nbytes
from .match import Found
from .references import References
from .tree import AnyNode, Match, Node, R, S


class Store(CountedTrees[R, S]):
    """All namespaces' trees, their bytes and their recency. Used on the worker thread only.

    Rows and what stands at checkpoints are opaque here: they have a range, and a weight.

    Without `needs_checkpoints` rows restore at any position; of other settings `settle_needs` says whether they do.
    A save lets the least recently used conversations beyond `max_conversations` go, except pinned ones, and leaves at most
    `max_checkpoints` on any path from the root to a leaf.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        needs_checkpoints: bool,
        max_conversations: int | None = None,
        max_checkpoints: int | None = None,
        references: References | None = None,
        weigh: Weigh = weights,
    ):
        self.needs_checkpoints = needs_checkpoints
        self._needs: dict[str, bool] = {}
        self._values = NodeValues(weigh)
        self.limits = Limits(self._values, max_conversations, max_checkpoints)
        super().__init__(budget_bytes, references, self._values.noted)
        # What costs nobody anything, as far as so many bytes need it.
        self.before_evicting: Callable[[int], None] = lambda nbytes: None
        # What a request can do without, where all that is stored is not enough for another one.
        self.before_refusing: Callable[[], None] = lambda: None
        self.clock = 0
        self.seconds: Callable[[], float] = time.monotonic  # by which soft pins end
        self.branch_rate = BranchRate()
        self.evictions = 0
        self.taken_over = 0  # requests that went on in retained buffers
        self._refusals = 0
        self._evicted = Evicted()

    def needs(self, namespace: Namespace) -> bool:
        """As `CountedTrees.needs`."""
        return self._needs.get(namespace.settings, self.needs_checkpoints)

    def settle_needs(self, settings: str, *, needs_checkpoints: bool) -> None:
        """How what is stored with these settings is restored: of another model, before anything of it is."""
        self._needs[settings] = needs_checkpoints

    # Reading

    def find(
        self, namespace: Namespace, tokens: Tokens, known: Node[R, S] | None = None
    ) -> Found[R, S]:
        """The deepest place to resume `tokens`, at most one short of its end. Changes nothing."""
        match = self.match(namespace, tokens, known)
        limit = len(tokens) - 1
        if not self.needs(namespace):
            return Found(match, min(match.matched, limit), None)
        node = match.deepest_checkpoint(limit)
        return Found(match, node.end if node else 0, node)

    def was_evicted(self, namespace: Namespace, tokens: Tokens) -> bool:
        """Whether a beginning of `tokens` had a checkpoint that was let go."""
        return self._evicted.has_beginning_of(namespace, tokens)

    def stats(self) -> StoreStats:
        """Counts and bytes at this moment."""
        values, budget = self._values, self.budget
        values.lift(self.seconds(), budget.limit_bytes // 2)
        return StoreStats(
            budget_bytes=budget.limit_bytes,
            rows_bytes=budget.rows_bytes,
            snapshot_bytes=budget.snapshot_bytes,
            running_bytes=budget.running_bytes,
            lingering_bytes=budget.in_flight_bytes,
            retained_bytes=budget.retained_bytes,
            checkpoints=values.checkpoints,
            conversations=values.conversations_stored(),
            nodes=values.nodes,
            pinned=len(values.pins.pinned),
            soft_pinned=len(values.soft.pinned),
            soft_pinned_bytes=values.soft.nbytes,
            tokens=values.tokens,
            evictions=self.evictions,
            refusals=self._refusals,
            taken_over=self.taken_over,
        )

    def restoring(self) -> Iterator[tuple[Node[R, S], Namespace]]:
        """Every node that stands for itself: those with checkpoints, or every path's end."""
        for name, tree in self._trees.items():
            for node in tree.nodes():
                if node.checkpoint is not None if node.needs_checkpoint else not node.children:
                    yield node, name

    # Claiming

    def claim(self, nbytes: int, found: Found[R, S] | None = None) -> Claim:
        """Hold `nbytes` for a running request, letting go of anything but what `found` restores.

        Raises `BudgetError` when they do not fit.
        """
        keep, spare = (found.nodes(), found.node) if found is not None else ((), None)
        self.budget.make_room(nbytes, keep, spare)
        return self.budget.claim(nbytes)

    def claim_free(self, nbytes: int) -> Claim | None:
        """The same out of what is free: None where something stored would have to go for it."""
        if not self.budget.has_room(nbytes):
            self.before_evicting(nbytes)
        return self.budget.claim(nbytes) if self.budget.has_room(nbytes) else None

    def _evict(self, nbytes: int, keep: Iterable[AnyNode], spare: AnyNode | None) -> None:
        """Let go what running requests have too, then what is least useful, until `nbytes` more fit."""
        budget = self.budget
        self.before_evicting(nbytes)
        if budget.has_room(nbytes):
            return
        if nbytes + budget.running_bytes > budget.limit_bytes:
            self.before_refusing()
        eviction = self._eviction(keep, spare)
        if nbytes + budget.running_bytes > budget.limit_bytes:
            raise BudgetError(
                f"This needs {nbytes:,} bytes beside the {budget.running_bytes:,} of running "
                f"requests; the memory budget is {budget.limit_bytes:,}. Raise memory_budget, "
                "shorten the prompt or max_tokens, or wait for running requests to end.",
                fits_later=nbytes <= budget.limit_bytes,
            )
        fixed = budget.running_bytes + eviction.fixed_bytes()
        if nbytes + fixed > budget.limit_bytes:  # known before anything is let go for nothing
            raise BudgetError(
                f"{nbytes:,} bytes do not fit: {fixed:,} of {budget.limit_bytes:,} "
                "are held by running requests and pins. Raise memory_budget or unpin.",
                fits_later=nbytes + fixed - budget.running_bytes <= budget.limit_bytes,
            )
        lingering = self._lingering(eviction)
        is_enough = nbytes + fixed + lingering <= budget.limit_bytes  # if all goes that may
        while not budget.has_room(nbytes):
            node = eviction.first() if is_enough else None
            if node is None:
                raise BudgetError(
                    f"{nbytes:,} bytes do not fit before {lingering:,} that are being written to disk "
                    "are released. Try again, or raise memory_budget.",
                    fits_soon=not is_enough,
                )
            self._drop(node, eviction)

    def _lingering(self, eviction: Eviction) -> int:
        """Bytes that others would hold for a moment longer if everything went that may."""
        return self.references.lingering(self.budget.in_flight_bytes, eviction.fixed())

    def afford(
        self,
        namespace: Namespace,
        tokens: Tokens,
        cuts: Sequence[int],
        *,
        branch_points: Container[int],
        rows_nbytes: Callable[[int, int], int],
        snapshot_bytes: int,
        lasting: Container[int] = (),
        known: Node[R, S] | None = None,
    ) -> list[int]:
        """Of the cuts in the slice that ends with `tokens`, ascending, those that are worth their room.

        Room is made for them, for the slice's rows and for cutting what is stored. Unless it is `lasting` and will
        have a soft pin, a cut is left out rather than that something more useful goes for it.
        """
        budget, match, wanted = self.budget, self.match(namespace, tokens, known), [*cuts]
        rows = rows_nbytes(match.matched, len(tokens))
        # The states are there before the first is counted, so there must be room for this too.
        rows += self.split_nbytes(match, [*cuts, match.matched])
        if not budget.has_room(wish := rows + len(cuts) * snapshot_bytes):
            self.before_evicting(wish)
        eviction = self._eviction(match.nodes())
        left = budget.running_bytes + eviction.fixed_bytes() + self._lingering(eviction)
        if not cuts or left + rows + snapshot_bytes > budget.limit_bytes:
            return []
        above = max((n.end for n in match.path if n.checkpoint and n.end < cuts[0]), default=0)
        while not budget.has_room(rows + len(wanted) * snapshot_bytes):
            found = eviction.worths(above, wanted, len(tokens), branch_points, snapshot_bytes)
            worth, worst = min((inf if c in lasting else found[i], i) for i, c in enumerate(wanted))
            if len(wanted) > 1 and worth <= eviction.least():
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
        left = self.budget.stored_bytes - nbytes
        self.before_evicting(self.budget.limit_bytes)  # all of it
        eviction = self._eviction()
        while self.budget.stored_bytes > left and (node := eviction.first()):
            self._drop(node, eviction)

    # Changing

    def tick(self) -> None:
        """One request has come: the logical clock goes on."""
        self.clock += 1

    def use(self, found: Found[R, S]) -> None:
        """Refresh the recency of what was restored, and of nothing else."""
        self.branch_rate.saw(is_inside=found.is_inside)
        renew(
            (n for n in found.match.path if n.soft_pin and n.end <= found.position), self.seconds()
        )
        nodes = found.match.path[-1:] if found.node is None else (found.node,)
        for node in nodes:
            node.use(self.clock)
            if node.goes_beyond(node.end + NEAR_TOKENS):
                node.part()

    def save(
        self,
        namespace: Namespace,
        tokens: Tokens,
        rows_of: Callable[[int], R | None],
        checkpoint: S | None,
        *,
        rows_nbytes: Callable[[int, int], int],
        is_end: bool = False,
        is_branch_point: bool = False,
        known: Node[R, S] | None = None,
    ) -> Node[R, S] | None:
        """Store the rows of all of `tokens` and what stands at their end.

        `rows_of(start)` copies the rows of `[start, len(tokens))`, or says who has them, and is asked only
        for what the tree lacks; `rows_nbytes` is what the store will hold of those. The checkpoint's own bytes
        exist already; they and the rows are claimed before the copy is made. `is_branch_point`: prompts
        part ways here. Returns the node that ends there: None when they did not fit, when `rows_of` no longer
        has the rows, or when pins and ends fill a path to `max_checkpoints`, and nothing was added then.
        """
        match = self.match(namespace, tokens, known)
        at_end = match.last if match.matched == len(tokens) else None
        if at_end is not None and not match.inside and at_end.checkpoint is not None:
            at_end.use(self.clock, is_end=is_end)
            self._keep_limits(at_end)
            return at_end
        need = rows_nbytes(match.matched, len(tokens))
        need += self.split_nbytes(match, [match.matched])
        need += checkpoint.nbytes if checkpoint is not None else 0
        if self._has_room_for(need, match, len(tokens)):
            rows = rows_of(match.matched) if match.matched < len(tokens) else None
            if rows is not None or match.matched == len(tokens):
                node = self.extend(namespace, match, tokens, rows)
                node.use(self.clock, is_end=is_end)
                if checkpoint is not None:
                    self.stand(node, checkpoint, is_branch_point=is_branch_point)
                self._saved(namespace, node)
                return node
        self._refusals += 1
        return None

    def _has_room_for(self, nbytes: int, match: Match[R, S], position: int) -> bool:
        """Whether a save may add a checkpoint at `position`, with `nbytes` for which room is made."""
        if not self.limits.leave_room(match, position):
            return False
        try:
            self.budget.make_room(nbytes, match.nodes())
        except BudgetError:
            return False
        return True

    def _saved(self, namespace: Namespace, node: Node[R, S]) -> None:
        """What ends with `node` was stored."""
        for above in node.path():
            above.pass_by(self.clock)
            if above is not node and self._values.only_joins(above):  # kept while this was written
                self._trees[namespace].merge(above)
        self._keep_limits(node)

    def pin(self, namespace: Namespace, tokens: Tokens) -> int:
        """Keep what restores `tokens` whatever comes; returns the position that is kept.

        Where rows alone restore, the run is cut there, so that nothing behind it is kept. Raises
        `BudgetError` when pins would weigh more than half the budget, or the cut does not fit,
        `NotStoredError` when nothing of `tokens` is stored.
        """
        match = self.match(namespace, tokens)
        position = self._restorable(namespace, match, tokens)
        node = match.deepest_checkpoint(position) or self.cut(namespace, tokens, match)
        self._values.settle()
        path = {*self._values.pins.nodes, *node.path()}
        weight = sum(full_nbytes(x) for x in path) + sum(
            x.checkpoint.nbytes for x in path if x.checkpoint and (x.pinned or x is node)
        )
        if weight > self.budget.limit_bytes // 2:
            raise BudgetError(
                f"Pins would weigh {weight:,} bytes, more than half the budget of "
                f"{self.budget.limit_bytes:,}. Unpin something or raise memory_budget."
            )
        node.pin(is_pinned=True)
        return node.end

    def hold(
        self, namespace: Namespace, tokens: Tokens, lifetimes: Mapping[int, float]
    ) -> set[int]:
        """Keep what restores each of these positions for its seconds, as long as anything else may go.

        Each use begins its time anew. Returns the positions that are kept.
        """
        match, most = self.match(namespace, tokens), self.budget.limit_bytes // 2
        return self._values.hold(match, lifetimes, self.seconds(), most)

    def unpin(self, namespace: Namespace, tokens: Tokens) -> int:
        """Lift the last pin on the way to `tokens`; returns where it stood, or what restores them.

        Since it was set, more of `tokens` may have been stored.
        """
        match = self.match(namespace, tokens)
        position = self._restorable(namespace, match, tokens)
        for node in reversed(match.path):
            if node.pinned:
                node.pin(is_pinned=False)
                return node.end
        return position

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
        is_bare = above.checkpoint is None and not above.children
        if above.needs_checkpoint and above.parent is not None and is_bare:
            for gone in list(eviction.dead_with(above)):
                above = gone.parent
                self._remove(tree, gone)
        if above is not None and eviction.only_joins(above):
            tree.merge(above)

    def clear(self) -> None:
        """Forget everything that is stored."""
        super().clear()
        self._evicted.clear()

    def _restorable(self, namespace: Namespace, match: Match[R, S], tokens: Tokens) -> int:
        """How far `tokens` can be restored, all of them included. Raises `NotStoredError` for nowhere."""
        node = match.deepest_checkpoint(len(tokens))
        position = match.matched if not self.needs(namespace) else node.end if node else 0
        if not position:
            raise NotStoredError(
                "Nothing of this prompt is stored. To pin it, prefill or warm it first."
            )
        return position

    def _eviction(self, keep: Iterable[AnyNode] = (), spare: AnyNode | None = None) -> Eviction:
        self._values.lift(self.seconds(), self.budget.limit_bytes // 2)
        return Eviction(self._values, frozenset(keep), spare, self.clock, self.branch_rate.interior)

    def _keep_limits(self, written: Node[R, S]) -> None:
        """Let go what is one too many now that `written` is stored."""
        for may_go in self.limits.crowded(written):
            eviction = self._eviction()
            self._drop(eviction.first_of(may_go), eviction)
        while (leaf := self.limits.surplus(written)) is not None:
            self._drop(leaf, self._eviction())  # what is left of its conversation is next

    def most_useful(self, nodes: Iterable[Node[R, S]]) -> AnyNode | None:
        """The one of these nodes whose checkpoint goes last; None where none stands there."""
        restoring = [node for node in nodes if node.checkpoint is not None]
        return self._eviction(nodes).last_of(restoring) if restoring else None

    def evict_checkpoint(self, node: Node[R, S]) -> None:
        """What stands at `node` goes, because a request needs its bytes."""
        self.drop_checkpoint(node)
        self.evictions += 1

    def evict_rows(self, node: Node[R, S]) -> None:
        """The run of `node` and all below it goes, because a request needs its bytes."""
        self.forget(node, rows=True)
        self.evictions += 1

    def _drop(self, node: Node[R, S], eviction: Eviction) -> None:
        name, tree = self._trees.tree_of(node)
        dead = list(eviction.dead_with(node))
        if node.checkpoint is not None or not node.needs_checkpoint:
            self._evicted.add(name, tokens_to(node))
        last = dead[-1].parent if dead else node
        self.drop_checkpoint(node)
        for gone in dead:
            self._remove(tree, gone)
        if last is not None and eviction.only_joins(last):
            tree.merge(last)
        self.evictions += 1
