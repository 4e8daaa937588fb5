"""What varies between layers: which pasts their cache can return to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

Arrays = tuple[mx.array, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One layer's state at one position. Owns compact, evaluated arrays; None where a slot is empty."""

    arrays: tuple[mx.array | None, ...]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays if array is not None)


class LayerKind(Protocol):
    """How one layer's cache is taken apart and put together again.

    `row_bytes` is what one token adds to the rows, `snapshot_bytes` the most that a snapshot
    weighs, `running_bytes` what a live cache holds beside its rows. `needs_snapshot` is False where
    any position can be restored from rows alone. `sees_interior` says that a snapshot of a position
    inside the last slice can be taken after it; otherwise the replay pauses or a hook captures it.
    """

    @property
    def row_bytes(self) -> int: ...

    @property
    def snapshot_bytes(self) -> int: ...

    @property
    def running_bytes(self) -> int: ...

    @property
    def needs_snapshot(self) -> bool: ...

    @property
    def sees_interior(self) -> bool: ...

    def position(self, cache: Any) -> int | None:
        """Tokens that `cache` has read, None where it does not say."""
        ...

    def take_rows(self, cache: Any, start: int, end: int) -> Arrays | None:
        """Compact copies of the rows of `[start, end)`, not yet evaluated; empty without rows.

        None where the live cache no longer has them.
        """
        ...

    def snapshot(self, cache: Any, position: int) -> Snapshot | None:
        """A compact copy, not yet evaluated, of the state at `position`; None where none is needed."""
        ...

    def fill(
        self,
        cache: Any,
        rows: Sequence[Arrays],
        snapshot: Snapshot | None,
        position: int,
        capacity: int,
    ) -> None:
        """Make the fresh `cache` stand at `position`, with room for `capacity` tokens, unevaluated."""
        ...

    def grow(self, cache: Any, capacity: int) -> None:
        """Give a live `cache` room for `capacity` tokens."""
        ...
