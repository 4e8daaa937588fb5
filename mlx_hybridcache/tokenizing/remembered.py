"""The tokens of texts that were read before, within a bound in bytes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Sequence

import numpy as np

from ..tokens import Tokens

MOST_BYTES = 64 * 2**20
"""Texts with their tokens: 60 conversations of 120K tokens that have nothing in common."""

ENTRY_BYTES = 400
"""What an entry takes beside its letters and ids: a key, an array, two places in a table."""


class Remembered:
    """Tokens by salt and text. The least recently used go when there are more than `most_bytes`.

    Any thread may ask. Texts are compared, not their hashes; what is told never depends on another salt.
    """

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.most_bytes = most_bytes
        # With what each was counted as: a text grows when somebody reads it as UTF-8.
        self._tokens: dict[tuple[str, str], tuple[Tokens, int]] = {}
        self._nbytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def nbytes(self) -> int:
        """Bytes that are held, letters and what keeps them included."""
        return self._nbytes

    def find(self, salt: str, texts: Iterable[str]) -> list[Tokens | None]:
        """int32, shape `(n,)`, read-only, for each text; None for one that is not remembered."""
        with self._lock:
            return [self._used((salt, text)) for text in texts]

    def keep(self, salt: str, texts: Sequence[str], tokens: Sequence[Tokens]) -> None:
        """Remember each text with its tokens, which are copied."""
        with self._lock:
            for text, own in zip(texts, tokens, strict=True):
                self._put((salt, text), own)

    def clear(self, salt: str | None = None) -> None:
        """Forget everything of one salt, or of every salt."""
        with self._lock:
            for key in [each for each in self._tokens if salt in (None, each[0])]:
                self._forget(key)

    def _forget(self, key: tuple[str, str]) -> None:
        _, nbytes = self._tokens.pop(key)
        self._nbytes -= nbytes

    def _used(self, key: tuple[str, str]) -> Tokens | None:
        """What is last in the table was used last."""
        found = self._tokens.pop(key, None)
        if found is None:
            return None
        self._tokens[key] = found
        return found[0]

    def _put(self, key: tuple[str, str], tokens: Tokens) -> None:
        needed = _nbytes(key, tokens)
        if needed > self.most_bytes or self._used(key) is not None:
            return
        own = np.array(tokens, dtype=np.int32)  # a view would keep all of a long prompt
        own.setflags(write=False)
        self._tokens[key] = own, needed
        self._nbytes += needed
        while self._nbytes > self.most_bytes:
            self._forget(next(iter(self._tokens)))


def _nbytes(key: tuple[str, str], tokens: Tokens) -> int:
    return ENTRY_BYTES + sys.getsizeof(key[1]) + len(key[0]) + tokens.nbytes
