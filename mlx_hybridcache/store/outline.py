"""Outlines: what other threads may know of the trees, immutable, and made anew only where a node changed.

The worker leaves one behind with each of its summaries. Everything that did not change since is the same
object as before, so making one costs as much as what changed, and so does comparing two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from .frozen import FrozenMap
from .lazy_rows import full_nbytes
from .tree import AnyNode


def wall_clock() -> float:
    """Seconds, for people to read. The clock may be set back, so nothing is decided by it."""
    return time.time()


class Outline:
    """One node: a run of tokens at positions `[start, end)`. Holds no array of MLX.

    `checkpoint_bytes` is None where nothing stands at its end. `last_used` is the store's logical
    clock, `used_at` when that was, in seconds of the wall clock, None if before this process began;
    `soft_until` when its soft pin ends by the same clock, None without one.
    `children` are by their first token.
    """

    __slots__ = (
        "_below",
        "checkpoint_bytes",
        "children",
        "end",
        "is_pinned",
        "last_used",
        "rows_bytes",
        "soft_until",
        "start",
        "tokens",
        "used_at",
    )

    def __init__(self, node: AnyNode, used_at: Callable[[AnyNode], float | None]):
        old: Outline | None = node.outline
        self.start, self.end, self.tokens = node.start, node.end, node.tokens
        is_same = old is not None and (old.start, old.end) == (self.start, self.end)
        # Wherever its rows lie, their bytes depend on a run's ends only, and summing up takes a while.
        self.rows_bytes: int = old.rows_bytes if old and is_same else full_nbytes(node)
        self.checkpoint_bytes = None if node.checkpoint is None else node.checkpoint.nbytes
        self.is_pinned = node.pinned
        left = None if node.soft_pin is None else node.soft_pin.until - time.monotonic()
        self.soft_until = None if left is None else wall_clock() + left
        self.last_used = node.last_used
        self.used_at: float | None = (
            old.used_at if old and old.last_used == node.last_used else used_at(node)
        )
        self.children = _children(node, old)
        self._below: Below | None = None

    @property
    def below(self) -> Below:
        """What it and everything below it add up to. Reckoned once, by whoever asks first."""
        if self._below is None:
            _add_up(self)
        assert self._below is not None
        return self._below


NONE: FrozenMap[int, Outline] = FrozenMap()


def _children(node: AnyNode, old: Outline | None) -> FrozenMap[int, Outline]:
    """The outlines below a node, from the last one's; what was split off has its own end's no more."""
    children = node.children or {}
    if not children:
        return NONE
    is_one = len(children) == 1  # as most have, along a conversation
    if is_one or old is None or old.end != node.end or node.fresh is None:
        return FrozenMap({token: child.outline for token, child in children.items()})
    fresh = {token: children.get(token) for token in node.fresh}
    return old.children.differing(
        {token: None if child is None else child.outline for token, child in fresh.items()}
    )


@dataclass(frozen=True, slots=True)
class Below:
    """Sums over one node and all below it.

    `used` is the latest use: the wall clock's seconds, 0 if before this process, and the logical clock.
    """

    nbytes: int
    leaves: int
    used: tuple[float, int]


def _add_up(top: Outline) -> None:
    """Bottom up, without recursion: a path may have thousands of nodes."""
    waiting, order = [top], []
    while waiting:
        outline = waiting.pop()
        order.append(outline)
        waiting += [child for child in outline.children.values() if child._below is None]
    for outline in reversed(order):
        outline._below = _sum(outline)


def _sum(outline: Outline) -> Below:
    under = [child.below for child in outline.children.values()]
    own = outline.rows_bytes + (outline.checkpoint_bytes or 0)
    return Below(
        nbytes=own + sum([each.nbytes for each in under]),
        leaves=sum([each.leaves for each in under]) or 1,
        used=max([(outline.used_at or 0.0, outline.last_used), *[each.used for each in under]]),
    )


def outlined(root: AnyNode, used_at: Callable[[AnyNode], float | None]) -> Outline:
    """The outline of the tree below `root`. Visits what changed, on the worker.

    `used_at` tells when a node was used that has been used since the last time.
    """
    waiting = [root]
    while waiting:
        node = waiting[-1]
        if node.fresh is None:
            waiting.pop()
            continue
        children = node.children or {}
        below = [children.get(token) for token in node.fresh]
        first = [child for child in below if child is not None and child.fresh is not None]
        if first:
            waiting += first
            continue
        node.outline, node.fresh = Outline(node, used_at), None
        waiting.pop()
    outline: Outline = root.outline
    return outline
