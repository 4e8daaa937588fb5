"""Drafts of a multi-token-prediction head for one reply, which hears what the reply's caches read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx

from ..caches.hidden import listen
from ..caches.kinds.rows import compact
from ..caches.memory import MemoryStore
from ..caches.relief import is_allocation_failure
from ..caches.room import rounded
from ..errors import BudgetError
from .head import Head

log = logging.getLogger("mlx_hybridcache")

T = TypeVar("T")

MOST_WAITING = 64
"""Hidden states that wait for a draft, where none is asked for meanwhile."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What a forward from `start` on read: `tokens` `(1, n)` and `hidden` `(1, n, width)`."""

    start: int
    tokens: mx.array
    hidden: mx.array

    @property
    def end(self) -> int:
        """The position behind it."""
        return self.start + int(self.tokens.shape[1])

    def cut(self, start: int, end: int) -> Heard:
        """The part of it in `[start, end)`."""
        if (start, end) == (self.start, self.end):
            return self
        part = slice(max(0, start - self.start), max(0, end - self.start))
        return Heard(self.start + part.start, self.tokens[:, part], self.hidden[:, part])


class HeadDrafter:
    """Drafts for one reply, token by token, as a `Drafter`; and a `Listener` to the reply's caches.

    The head has a row for each position that was read since the caches stood where they were restored, behind the
    last of which the token is known. Rotations count from there: only distances matter. What waits for a
    draft, or for the token behind it, is `_waiting`. Without memory it drafts nothing.
    """

    def __init__(self, own: Head, memory: MemoryStore, rows: int):
        """`rows` is how many the reply's own caches are made for."""
        self.forwards = 0
        """Calls of the head so far."""
        self._own = own
        self._memory = memory
        self._rows = rows
        self._claim = memory.budget.claim(0)
        self._caches: Sequence[Any] = ()
        self._cache: Any = None
        self._capacity = 0
        self._start = self._next = 0  # the positions of its first row, and of the one to come
        self._waiting: list[Heard] = []
        self._is_over = False

    # What is read

    def begin(self, caches: Sequence[Any], position: int) -> None:
        """As `Listener.begin`."""
        self._let_go()
        if not self._is_over:
            self._caches, self._start, self._next = caches, position, position
            listen(caches, self)

    def heard(self, tokens: mx.array, hidden: mx.array) -> None:
        """As `Listener.heard`. What was read and refused before is known by where this begins."""
        start = self._own.position([*self._caches]) - tokens.shape[1]
        self._cut(start)
        if start - self._next > MOST_WAITING:  # of forwards that are over
            self._if_there_is_memory(lambda: self._take(tokens[:, :1], only_free=True))
        if not self._is_over:
            self._waiting.append(Heard(start, tokens, hidden))

    def settle(self) -> None:
        """As `Listener.settle`. The head's rows alone are computed, not what it would make of them."""
        if self._waiting and not self._is_over:
            self._if_there_is_memory(lambda: self._take(None))

    def _cut(self, end: int) -> None:
        """What was read behind `end` was wrong."""
        kept = (each.cut(each.start, min(end, each.end)) for each in self._waiting)
        self._waiting = [each for each in kept if each.start < each.end]

    def _take(self, coming: mx.array | None, *, only_free: bool = False) -> mx.array | None:
        """Rows for all that waits; `coming`, `(1, 1)`, is the token behind it. Else the last of it waits on.

        Returns the head's output, unevaluated. Raises `BudgetError`.
        """
        tokens = mx.concatenate([each.tokens for each in self._waiting], axis=1)
        hidden = mx.concatenate([each.hidden for each in self._waiting], axis=1)
        behind = tokens[:, 1:]
        if coming is not None:
            behind = mx.concatenate([behind, coming], axis=1)
        end = self._next + behind.shape[1]
        self._make_room(end, only_free=only_free)
        last = self._waiting[-1]
        left = last.cut(last.end - 1, last.end)
        self._waiting = [] if coming is not None else [_owned(left)]
        output = self._read(behind, hidden[:, : behind.shape[1]]) if end > self._next else None
        self._next = end
        mx.eval([each.hidden for each in self._waiting])
        return output

    def _read(self, tokens: mx.array, hidden: mx.array) -> mx.array:
        output = self._own.read(tokens, hidden, self._cache)
        self.forwards += 1
        mx.eval(self._cache.state)  # what makes its rows, and no more
        return output

    # Drafts

    def propose(self, history: Sequence[int], most: int) -> list[int]:
        """As `Drafter.propose`."""
        read = len(history) - 1  # the coming token is not
        self._cut(read)
        if self._is_over or not self._waiting or self._waiting[-1].end != read:
            return []
        return self._if_there_is_memory(lambda: self._draft(history, most)) or []

    def _draft(self, history: Sequence[int], most: int) -> list[int]:
        self._make_room(len(history) - 1 + most)
        output = self._take(mx.array([[history[-1]]]))
        assert output is not None, "there is a row for the coming token"
        drafted = [self._own.likeliest(output)]
        while len(drafted) < most:
            output = self._read(drafted[-1], output[:, -1:])
            drafted.append(self._own.likeliest(output))
        self._cache.trim(most - 1)  # the model will say what it finds there
        return [int(token) for token in mx.concatenate(drafted, axis=1)[0]]

    def accepted(self, drafted: int, accepted: int) -> None:
        """As `Drafter.accepted`: what was right is heard when it is read."""

    # Memory

    def _make_room(self, end: int, *, only_free: bool = False) -> None:
        """Have rows for all positions before `end`. Raises `BudgetError`."""
        rows = end - self._start
        if rows <= self._capacity:
            return
        first = self._rows - self._start if self._cache is None else 0
        capacity = rounded(max(rows, first))
        held, need = self._claim.nbytes, self._own.kind.buffer_nbytes(capacity)
        if only_free and not self._memory.budget.has_room(need):
            raise BudgetError(f"{need:,} bytes are not free.")
        self._claim.grow(need - held, passing=held)  # old and new ones are there for a moment
        if self._cache is None:
            self._own.running.append(self)
            self._cache = self._own.with_room(capacity)
        else:
            self._own.kind.grow(self._cache, capacity)
            mx.eval(self._cache.state)
        self._capacity = capacity

    def _if_there_is_memory(self, work: Callable[[], T]) -> T | None:
        """What `work` gives. Where memory runs out the reply goes on without drafts."""
        try:
            with self._own.at_work():
                return work()
        except (BudgetError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_allocation_failure(error):
                raise
            log.info("A reply goes on without its head's drafts: %s", str(error))
            self.give_up()
            return None

    # Its end

    def end(self, history: Sequence[int] | None) -> None:
        """As `Drafter.end`. Nothing of it is stored."""
        self.give_up()

    def give_up(self) -> None:
        """No more drafts: what it holds goes."""
        self._is_over = True
        self._let_go()

    def _let_go(self) -> None:
        listen(self._caches, None)
        self._caches, self._cache, self._capacity, self._waiting = (), None, 0, []
        self._claim.release()
        if self in self._own.running:
            self._own.running.remove(self)


def _owned(heard: Heard) -> Heard:
    """The same, without what it was cut out of."""
    return Heard(heard.start, compact(heard.tokens), compact(heard.hidden))
