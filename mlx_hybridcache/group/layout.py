"""One layout for all ranks: each computes with its own layers, and all count by the rank where a thing weighs most.

Ranks that count alike decide alike, and what fits by that count fits on each of them. Layers are not spread evenly:
of four ranks three may hold no attention, and would store rows of nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import mlx.core as mx

from ..caches.kinds.idle import IdleKind
from ..caches.kinds.kind import LayerKind
from ..caches.kinds.recurrent import RecurrentKind
from ..caches.kinds.rows import RowsKind
from ..caches.kinds.window import WindowKind
from ..caches.layout import Layout
from ..errors import GroupError
from .group import Group

KINDS: dict[str, type[LayerKind]] = {
    kind.__name__: kind for kind in (RowsKind, RecurrentKind, WindowKind, IdleKind)
}
"""Kinds that a group can store. Each counts the same at every position: a window as much as a full one."""


@dataclass(frozen=True)
class GroupLayout(Layout):
    """This rank's layers, which count as much as those of the rank where they weigh most.

    `ranks` are all layouts, as numbers; one of them pauses, or cannot be merged, where all do. Rows are stored as
    they are read, and leave no live caches: what one rank leaves in an array of its own the others might not.
    """

    ranks: tuple[Layout, ...] = ()
    all_pause: bool = False
    all_merge: bool = False

    def _most(self, weigh: Callable[[Layout], int]) -> int:
        return max(weigh(each) for each in self.ranks)

    @property
    def parts(self) -> int:
        return len(self.ranks)

    @property
    def every_kind(self) -> tuple[LayerKind, ...]:
        return tuple(kind for each in reversed(self.ranks) for kind in each.kinds)

    @property
    def needs_snapshots(self) -> bool:
        return any(each.needs_snapshots for each in self.ranks)

    @property
    def must_pause(self) -> bool:
        return self.all_pause

    @property
    def merges(self) -> bool:
        return self.all_merge

    @property
    def shares_rows(self) -> bool:
        return False

    @property
    def goes_back(self) -> bool:
        return False

    @property
    def row_heads(self) -> frozenset[int]:
        return frozenset[int]().union(*(each.row_heads for each in self.ranks))

    @property
    def row_bytes(self) -> int:
        return self._most(lambda each: each.row_bytes)

    def rows_nbytes(self, start: int, end: int) -> int:
        return self._most(lambda each: each.rows_nbytes(start, end))

    @property
    def array_bytes(self) -> int:
        return self._most(lambda each: each.array_bytes)

    @property
    def snapshot_bytes(self) -> int:
        return self._most(lambda each: each.snapshot_bytes)

    def running_bytes(self, capacity: int) -> int:
        return self._most(lambda each: each.running_bytes(capacity))

    def largest_buffer_bytes(self, capacity: int) -> int:
        return self._most(lambda each: each.largest_buffer_bytes(capacity))

    @property
    def largest_snapshot_bytes(self) -> int:
        return self._most(lambda each: each.largest_snapshot_bytes)

    def largest_layer_bytes(self, capacity: int) -> int:
        return self._most(lambda each: each.largest_layer_bytes(capacity))


def spread(layout: Layout, leaves_of: Sequence[int], size: int) -> GroupLayout:
    """What the ranks of a group would count by, each with some of the layers, from the layout of the whole model.

    `leaves_of` says how many leaves each layer has. As mlx-lm spreads them: rank 0 has the last layers, and low ranks
    one more where they do not come out even. Raises `GroupError` where it cannot be done.
    """
    strange = _strange(layout)
    if strange:
        raise GroupError(_CANNOT.format(", ".join(strange)))
    if not 1 <= size <= len(leaves_of):
        raise GroupError(f"{len(leaves_of)} layers cannot be spread over {size} ranks.")
    first = [0, *accumulate(leaves_of)]
    parts = [layout.kinds[first[a] : first[b]] for a, b in layers_of(len(leaves_of), size)]
    ranks = tuple(Layout(kinds, (), (), None, 1, layout.vocabulary) for kinds in parts)
    plain = {each.name: getattr(layout, each.name) for each in fields(Layout)}
    return GroupLayout(**plain, ranks=ranks, all_pause=layout.must_pause, all_merge=layout.merges)


def layers_of(layers: int, size: int) -> list[tuple[int, int]]:
    """The layers `[a, b)` of each rank, by rank."""
    base, more = divmod(layers, size)
    ends = [layers, *(layers - done for done in accumulate(base + (r < more) for r in range(size)))]
    return [(a, b) for b, a in pairwise(ends)]


def shared(group: Group, own: Layout) -> GroupLayout:
    """The layout that all ranks count by.

    Raises `GroupError` for layers that a group cannot store.
    """
    told = group.agree(_described(own))
    strange = sorted({name for each in told for name in each["strange"]})
    if strange:
        raise GroupError(_CANNOT.format(", ".join(strange)))
    limits = [each["slicing_limit"] for each in told if each["slicing_limit"] is not None]
    ranks = tuple(Layout(_kinds(each["kinds"]), (), (), None, 1, own.vocabulary) for each in told)
    plain = {each.name: getattr(own, each.name) for each in fields(Layout)}
    made = GroupLayout(
        **plain,
        ranks=ranks,
        all_pause=any(each["must_pause"] for each in told),
        all_merge=all(each["merges"] for each in told),
    )
    return replace(
        made,
        alignment=max(each["alignment"] for each in told),
        slicing_limit=min(limits, default=None),
        least_row_bytes=made.row_bytes,
        least_snapshot_bytes=made.snapshot_bytes,
    )


_CANNOT = "Several ranks cannot serve this model yet: {} of it. Start it on one machine."


def _strange(layout: Layout) -> list[str]:
    """What of it a group cannot store."""
    strange = {type(kind).__name__ for kind in layout.kinds if type(kind) not in KINDS.values()}
    return sorted({*layout.unsupported, *strange})


def _described(layout: Layout) -> dict[str, Any]:
    known = [kind for kind in layout.kinds if type(kind) in KINDS.values()]
    return {
        "kinds": [[type(kind).__name__, _fields(kind)] for kind in known],
        "strange": _strange(layout),
        "must_pause": layout.must_pause,
        "merges": layout.merges,
        "alignment": layout.alignment,
        "slicing_limit": layout.slicing_limit,
    }


def _fields(kind: Any) -> dict[str, Any]:
    found = {each.name: getattr(kind, each.name) for each in fields(kind)}
    if "dtypes" in found:
        found["dtypes"] = [str(dtype).removeprefix("mlx.core.") for dtype in found["dtypes"]]
    return found


def _kinds(told: list[list[Any]]) -> tuple[LayerKind, ...]:
    return tuple(_kind(name, dict(values)) for name, values in told)


def _kind(name: str, values: dict[str, Any]) -> LayerKind:
    if "dtypes" in values:
        values["dtypes"] = tuple(getattr(mx, each) for each in values["dtypes"])
        values["shapes"] = tuple(map(tuple, values["shapes"]))
    return KINDS[name](**values)
