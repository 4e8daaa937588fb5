"""Compiled grammars: each is made once, and what is kept is bounded by what it weighs."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

MOST_BYTES = 128 * 1024
"""Of a grammar's text. The largest of them take seconds to compile, and nothing can stop that."""

KEPT_BYTES = 80 * 2**20
"""That compiled grammars of one model may weigh together; the heaviest one fits.

Outside the cache's budget, which is the model's and its prompts'.
"""

FIXED_BYTES = 160 * 1024
BYTES_PER_BYTE = 512
BYTES_PER_REMAINDER = 640


def weight(grammars: Sequence[str], remainders: int) -> int:
    """A bound, measured with llguidance 1.9, of what these weigh compiled.

    Most of it is that of objects with many short properties that may hold anything (360 bytes for
    each of the text), and of `multipleOf` (490 bytes for each remainder).
    """
    text = sum(map(len, grammars))
    return FIXED_BYTES + BYTES_PER_BYTE * text + BYTES_PER_REMAINDER * remainders


@dataclass(eq=False)
class Compiled(Generic[T]):
    """The last ones that were used, for any thread. They are known by a digest of their text."""

    most_bytes: int = KEPT_BYTES
    nbytes: int = 0
    _kept: OrderedDict[bytes, tuple[T, int]] = field(default_factory=OrderedDict)
    _under_way: dict[bytes, Future[T]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, grammars: Sequence[str], nbytes: int, make: Callable[[], T]) -> T:
        """What `make` gives, which weighs at most `nbytes`, or gave before.

        Who comes while it is under way waits for it, and gets the same error.
        """
        key = _digest(grammars)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
            others, mine = self._under_way.get(key), Future[T]()
            if others is None:
                self._under_way[key] = mine
        if others is not None:
            return others.result()
        try:
            made = make()
        except BaseException as error:
            self._end(key)
            mine.set_exception(error)
            raise
        self._end(key, (made, nbytes))
        mine.set_result(made)
        return made

    def _end(self, key: bytes, kept: tuple[T, int] | None = None) -> None:
        with self._lock:
            del self._under_way[key]
            if kept is None:
                return
            self._kept[key] = kept
            self.nbytes += kept[1]
            while self.nbytes > self.most_bytes:
                _, (_, nbytes) = self._kept.popitem(last=False)
                self.nbytes -= nbytes


def _digest(grammars: Sequence[str]) -> bytes:
    """Raises `ValueError` for what is no Unicode: half a surrogate pair is valid JSON, but no text."""
    digest = hashlib.blake2b(digest_size=32)
    for each in grammars:
        text = each.encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.digest()
