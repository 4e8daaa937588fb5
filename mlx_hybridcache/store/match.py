"""Where a prompt can be restored, and from what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeAlias

from .eviction.policy import NEAR_TOKENS
from .tree import Match, Node, R, S


@dataclass(frozen=True, slots=True)
class Found(Generic[R, S]):
    """Where a prompt can be restored: `position` and what stands there, by the tree's own nodes."""

    match: Match[R, S]
    position: int
    node: Node[R, S] | None
    tier: str = "memory"

    def nodes(self) -> tuple[Node[R, S], ...]:
        """The nodes that agree with the prompt, wholly or in part."""
        return self.match.nodes()

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
    def checkpoint(self) -> S | None:
        """The state at `position`; None for models that rows alone restore."""
        return self.node.checkpoint if self.node is not None else None


AnyFound: TypeAlias = Found[Any, Any]
"""The same of either tier."""
