"""Recurrent state: a running summary that cannot be rewound, valid at exactly one position."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .. import counting
from .kind import LayerKind, Parts, Snapshot
from .rows import compact


@dataclass(frozen=True, slots=True)
class RecurrentKind(LayerKind):
    """A fixed set of arrays: for Gated-DeltaNet the convolution's last taps and the state.

    They are kept in the dtype the model computed them in: rounding a float32 state to bfloat16
    changes greedy replies (SGLang issue 33515).
    """

    state_nbytes: int
    is_counted: bool = False  # what the model reads into such caches is (`counting`)

    needs_snapshot = True
    sees_interior = False
    stores_small = "state"

    @classmethod
    def seen(cls, cache: Any) -> RecurrentKind:
        """From a cache that has read a few tokens."""
        return cls(sum(x.nbytes for x in _slots(cache) if x is not None))

    def counted(self) -> RecurrentKind:
        return replace(self, is_counted=True)

    @property
    def snapshot_bytes(self) -> int:
        return self.state_nbytes

    @property
    def running_bytes(self) -> int:
        return self.state_nbytes

    def position(self, cache: Any) -> int | None:
        return counting.tokens_read(cache) if self.is_counted else None

    def stand(self, cache: Any, position: int) -> None:
        if self.is_counted:
            counting.note(cache, position)

    def block_bytes(self, tokens: int) -> int:
        return tokens * self.state_nbytes

    def mark(self, cache: Any) -> list[Any]:
        return _slots(cache)

    def go_back(
        self, cache: Any, mark: Any, stands: int, count: int, snapshot: Snapshot | None = None
    ) -> None:
        if count < stands:
            assert snapshot is not None or count == 0, "nobody kept the state there"
            cache.state = ([*(mark if snapshot is None else snapshot.arrays)], None, None)

    def snapshot(self, cache: Any, position: int) -> Snapshot:
        return Snapshot(tuple(None if x is None else compact(x) for x in _slots(cache)))

    def let_state_go(self, cache: Any) -> None:
        cache.state = ([None] * len(_slots(cache)), None, None)
        counting.forget(cache)

    def fill(
        self,
        cache: Any,
        rows: Parts,
        snapshot: Snapshot | None,
        position: int,
        capacity: int,
    ) -> None:
        if snapshot is not None:
            # Copies, because an in-place update of a shared array would reach the stored one.
            arrays = [None if x is None else compact(x) for x in snapshot.arrays]
            cache.state = (arrays, None, None)
            self.stand(cache, position)


def _slots(cache: Any) -> list[Any]:
    arrays, left_padding, lengths = cache.state
    if left_padding is not None or lengths is not None:
        raise ValueError("a padded batch's state belongs to no single sequence")
    return list(arrays)
