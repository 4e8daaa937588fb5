"""What varies between layers: which pasts their cache can return to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import mlx.core as mx

if TYPE_CHECKING:
    from .rows import Span

Arrays = tuple[mx.array, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One layer's state at one position. Owns compact, evaluated arrays; None where a slot is empty."""

    arrays: tuple[mx.array | None, ...]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays if array is not None)


@dataclass(slots=True)
class Parts:
    """One layer's stored rows, in order: `every[i]` are the arrays of one stretch, keys and values.

    `is_spent` says that nobody else holds them: who has copied an array lets it go, before the next.
    """

    every: list[list[mx.array]]
    is_spent: bool = False

    def take(self, which: int) -> list[mx.array]:
        """Array number `which` of each stretch; a second time only where others hold them too."""
        found = [arrays[which] for arrays in self.every]
        if self.is_spent:
            for arrays in self.every:
                arrays[which] = mx.array(0)
        return found


class LayerKind:
    """How one layer's cache is taken apart and put together again.

    What stands here is a layer that keeps nothing; each kind says in which respects it differs.
    """

    __slots__ = ()

    needs_snapshot: ClassVar[bool] = False
    """False where rows alone restore any position."""

    sees_interior: ClassVar[bool] = True
    """Whether a snapshot inside the last slice can be taken after it. Otherwise the replay pauses
    there, or a hook captures it."""

    stores_small: ClassVar[Literal["rows", "state"] | None] = None
    """What a smaller store makes small of this layer (`smaller`)."""

    goes_back_in_blocks: ClassVar[bool] = True
    """Whether tokens of a block can be taken back, for bytes that are known (`block_bytes`)."""

    goes_back: ClassVar[bool] = False
    """Whether mlx-lm can take the last tokens back out of the live cache, however many it has read."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """Of each array of rows, which positions have some; empty where each position has one in every array."""
        return ()

    @property
    def row_bytes(self) -> int:
        """Bytes that one token adds to the stored rows."""
        return 0

    def rows_nbytes(self, start: int, end: int) -> int:
        """Bytes of the stored rows of `[start, end)`, where not all of them weigh `row_bytes`."""
        return (end - start) * self.row_bytes

    def buffer_nbytes(self, capacity: int) -> int:
        """Bytes of a live cache's buffers with room for `capacity` tokens."""
        return capacity * self.row_bytes

    @property
    def array_bytes(self) -> int:
        """Bytes that one token adds to the largest of its arrays."""
        return 0

    @property
    def snapshot_bytes(self) -> int:
        """The most bytes that a snapshot weighs."""
        return 0

    @property
    def running_bytes(self) -> int:
        """Bytes that a live cache holds beside the rows it has room for."""
        return 0

    def position(self, cache: Any) -> int | None:
        """Tokens that `cache` has read, None where it does not say."""
        return None

    def counted(self) -> LayerKind:
        """The same for a model in which no layer knows its position, so that its forwards are counted."""
        return self

    def stand(self, cache: Any, position: int) -> None:
        """What `cache` holds is known to be the state at `position`; layers that know do not ask."""

    def block_bytes(self, tokens: int) -> int:
        """Bytes that it takes, beside the live cache's own, to go back inside a block of so many tokens."""
        return 0

    def mark(self, cache: Any) -> Any:
        """What `go_back` needs to know of `cache` before it reads a block. Nothing is copied."""
        return None

    def go_back(
        self, cache: Any, mark: Any, stands: int, count: int, snapshot: Snapshot | None = None
    ) -> None:
        """`cache` has read `stands` tokens of a block since `mark`: make it stand behind the first `count`.

        `snapshot` is the state there of a layer that cannot know it; without one such a layer goes
        back to the mark only. Unevaluated.
        """

    def view_rows(self, cache: Any, start: int, end: int) -> Arrays | None:
        """The rows of `[start, end)` where they lie, not yet evaluated; empty without rows.

        None where the live cache no longer has them. Whoever holds a view makes the next update
        copy the whole buffer.
        """
        return ()

    def every_array(self, buffers: Arrays) -> Arrays:
        """The same with an empty one for each array that has no rows yet."""
        return buffers

    def take_arrays(self, cache: Any) -> Arrays:
        """The buffers in which its rows lie; `cache` has none and is of no use any more."""
        return ()

    def snapshot(self, cache: Any, position: int) -> Snapshot | None:
        """A compact copy, not yet evaluated, of the state at `position`; None where none is needed."""
        return None

    def let_state_go(self, cache: Any) -> None:
        """Forget what a snapshot has; `cache` is of no use any more, but for its rows."""

    def fill(
        self,
        cache: Any,
        rows: Parts,
        snapshot: Snapshot | None,
        position: int,
        capacity: int,
    ) -> None:
        """Make the fresh `cache` stand at `position`, with room for `capacity` tokens, unevaluated.

        `rows` are the rows of `[0, position)` in order; at position 0 neither they nor a snapshot
        are given.
        """
        raise NotImplementedError

    def buffer_rows(self, position: int, capacity: int, which: int) -> int:
        """Rows of the buffer number `which` that `adopt` takes for a cache that stands at `position`."""
        return position

    def adopt(
        self,
        cache: Any,
        buffers: Arrays,
        snapshot: Snapshot | None,
        position: int,
    ) -> None:
        """Make the fresh `cache` stand at `position` in buffers of `buffer_rows`, unevaluated.

        They hold the rows of `[0, position)` at their beginning, and are the cache's from now on;
        none are given to layers without rows.
        """
        self.fill(cache, Parts([list(buffers)] if buffers else []), snapshot, position, position)

    def grow(self, cache: Any, capacity: int) -> None:
        """Give a live `cache` room for `capacity` tokens. Nothing to do where it has its size."""
