"""Modules of a model that are given a subclass of their own class, and get their own back.

Several caches may serve one model, so what they have in common is put back by the last of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_HOLDERS = "_subclassed_for"
"""The attribute of a module that counts who still needs its subclass; gone when nobody does. It names
the module too, as a copy of one has a copy of it and no holders."""


class _Changes:
    """One at a time. What the garbage collector ends in the middle of one, on the same thread, is put back behind it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._is_under_way = False
        self.left: list[Subclassed] = []

    @contextmanager
    def one(self) -> Iterator[None]:
        with self._lock:
            if self._is_under_way:
                yield
                return
            self._is_under_way = True
            try:
                yield
            finally:
                while self.left:
                    self.left.pop().put_back()
                self._is_under_way = False


_changes = _Changes()


class Subclassed:
    """Some modules, whose classes are others until `release`. It holds them no longer than that."""

    def __init__(self, pairs: Iterable[tuple[Any, type]]):
        """`pairs` are modules and the subclass that each gets, if it has not got it yet."""
        self._pairs: list[tuple[Any, type]] = []
        with _changes.one():
            for module, kind in pairs:
                _count(module, _holders(module) + 1)
                object.__setattr__(module, "__class__", kind)
                self._pairs.append((module, kind))

    def release(self) -> None:
        """Say that they are not needed any more; once is enough, from any thread, and from finalizers."""
        _changes.left.append(self)
        with _changes.one():
            pass

    def put_back(self) -> None:
        """The same, while nothing else is changed."""
        pairs, self._pairs = self._pairs, []
        for module, kind in pairs:
            _count(module, holders := _holders(module) - 1)
            if not holders:
                object.__delattr__(module, _HOLDERS)
                if type(module) is kind:  # else somebody has changed it since
                    object.__setattr__(module, "__class__", kind.__bases__[0])


def _holders(module: Any) -> int:
    whose, holders = getattr(module, _HOLDERS, (0, 0))
    return holders if whose == id(module) else 0


def _count(module: Any, holders: int) -> None:
    object.__setattr__(module, _HOLDERS, (id(module), holders))
