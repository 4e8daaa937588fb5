"""When the store lets its own rows go for a running request's, and when it copies those.

`lazy_rows` says what such rows are; this is who makes them, and when they end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Generic

from ..errors import BudgetError
from .budget import Claim
from .lazy_rows import LazyRows, LazySource, LazyStretch, lazy_stretches, rows_before
from .match import Found
from .store import Store
from .tree import Node, R, S

log = logging.getLogger("mlx_hybridcache")


class Materializer(Generic[R, S]):
    """All lazy rows of one store. `on_materialized` is called whenever rows have become the store's own."""

    def __init__(self, store: Store[R | LazyRows[R], S]):
        self.store = store
        self.on_materialized: Callable[[], None] = lambda: None
        self.let_retained_go: Callable[[int], object] = lambda nbytes: None
        """Retained buffers go, as far as so many bytes need it: they cost nobody more than time."""
        self._sources: list[LazySource[R]] = []
        store.before_evicting = self.free

    def claim_for(
        self,
        nbytes: int,
        found: Found[R | LazyRows[R], S],
        source: LazySource[R],
        *,
        spends_checkpoint: bool = False,
    ) -> tuple[Claim, list[R]]:
        """`claim` for a request that restores `found`, and the rows to restore it from.

        Where that would cost others, the rows move instead of being copied: the store has lazy ones
        from then on, the list is all that holds them, and whoever lets go of it array by array stays
        within the claim, which is larger by one array until it is shrunk. With `spends_checkpoint` the
        checkpoint goes as well, to whoever holds it already: better than to read all of it again.
        """
        budget = self.store.budget
        self.free(nbytes)
        if budget.has_room(nbytes):
            return self.store.claim(nbytes, found), rows_before(found.nodes(), found.position)
        own = [(node, rows) for node in found.nodes() for rows in _own_before(node, found.position)]
        # What others hold as well would not be freed.
        moving = [each for each in own if not self.store.references.is_held(each[1])]
        moved = sum(rows.nbytes for _, rows in moving)
        passing = source.passing_bytes(sum(rows.end - rows.start for _, rows in moving))
        spent = self._spent(found) if spends_checkpoint else None
        if spent is not None and spent.checkpoint is not None:
            moved += spent.checkpoint.nbytes
        try:
            budget.make_room(nbytes + passing - moved, found.nodes(), spare=found.node)
        except BudgetError as error:
            error.fits_soon |= len(moving) < len(own)
            raise
        moved_rows = rows_before(found.nodes(), found.position)
        if spent is not None:
            self.store.evict_checkpoint(spent)
        for node, rows in moving:
            self._let_go_for(node, rows, source)
        return budget.claim(nbytes + passing), moved_rows

    def _spent(self, found: Found[R | LazyRows[R], S]) -> Node[R | LazyRows[R], S]:
        """The node whose checkpoint goes to the request that restores it."""
        node = found.node
        if node is None or node.checkpoint is None or node.pinned:
            raise BudgetError("There is no checkpoint that may go.")
        if self.store.references.is_held(node.checkpoint):
            raise BudgetError("The checkpoint is being written.", fits_soon=True)
        return node

    def add(self, source: LazySource[R]) -> None:
        """A running request's caches hold rows: the store may leave its own there."""
        self._sources.append(source)

    def remove(self, source: LazySource[R]) -> None:
        """Nothing is left in its caches, nor will be."""
        self._sources.remove(source)

    def materialize(self, source: LazySource[R]) -> bool:
        """Copy what the store has left in `source`, whose caches keep theirs.

        False where there is no room for all of it. Nothing goes for this: it is not needed yet.
        """
        lazy = self._lazy_in(source)
        if not lazy:
            return True
        nbytes = _nbytes_of(lazy, source)
        self.let_retained_go(nbytes)
        if not self.store.budget.has_room(nbytes):
            return False
        self._put(lazy, source.copies(_pieces(lazy)))
        source.is_used = False
        self.on_materialized()
        return True

    def materialize_and_release(self, source: LazySource[R], claim: Claim) -> None:
        """A running request ends: what the store has left in its caches moves here, array by array.

        Where not even one array fits, the deepest rows are given up. `claim` pays for the caches and
        shrinks with them.
        """
        if source in self._sources:
            self._sources.remove(source)
        try:
            self._release(source, claim)
        finally:
            self.on_materialized()

    def _release(self, source: LazySource[R], claim: Claim) -> None:
        lazy = self._lazy_in(source)
        if lazy and not source.is_standing:  # it was never restored
            self._give_up(lazy)
            return
        if not lazy:
            source.let_go()
            return
        columns = source.columns()
        claim.shrink(sum(column.nbytes for column in columns))
        lazy = self._with_room(lazy, source, max(column.row_bytes for column in columns))
        ranges = _pieces(lazy)
        counted = 0
        try:
            for column in columns:
                held = column.nbytes
                column.materialize(ranges)
                copied = column.row_bytes * column.tokens_in(ranges)
                self.store.budget.keep(rows=copied)
                counted += copied
                claim.shrink(claim.nbytes - held)
            copies = source.materialized(ranges)
        except BaseException:
            self.store.budget.free(rows=counted)
            self._give_up(lazy)
            raise
        self._put(lazy, copies, counted)

    def _with_room(
        self, lazy: list[LazyStretch[R, S]], source: LazySource[R], row_bytes: int
    ) -> list[LazyStretch[R, S]]:
        """As many of the lazy rows as there is room for with so many bytes a token; the deepest go first.

        A checkpoint that they lead to stays, the most useful one or, where rows go, the deepest: without any they
        would be of no use.
        """
        nodes = [stretch.node for stretch in lazy]
        spare = self.store.most_useful(nodes)
        while nodes:
            try:
                self.store.budget.make_room(row_bytes * _tokens_in(lazy), nodes, spare)
                break
            except BudgetError:
                self.store.evict_rows(nodes[-1])
                lazy = self._lazy_in(source)
                nodes = [stretch.node for stretch in lazy]
                spare = next(
                    (each for each in reversed(nodes) if each.checkpoint is not None), None
                )
        return self._lazy_in(source)  # nodes may have been joined

    def _give_up(self, lazy: Sequence[LazyStretch[R, S]]) -> None:
        if lazy:
            tokens = _tokens_in(lazy)
            log.warning(
                "Let go of %d stored tokens: only the caches of a request that failed, or of drafts that made "
                "room, had them.",
                tokens,
            )
            self.store.forget(lazy[0].node, rows=True)

    def _lazy_in(self, source: LazySource[R]) -> list[LazyStretch[R, S]]:
        if not source.is_used:
            return []
        match = self.store.match(source.namespace, source.tokens, source.known)
        return lazy_stretches(match.nodes(), source)

    def _put(
        self, lazy: Sequence[LazyStretch[R, S]], copies: Sequence[R], counted: int = 0
    ) -> None:
        """The store owns `copies` in place of lazy rows; `counted` bytes of them it has counted already."""
        self.store.budget.keep(rows=sum(rows.nbytes for rows in copies) - counted)
        left = list(copies)
        for stretch in reversed(lazy):
            count = len(stretch.pieces())
            stretch.materialize(left[-count:])
            del left[-count:]

    def free(self, nbytes: int) -> None:
        """Let go of what costs nobody anything, as far as `nbytes` need it."""
        self.let_retained_go(nbytes)
        if not self.store.budget.has_room(nbytes):
            self.alias()

    def alias(self) -> None:
        """Let go of rows that a running request's caches hold as well.

        In the node where the tree parts ways with the request, rows behind that belong to other tokens.
        """
        for source in self._sources:
            match = self.store.match(source.namespace, source.tokens, source.known)
            for node in match.nodes():
                for rows in node.rows:
                    if isinstance(rows, LazyRows) or rows.end > match.matched:
                        continue
                    if source.has(rows):
                        self._let_go_for(node, rows, source)

    def _let_go_for(
        self, node: Node[R | LazyRows[R], S], rows: R | LazyRows[R], source: LazySource[R]
    ) -> None:
        self.store.replace_rows(node, rows, source.lazy_rows(rows.start, rows.end))


def _own_before(node: Node[R | LazyRows[R], S], position: int) -> list[R]:
    """Rows of a node that the store owns, and that end by then."""
    every = [rows for rows in node.rows if not isinstance(rows, LazyRows)]
    return [rows for rows in every if rows.end <= position]


def _tokens_in(lazy: Sequence[LazyStretch[R, S]]) -> int:
    return sum(stretch.tokens for stretch in lazy)


def _nbytes_of(lazy: Sequence[LazyStretch[R, S]], source: LazySource[R]) -> int:
    return sum(source.rows_nbytes(a, b) for a, b in _pieces(lazy))


def _pieces(lazy: Sequence[LazyStretch[R, S]]) -> list[tuple[int, int]]:
    return [piece for stretch in lazy for piece in stretch.pieces()]
