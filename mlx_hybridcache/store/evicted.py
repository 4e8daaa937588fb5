"""Prefixes whose checkpoints were let go, remembered by their digests, so that a report can say `evicted`."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from ..tokens import Namespace, Tokens

MOST = 256
"""So many of the last are remembered."""


class Evicted:
    """What was let go last."""

    def __init__(self) -> None:
        self._digests: OrderedDict[tuple[Namespace, int, bytes], None] = OrderedDict()

    def add(self, namespace: Namespace, tokens: Tokens) -> None:
        """What stood at the end of `tokens` was let go."""
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
        self._digests[(namespace, len(tokens), digest)] = None
        while len(self._digests) > MOST:
            self._digests.popitem(last=False)

    def has_beginning_of(self, namespace: Namespace, tokens: Tokens) -> bool:
        """Whether a beginning of `tokens` had a checkpoint that was let go."""
        lengths = sorted({n for name, n, _ in self._digests if name == namespace})
        digest, read = hashlib.blake2b(digest_size=16), 0
        for length in lengths:
            if length > len(tokens):
                break
            digest.update(tokens[read:length].tobytes())
            read = length
            if (namespace, length, digest.copy().digest()) in self._digests:
                return True
        return False

    def clear(self) -> None:
        """Nothing was."""
        self._digests.clear()
