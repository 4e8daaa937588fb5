"""A trail: single tokens that live caches read one after another, to any of which they can go back.

So a draft model reads its own drafts. A block (`block`) is the same for tokens that one forward reads.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..kinds.kind import Snapshot
from ..kinds.recurrent import RecurrentKind
from ..layout import Layout, leaves


def trail_bytes(layout: Layout, tokens: int) -> int:
    """Bytes beside the live caches' own while they may go back over so many single tokens."""
    return sum(kind.block_bytes(tokens) for kind in layout.kinds)


class Trail:
    """Begins where `caches` stand, at `position`. Until it is dropped it holds `trail_bytes`."""

    def __init__(self, layout: Layout, caches: list[Any], position: int):
        self._layout = layout
        self._caches = caches
        self._position = position
        self._marks = self._marked()
        self._states: list[list[Any]] = []

    def _marked(self) -> list[Any]:
        pairs = zip(self._layout.kinds, leaves(self._caches), strict=True)
        return [kind.mark(cache) for kind, cache in pairs]

    @property
    def stands(self) -> int:
        """Tokens that were read since it began."""
        return len(self._states)

    def step(self) -> None:
        """One more token was read. What a recurrent layer holds now is kept: it is never written to."""
        pairs = zip(self._layout.kinds, leaves(self._caches), strict=True)
        self._states.append(
            [kind.mark(cache) if isinstance(kind, RecurrentKind) else None for kind, cache in pairs]
        )

    def keep(self, count: int) -> None:
        """Make the caches stand behind the first `count` tokens."""
        assert 0 <= count <= self.stands
        if count < self.stands:
            states = self._states[count - 1] if count else [None] * len(self._marks)
            for kind, cache, mark, state in zip(
                self._layout.kinds, leaves(self._caches), self._marks, states, strict=True
            ):
                snapshot = None if state is None else Snapshot(tuple(state))
                kind.go_back(cache, mark, self.stands, count, snapshot)
            del self._states[count:]
        self._layout.stand(self._caches, self._position + count)
        mx.eval([cache.state for cache in self._caches])
