"""Who else holds what a store lets go of: its bytes count until they do no longer."""

from __future__ import annotations

from collections.abc import Iterable

from .tree import Held


class References:
    """Here nobody; a tier whose payloads others hold too says so.

    `dropped` and `split` return the bytes that stay held although the store no longer has them.
    """

    def split_nbytes(self, rows: Held) -> int:
        """Room that cutting these rows in two takes for a moment: both parts are copies."""
        return rows.nbytes

    def dropped(self, payload: Held) -> int:
        """A checkpoint, or the rows of a node, left the store."""
        return 0

    def split(self, rows: Held) -> int:
        """Rows were replaced by two parts of their own."""
        return 0

    def is_held(self, payload: Held) -> bool:
        """Whether others hold it at this moment."""
        return False

    def lingering(self, in_flight_bytes: int, left: Iterable[Held]) -> int:
        """Bytes that others would hold on if everything went but what is `left`, of which `in_flight_bytes` went before."""
        return 0


class CountedReferences(References):
    """What one other holds, such as the disk thread: what the store lets go of meanwhile counts on."""

    def __init__(self) -> None:
        self._holds: dict[int, int] = {}
        self._gone: set[int] = set()
        self._there: dict[int, int] = {}
        """Bytes of what is held and did not go."""

    def hold(self, payload: Held) -> None:
        """One more holds it."""
        self._holds[id(payload)] = self._holds.get(id(payload), 0) + 1
        self._there[id(payload)] = payload.nbytes

    def release(self, payload: Held) -> int:
        """One less holds it; the bytes that are held no longer by anybody."""
        self._holds[id(payload)] -= 1
        if self._holds[id(payload)]:
            return 0
        del self._holds[id(payload)]
        self._there.pop(id(payload), None)
        is_gone = id(payload) in self._gone
        self._gone.discard(id(payload))
        return payload.nbytes if is_gone else 0

    def dropped(self, payload: Held) -> int:
        if id(payload) not in self._holds:
            return 0
        self._gone.add(id(payload))
        self._there.pop(id(payload), None)
        return payload.nbytes

    def split(self, rows: Held) -> int:
        return self.dropped(rows)

    def is_held(self, payload: Held) -> bool:
        return id(payload) in self._holds

    def lingering(self, in_flight_bytes: int, left: Iterable[Held]) -> int:
        if not self._there:
            return in_flight_bytes
        kept = {id(payload) for payload in left}
        return in_flight_bytes + sum(n for each, n in self._there.items() if each not in kept)
