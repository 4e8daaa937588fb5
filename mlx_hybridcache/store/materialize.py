"""What the store borrows from running requests: when it lets its own rows go for theirs, and takes them over.

`borrowing` says what a loan is; this is who makes them, and when they end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from ..caches.kinds.rows import RowBlock
from ..errors import BudgetError
from .budget import Claim
from .lazy_rows import (
    BorrowedRows,
    Debt,
    Lender,
    debts,
)
from .match import Found
from .store import Store
from .tree import Node, Rows

log = logging.getLogger("mlx_hybridcache")


class Loans:
    """All loans of one store. `on_owned` is called whenever rows have become the store's own."""

    def __init__(self, store: Store):
        self.store = store
        self.on_owned: Callable[[], None] = lambda: None
        self._lenders: list[Lender] = []
        store.before_evicting = self.lean

    def claim_for(
        self, nbytes: int, found: Found, lender: Lender, *, spends_checkpoint: bool = False
    ) -> tuple[Claim, list[RowBlock]]:
        """`claim` for a request that restores `found`, and the rows to restore it from.

        Where that would cost others, the rows move instead of being copied: the store borrows them
        from then on, the list is all that holds them, and whoever lets go of it array by array stays
        within the claim, which is larger by one array until it is shrunk. With `spends_checkpoint` the
        checkpoint goes as well, to whoever holds it already: better than to read all of it again.
        """
        if not self.store.has_room(nbytes):
            self.lean()
        if self.store.has_room(nbytes):
            return self.store.claim(nbytes, found), found.blocks()
        moving = [
            (holder, [rows for rows in holder.rows if self._may_move(rows, found.position)])
            for holder in found.nodes()
        ]
        moved = sum(rows.nbytes for _, every in moving for rows in every)
        passing = lender.passing_bytes(sum(r.end - r.start for _, every in moving for r in every))
        if spends_checkpoint:
            node = found.node
            if node is None or node.checkpoint is None or node.pinned:
                raise BudgetError("There is no checkpoint that may go.")
            if self.store.holders.is_held(node.checkpoint):
                raise BudgetError("The checkpoint is being written.")
            moved += node.checkpoint.nbytes
        self.store.make_room(nbytes + passing - moved, found.nodes(), spare=found.node)
        blocks = found.blocks()
        if spends_checkpoint and found.node is not None:
            self.store.let_checkpoint_go(found.node)
            self.store.evictions += 1
        for holder, every in moving:
            for rows in every:
                self._let_go_for(holder, rows, lender)
        self.store.running_bytes += nbytes + passing
        return Claim(self.store, nbytes + passing), blocks

    def lend(self, lender: Lender) -> None:
        """A running request's caches hold rows: the store may leave its own there."""
        self._lenders.append(lender)

    def lends_no_more(self, lender: Lender) -> None:
        """Nothing is borrowed from its caches, nor will be."""
        self._lenders.remove(lender)

    def own(self, lender: Lender) -> bool:
        """Copy what is borrowed from `lender`, whose caches keep theirs.

        False where there is no room for all of it. Nothing goes for this: it is not needed yet.
        """
        owed = self._debts(lender)
        need = _tokens_in(owed) * lender.row_bytes
        if not owed:
            return True
        if not self.store.has_room(need):
            return False
        ranges = _pieces(owed)
        self._pay(owed, lender.copies(ranges))
        lender.alike += ranges
        self.on_owned()
        return True

    def take_over(self, lender: Lender, claim: Claim) -> None:
        """A running request ends: what is borrowed from its caches moves here, array by array.

        Where not even one array fits, the deepest rows are given up. `claim` pays for the caches and
        shrinks with them.
        """
        if lender in self._lenders:
            self._lenders.remove(lender)
        try:
            self._take_over(lender, claim)
        finally:
            self.on_owned()

    def _take_over(self, lender: Lender, claim: Claim) -> None:
        owed = self._debts(lender)
        if owed and not lender.is_standing:  # it was never restored
            self._give_up(owed)
            return
        if not owed:
            lender.let_go()
            return
        columns = lender.columns()
        claim.shrink(sum(column.nbytes for column in columns))
        most = max(column.row_bytes for column in columns)
        while owed:
            try:
                self.store.make_room(most * _tokens_in(owed), [debt.node for debt in owed])
                break
            except BudgetError:
                self.store.forget(owed[-1].node, rows=True)
                self.store.evictions += 1
                owed = self._debts(lender)
        owed = self._debts(lender)  # nodes may have been joined
        ranges, tokens = _pieces(owed), _tokens_in(owed)
        made = 0
        try:
            for column in columns:
                held = column.nbytes
                column.surrender(ranges)
                made += column.row_bytes * tokens
                self.store.rows_bytes += column.row_bytes * tokens
                claim.shrink(claim.nbytes - held)
            owned = lender.surrendered(ranges)
        except BaseException:
            self.store.rows_bytes -= made
            self._give_up(owed)
            raise
        self.store.rows_bytes -= made
        self._pay(owed, owned)

    def _give_up(self, owed: Sequence[Debt]) -> None:
        tokens = _tokens_in(owed)
        log.warning("Let go of %d stored tokens that a failed request was holding.", tokens)
        self.store.forget(owed[0].node, rows=True)

    def _debts(self, lender: Lender) -> list[Debt]:
        return debts(self.store.find(lender.namespace, lender.tokens).nodes(), lender)

    def _pay(self, owed: Sequence[Debt], owned: Sequence[Rows]) -> None:
        self.store.rows_bytes += sum(rows.nbytes for rows in owned)
        left = list(owned)
        for debt in reversed(owed):
            count = len(debt.pieces())
            debt.pay(left[-count:])
            del left[-count:]

    def lean(self) -> None:
        """Let go of rows that a running request's caches hold as well."""
        for lender in self._lenders:
            for node in self.store.find(lender.namespace, lender.tokens).nodes():
                for rows in node.rows:
                    if not isinstance(rows, BorrowedRows) and lender.has(rows):
                        self._let_go_for(node, rows, lender)

    def _may_move(self, rows: Rows, position: int) -> bool:
        if isinstance(rows, BorrowedRows) or self.store.holders.is_held(rows):
            return False  # what others hold as well would not be freed
        return rows.end <= position

    def _let_go_for(self, node: Node, rows: Rows, lender: Lender) -> None:
        borrowed = BorrowedRows(rows.start, rows.end, lender)
        node.rows = tuple(borrowed if each is rows else each for each in node.rows)
        node.note()  # it weighs less now
        self.store.rows_bytes -= rows.nbytes
        self.store.freed_bytes += rows.nbytes
        self.store.lingering_bytes += self.store.holders.dropped(rows)


def _tokens_in(owed: Sequence[Debt]) -> int:
    return sum(debt.tokens for debt in owed)


def _pieces(owed: Sequence[Debt]) -> list[tuple[int, int]]:
    return [piece for debt in owed for piece in debt.pieces()]
