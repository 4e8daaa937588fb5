"""A block: tokens that live caches read in one forward, of which perhaps only the first ones stay.

What is drafted is read before it is known to be right. Rows are cut then, a window is put back as it was,
and a recurrent layer goes on from the state that its hook captured inside the forward. Where no hook is,
the state before the block is kept, and what stays is read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..kinds.kind import Snapshot
from ..layout import Layout, leaves


class Block:
    """At least two `tokens`, read into `caches` that stood at `position`.

    `logits` are `(len(tokens), vocabulary)`. Until it is dropped it holds what going back takes:
    `Layout.block_bytes`. The caches stand behind the first `stands` tokens; `forwards` are the model's
    calls so far.
    """

    def __init__(
        self, layout: Layout, model: Any, caches: list[Any], position: int, tokens: Sequence[int]
    ):
        self.forwards = 0
        self._layout = layout
        self._model = model
        self._caches = caches
        self._position = position
        self.tokens = tokens
        self._marks = [
            kind.mark(cache) for kind, cache in zip(layout.kinds, leaves(caches), strict=True)
        ]
        self._captured: dict[int, list[Snapshot]] = {}
        self.logits = self._read()
        self.stands = len(tokens)

    def _read(self) -> mx.array:
        hook = self._layout.hook
        if hook is None:
            logits = self._forward(self.tokens)
        else:
            with hook.at(range(1, len(self.tokens))) as captured:
                logits = self._forward(self.tokens)
            self._captured = captured()
        mx.eval(logits, [cache.state for cache in self._caches], self._layout.lazy())
        return logits

    def _forward(self, tokens: Sequence[int]) -> mx.array:
        self.forwards += 1
        logits: mx.array = self._model(mx.array([*tokens])[None], cache=self._caches)[0]
        return logits

    def keep(self, count: int) -> None:
        """Make the caches stand behind the first `count` tokens, of as many as they stand behind now."""
        assert 0 < count <= self.stands
        if count < self.stands and self._layout.must_replay:
            self._go_back(0)
            self._forward(self.tokens[:count])
            self.stands = count
        self._go_back(count)
        self.stands = count
        self._layout.stand(self._caches, self._position + count)
        mx.eval([cache.state for cache in self._caches])

    def _go_back(self, count: int) -> None:
        pairs = zip(self._layout.kinds, leaves(self._caches), self._marks, strict=True)
        for index, (kind, cache, mark) in enumerate(pairs):
            states = self._captured.get(index, [])
            state = states[count - 1] if 0 < count <= len(states) else None
            kind.go_back(cache, mark, self.stands, count, state)
