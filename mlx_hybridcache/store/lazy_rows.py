"""Rows that the tree leaves where a running request has them, so that they are held once and not twice.

A running request's caches hold every row of its prompt. While it runs, the tree need not hold them too: a
node's rows may be `BorrowedRows`, which weigh nothing beside the request's own claim. When the request
ends they move to the store, one array after another, so that not even then two copies exist.
Rows that the store does own are let go for those of a running request when room is short; nothing
is lost by it, and it comes before anything is evicted. llama.cpp, which reads on in the slot itself, has
the same advantage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from ..tokens import Namespace, Tokens
from .tree import Node, Rows

Ranges = Sequence[tuple[int, int]]
"""Half-open intervals of positions, ascending."""

PIECE = 2048
"""Rows move to the store in pieces of at most so many tokens: to cut a piece in two takes its size again."""


@dataclass(frozen=True, slots=True)
class BorrowedRows:
    """Rows of `[start, end)` that lie in a running request's caches."""

    start: int
    end: int
    lender: Lender

    @property
    def nbytes(self) -> int:
        """None of its own: the request's claim pays for them."""
        return 0

    def view(self) -> Rows:
        """The rows where they lie: nobody may hold them when the request goes on."""
        return self.lender.view(self.start, self.end)

    def split(self, position: int) -> tuple[BorrowedRows, BorrowedRows]:
        """Two stretches of the same caches."""
        return (
            BorrowedRows(self.start, position, self.lender),
            BorrowedRows(position, self.end, self.lender),
        )


class Column(Protocol):
    """One array of a running request's rows, of one layer: it can be taken over by itself."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole buffer, its headroom included."""
        ...

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's part."""
        ...

    def surrender(self, ranges: Ranges) -> None:
        """Copy these rows, and let the buffer go."""
        ...


@dataclass(eq=False)
class Lender(ABC):
    """A running request's caches, seen from the store.

    `tokens` lead to all that they hold; `row_bytes` is what one token weighs. `alike` are the ranges
    in which they hold the very bits that the store has: what was copied from it, or to it.
    """

    namespace: Namespace
    tokens: Tokens
    row_bytes: int
    alike: list[tuple[int, int]] = field(default_factory=list, init=False)

    def has(self, rows: Rows) -> bool:
        """Whether the caches hold the same rows, so that the store need not."""
        return any(a <= rows.start and rows.end <= b for a, b in self.alike)

    @property
    @abstractmethod
    def is_standing(self) -> bool:
        """Whether the caches are there."""

    @abstractmethod
    def let_go(self) -> None:
        """Know the caches no more."""

    @abstractmethod
    def view(self, start: int, end: int) -> Rows:
        """The rows of `[start, end)` without a copy; whoever holds them makes the next forward copy all."""

    @abstractmethod
    def passing_bytes(self, tokens: int) -> int:
        """What is held twice for a moment when the rows of so many tokens move, or a checkpoint does."""

    @abstractmethod
    def copies(self, ranges: Ranges) -> list[Rows]:
        """Copies that own their bytes; the caches keep theirs."""

    @abstractmethod
    def columns(self) -> list[Column]:
        """The arrays of rows, for who takes them over. All else that the caches hold is let go."""

    @abstractmethod
    def surrendered(self, ranges: Ranges) -> list[Rows]:
        """The copies that all columns made of `ranges`."""


@dataclass(frozen=True, slots=True)
class Debt:
    """Adjoining borrowed rows in one node, `rows[first:last]` of it: positions `[start, end)`."""

    node: Node
    first: int
    last: int

    @property
    def tokens(self) -> int:
        return self.node.rows[self.last - 1].end - self.node.rows[self.first].start

    def pieces(self) -> list[tuple[int, int]]:
        """The same in ranges of at most `PIECE` tokens."""
        start, end = self.node.rows[self.first].start, self.node.rows[self.last - 1].end
        cuts = range((start // PIECE + 1) * PIECE, end, PIECE)
        return list(pairwise([start, *cuts, end]))

    def pay(self, owned: Sequence[Rows]) -> None:
        """Put rows in their place that the store owns. Debts of one node are paid from the last."""
        rows = self.node.rows
        self.node.rows = (*rows[: self.first], *owned, *rows[self.last :])
        self.node.note()  # it weighs more now


def debts(path: Sequence[Node], lender: Lender) -> list[Debt]:
    """What the nodes of `path` have borrowed from `lender`, ascending."""
    return [debt for node in path for debt in _debts_of(node, lender)]


def _debts_of(node: Node, lender: Lender) -> Iterator[Debt]:
    first = None
    for index, rows in enumerate(node.rows):
        is_borrowed = isinstance(rows, BorrowedRows) and rows.lender is lender
        if is_borrowed and first is None:
            first = index
        elif not is_borrowed and first is not None:
            yield Debt(node, first, index)
            first = None
    if first is not None:
        yield Debt(node, first, len(node.rows))


def is_borrowing(path: Sequence[Node]) -> bool:
    """Whether some rows on the way are nobody's but a running request's."""
    return any(isinstance(rows, BorrowedRows) for node in path for rows in node.rows)


def full_nbytes(node: Node) -> int:
    """Bytes of the rows of a node once it owns them all."""
    return sum(
        (rows.end - rows.start) * rows.lender.row_bytes
        if isinstance(rows, BorrowedRows)
        else rows.nbytes
        for rows in node.rows
    )
