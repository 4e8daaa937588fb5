"""Lazy rows: the tree leaves rows where a running request has them, so that they are held once and not twice.

A running request's caches hold every row of its prompt. While it runs, the tree need not hold them too: a
node's rows may be `LazyRows`, which weigh nothing beside the request's own claim. When the request ends
they are materialized, which is to say copied to the store, one array after another, so that not even then two
copies exist. Rows that the store does own become an alias of a running request's when room is short; nothing
is lost by it, and it comes before anything is evicted. llama.cpp, which reads on in the slot itself, has
the same advantage; ollama's lazy snapshots are the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Generic, Protocol

from ..tokens import Namespace, Tokens
from .tree import AnyMatch, AnyNode, Node, R, S

Ranges = Sequence[tuple[int, int]]
"""Half-open intervals of positions, ascending."""

PIECE = 2048
"""Rows move to the store in pieces of at most so many tokens: to cut a piece in two takes its size again."""


@dataclass(frozen=True, slots=True)
class LazyRows(Generic[R]):
    """Rows of `[start, end)` that lie in a running request's caches."""

    start: int
    end: int
    source: LazySource[R]

    @property
    def nbytes(self) -> int:
        """None of its own: the request's claim pays for them."""
        return 0

    def view(self) -> R:
        """The rows where they lie: nobody may hold them when the request goes on."""
        return self.source.view(self.start, self.end)

    def split(self, position: int) -> tuple[LazyRows[R], LazyRows[R]]:
        """Two stretches of the same caches."""
        return (
            LazyRows(self.start, position, self.source),
            LazyRows(position, self.end, self.source),
        )


class Column(Protocol):
    """One array of a running request's rows, of one layer: it can be materialized by itself."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole buffer, its headroom included."""
        ...

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's part."""
        ...

    def tokens_in(self, ranges: Ranges) -> int:
        """Of how many tokens it has a part."""
        ...

    def materialize(self, ranges: Ranges) -> None:
        """Copy these rows, and let the buffer go."""
        ...


@dataclass(eq=False)
class LazySource(ABC, Generic[R]):
    """A running request's live caches, seen from the store.

    `tokens` lead to all that they hold; `row_bytes` is what one token weighs. `known` is the node of the
    tree to which `tokens` were last seen to lead, from where they are looked for again. Without `is_used`
    the store has left no rows here.
    """

    namespace: Namespace
    tokens: Tokens
    row_bytes: int
    known: AnyNode | None = field(default=None, init=False)
    is_used: bool = field(default=False, init=False)

    def saw(self, match: AnyMatch) -> None:
        """The tree was looked at for `tokens`, and this was found."""
        self.known = match.last

    def lazy_rows(self, start: int, end: int) -> LazyRows[R]:
        """Rows of `[start, end)` that the store leaves here."""
        self.is_used = True
        return LazyRows(start, end, self)

    def rows_nbytes(self, start: int, end: int) -> int:
        """Bytes of the rows of `[start, end)` once the store owns them."""
        return (end - start) * self.row_bytes

    @abstractmethod
    def has(self, rows: R) -> bool:
        """Whether the caches hold the very bits of these stored rows, so that the store need not.

        They do where one was copied from the other; the same tokens may have been read anew since.
        """

    @property
    @abstractmethod
    def is_standing(self) -> bool:
        """Whether the caches are there."""

    @abstractmethod
    def let_go(self) -> None:
        """Know the caches no more."""

    @abstractmethod
    def view(self, start: int, end: int) -> R:
        """The rows of `[start, end)` without a copy; whoever holds them makes the next forward copy all."""

    @abstractmethod
    def passing_bytes(self, tokens: int) -> int:
        """What is held twice for a moment when the rows of so many tokens move, or a checkpoint does."""

    @abstractmethod
    def copies(self, ranges: Ranges) -> list[R]:
        """Copies that own their bytes; the caches keep theirs."""

    @abstractmethod
    def columns(self) -> list[Column]:
        """The arrays of rows, to be materialized one by one. All else that the caches hold is let go."""

    @abstractmethod
    def materialized(self, ranges: Ranges) -> list[R]:
        """The copies that all columns made of `ranges`."""


@dataclass(frozen=True, slots=True)
class LazyStretch(Generic[R, S]):
    """Adjoining lazy rows in one node, `rows[first:last]` of it: positions `[start, end)`."""

    node: Node[R | LazyRows[R], S]
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

    def materialize(self, copies: Sequence[R]) -> None:
        """Put copies in their place that the store owns. Of one node's, the last stretch comes first."""
        rows = self.node.rows
        self.node.set_rows((*rows[: self.first], *copies, *rows[self.last :]))


def lazy_stretches(
    path: Sequence[Node[R | LazyRows[R], S]], source: LazySource[R]
) -> list[LazyStretch[R, S]]:
    """What the nodes of `path` have left in `source`, ascending."""
    return [stretch for node in path for stretch in _lazy_in(node, source)]


def _lazy_in(node: Node[R | LazyRows[R], S], source: LazySource[R]) -> Iterator[LazyStretch[R, S]]:
    first = None
    for index, rows in enumerate(node.rows):
        is_lazy = isinstance(rows, LazyRows) and rows.source is source
        if is_lazy and first is None:
            first = index
        elif not is_lazy and first is not None:
            yield LazyStretch(node, first, index)
            first = None
    if first is not None:
        yield LazyStretch(node, first, len(node.rows))


def has_lazy_rows(path: Sequence[AnyNode]) -> bool:
    """Whether some rows on the way lie in a running request's caches only."""
    return any(isinstance(rows, LazyRows) for node in path for rows in node.rows)


def rows_before(nodes: Sequence[Node[R | LazyRows[R], S]], position: int) -> list[R]:
    """The rows of `[0, position)` on a path, the last ones perhaps reaching beyond.

    Lazy ones are views, to be let go of before the request that has them goes on.
    """
    return [
        rows.view() if isinstance(rows, LazyRows) else rows
        for node in nodes
        for rows in node.rows
        if rows.start < position
    ]


def full_nbytes(node: AnyNode) -> int:
    """Bytes of the rows of a node once it owns them all."""
    return sum(
        rows.source.rows_nbytes(rows.start, rows.end) if isinstance(rows, LazyRows) else rows.nbytes
        for rows in node.rows
    )
