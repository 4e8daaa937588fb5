"""How many conversations are stored at most, and how many checkpoints on the way to any position."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ...errors import SettingError
from ..tree import AnyMatch, AnyNode
from .conversations import Conversations
from .values import NodeValues


class Limits:
    """Of the store that `values` are of. None is no limit; raises `SettingError` for less than one."""

    def __init__(
        self, values: NodeValues, max_conversations: int | None, max_checkpoints: int | None
    ):
        for name, most in (
            ("max_conversations", max_conversations),
            ("max_checkpoints", max_checkpoints),
        ):
            if most is not None and most < 1:
                raise SettingError(f"{name} is {most}; it must be >= 1, or None for no limit.")
        self.max_conversations = max_conversations
        self.max_checkpoints = max_checkpoints
        self._values = values
        if max_conversations is not None:
            values.conversations = Conversations()

    def leave_room(self, match: AnyMatch, position: int) -> bool:
        """Whether every path has room for a checkpoint at `position`, or one that may go for it."""
        most = self.max_checkpoints
        return most is None or all(_crowded(match.paths(position), position, most))

    def crowded(self, written: AnyNode) -> Iterator[list[AnyNode]]:
        """Of each path with a checkpoint too many now that `written` is stored, those that may go.

        One goes before the next path is looked at.
        """
        if self.max_checkpoints is not None:
            yield from _crowded(list(written.paths()), written.end, self.max_checkpoints)

    def surplus(self, written: AnyNode) -> AnyNode | None:
        """The leaf of the least recently used conversation, where there are more than may be.

        The conversation of `written` stays, and so do those that a pin would keep in part.
        """
        most, conversations = self.max_conversations, self._values.conversations
        if most is None or conversations is None:
            return None
        self._values.settle()
        if self._values.conversations_stored() <= most:
            return None
        return conversations.oldest(written)


def _crowded(
    paths: Iterable[Sequence[AnyNode]], position: int, most: int
) -> Iterator[list[AnyNode]]:
    """Of each path with `most` checkpoints beside the one at `position`, those that may go for it.

    The path's last one stays, and so do pins.
    """
    for path in paths:
        others = [node for node in path if node.checkpoint is not None and node.end != position]
        if len(others) >= most:
            end = max(position, others[-1].end)
            yield [node for node in others if node.end < end and not node.pinned]
