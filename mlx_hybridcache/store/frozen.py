"""A mapping that never changes, of which the next version costs what differs and not what there is.

Other threads hold what they were shown, so nothing that was shown may change; and a mapping of ten
thousand items is not to be copied because one of them did. Up to `FEW` items it is one dictionary.
Beyond that it is some of them, about as many as each holds, by the keys' hashes: a version shares with
the one before all those in which nothing differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, ValuesView
from itertools import chain
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")

FEW = 64
"""So many items are copied as soon as looked at."""


class FrozenMap(Mapping[K, V]):
    """Items by their keys, in no order beyond the first `FEW`."""

    __slots__ = ("_parts", "_size")

    def __init__(self, items: Mapping[K, V] | None = None):
        self._parts: list[dict[K, V]] = [dict(items or {})]
        self._size = len(self._parts[0])
        if self._size > FEW:
            self._keep_even()

    def differing(self, changes: Mapping[K, V | None]) -> FrozenMap[K, V]:
        """A version with these items put in; those with None are left out."""
        if not changes:
            return self
        if len(self._parts) == 1:
            items = {**self._parts[0], **changes}
            return FrozenMap({key: value for key, value in items.items() if value is not None})
        new: FrozenMap[K, V] = FrozenMap.__new__(FrozenMap)
        new._parts, new._size = self._parts.copy(), self._size
        own: set[int] = set()
        for key, value in changes.items():
            at = hash(key) % len(new._parts)
            if at not in own:
                own.add(at)
                new._parts[at] = new._parts[at].copy()
            part = new._parts[at]
            new._size -= key in part
            if value is None:
                part.pop(key, None)
            else:
                part[key] = value
                new._size += 1
        new._keep_even()
        return new

    def _keep_even(self) -> None:
        """As many parts as each has items, within a factor of sixteen; this comes seldom."""
        most = len(self._parts) ** 2
        if self._size <= max(FEW, 4 * most) and (len(self._parts) == 1 or 16 * self._size > most):
            return
        items = [*self.items()]
        count = 1 if self._size <= FEW else 2 ** (self._size.bit_length() // 2)
        self._parts = [{} for _ in range(count)]
        for key, value in items:
            self._parts[hash(key) % count][key] = value

    def __getitem__(self, key: K) -> V:
        return self._parts[hash(key) % len(self._parts)][key]

    def __iter__(self) -> Iterator[K]:
        return chain.from_iterable(self._parts)

    def __len__(self) -> int:
        return self._size

    def values(self) -> ValuesView[V]:
        return _Values(self)


class _Values(ValuesView[Any]):
    """All values without looking each up."""

    _mapping: FrozenMap[Any, Any]

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(part.values() for part in self._mapping._parts)
