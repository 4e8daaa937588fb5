"""Which buffers are retained: the newest, as long as nobody needs their bytes."""

from __future__ import annotations

import mlx.core as mx

from ...store.budget import Budget
from ...tokens import Namespace, Tokens
from ..memory import MemoryFound
from .buffers import Retained

MOST = 4
"""Conversations that end one after another, of each of which the next turn may come."""


class BufferPool:
    """Retained buffers, the oldest first. Their bytes are counted as retained in `budget`."""

    def __init__(self, budget: Budget):
        self.most = MOST
        self._budget = budget
        self._retained: list[Retained] = []

    def __len__(self) -> int:
        return len(self._retained)

    def put(self, retained: Retained) -> None:
        """Hold these too; beyond the most the oldest go."""
        self._retained.append(retained)
        while len(self._retained) > self.most:
            self._drop(self._retained[0])

    def take(self, namespace: Namespace, tokens: Tokens, found: MemoryFound) -> Retained | None:
        """Those in which a request for `tokens` is resumed as `found` says, for whoever asks first.

        Those with most of it, and then with the least to lose. What a conversation has outgrown goes.
        Their bytes count as retained until they are resumed.
        """
        fit: list[tuple[int, int, Retained]] = []
        for each in [*self._retained]:
            alike = each.alike(namespace, tokens, found)
            if alike and len(tokens) > each.capacity:
                self._drop(each)
            elif alike:
                fit.append((alike, -len(each.tokens), each))
        if not fit:
            return None
        _, _, best = max(fit, key=lambda one: one[:2])
        self._retained.remove(best)
        return best

    def make_room(self, nbytes: int) -> None:
        """The oldest go until so many bytes more fit into the budget, or none are left."""
        while self._retained and not self._budget.has_room(nbytes):
            self._drop(self._retained[0])

    def free(self, nbytes: int) -> int:
        """The oldest go until so many bytes are free of them; returns how many are."""
        freed = 0
        while self._retained and freed < nbytes:
            freed += self._drop(self._retained[0])
        return freed

    def clear(self) -> None:
        """All go."""
        while self._retained:
            self._drop(self._retained[0])

    def close(self) -> None:
        """All go, and none are retained from now on."""
        self.most = 0
        self.clear()

    def _drop(self, retained: Retained) -> int:
        self._retained.remove(retained)
        retained.let_go()
        mx.clear_cache()
        self._budget.let_retained_go(retained.nbytes)
        return retained.nbytes
