"""Where a prompt can be restored, and from what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from .eviction.policy import NEAR_TOKENS
from .lazy_rows import BorrowedRows
from .tree import Match, Node

if TYPE_CHECKING:
    from ..caches.checkpoint import Checkpoint
    from ..caches.kinds.rows import RowBlock


@dataclass(frozen=True, slots=True)
class Found:
    """Where a prompt can be restored: `position` and what stands there, by the tree's own nodes."""

    match: Match
    position: int
    node: Node | None
    tier: str = "memory"

    def nodes(self) -> tuple[Node, ...]:
        """The nodes that agree with the prompt, wholly or in part."""
        return self.match.nodes()

    def blocks(self) -> list[RowBlock]:
        """The rows of `[0, position)`, the last one perhaps reaching beyond.

        Those that lie in a running request's caches are views, to be let go of before it goes on.
        """
        return [
            # The tree knows rows by their protocol only.
            cast("RowBlock", rows.view() if isinstance(rows, BorrowedRows) else rows)
            for node in self.nodes()
            for rows in node.rows
            if rows.start < self.position
        ]

    @property
    def is_inside(self) -> bool:
        """Whether the prompt leaves what is stored inside it: by more than an ending it goes on there."""
        nodes = self.nodes()
        return bool(nodes) and nodes[-1].goes_beyond(self.match.matched + NEAR_TOKENS)

    def cut_tokens(self) -> int:
        """How many tokens are restored of a stretch of rows that goes on behind `position`."""
        return sum(
            self.position - rows.start
            for node in self.nodes()
            for rows in node.rows
            if rows.start < self.position < rows.end
        )

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The state at `position`; None for models that rows alone restore."""
        return cast("Checkpoint", self.node.checkpoint) if self.node is not None else None
