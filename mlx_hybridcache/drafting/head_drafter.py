"""Drafts of a multi-token-prediction head for one reply, which hears what the reply's caches read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..caches import checkpoint as checkpoints
from ..caches.hidden import listen
from ..caches.kinds.kind import Snapshot
from ..caches.kinds.rows import compact, evaluate_to_keep
from ..caches.relief import is_allocation_failure
from ..caches.room import rounded
from ..errors import BudgetError
from ..request.request import Request
from ..worker.turns import Pause
from .head_tiers import HeadTiers

log = logging.getLogger("mlx_hybridcache")

T = TypeVar("T")

MOST_WAITING = 64
"""Hidden states that wait for a draft, where none is asked for meanwhile."""

STATE = 1
"""Of a head's caches the one with the hidden state that waits for the token behind it; the one before has rows."""


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

    The head has a row for each position behind which the token is known; what waits for that, or for a draft, is
    `_waiting`. Where the caches are restored it goes on from what is stored of it: rows up to there, and the hidden
    state of the last token. Where less is stored `_missing` positions have no rows, for good, because nobody has
    their hidden states any more: rotations are counted as if those behind followed at once, and nothing more is
    stored, as a path has no gaps. Without memory it drafts nothing.
    """

    def __init__(self, own: HeadTiers, request: Request):
        """`request` is its model's, for the reply."""
        self.forwards = 0
        """Calls of the head so far."""
        self.restored = 0
        """Tokens of the prompt that it had not to hear."""
        self._own = own.head
        self._tiers = own.place(request.namespace.settings).tiers
        self._prompt = request.tokens
        self._rows = request.rows
        self._request = own.request(request)
        self._live = self._tiers.live(self._request)
        self._caches: Sequence[Any] = ()
        self._stands = 0  # where these are restored
        self._next = 0  # the position of the row to come
        self._missing = 0
        self._waiting: list[Heard] = []
        self._is_reading = False
        self._is_over = False

    # What is restored

    def begin(self, caches: Sequence[Any], position: int) -> None:
        """As `Listener.begin`."""
        self._let_go()
        if not self._is_over:
            self._caches, self._stands = caches, position
            listen(caches, self)

    def resume(self) -> Iterator[Pause]:
        """Rows for what the caches have of its prompt, as far as they are stored; disk reads take turns."""
        if self._is_over:
            return
        self._is_reading = True
        self._own.running.append(self)
        try:
            yield from self._own.turns(self._resuming(), lambda: self._is_over)
        except (BudgetError, RuntimeError) as error:
            self._do_without(error)
        except BaseException:
            self._is_over = True
            raise
        finally:
            self._is_reading = False
            if self._is_over:
                self._let_go()

    def _resuming(self) -> Generator[Pause, None, None]:
        tiers, live, stands = self._tiers, self._live, self._stands
        live.tokens = self._request.tokens
        known = replace(self._request, tokens=live.tokens[: max(1, stands)])  # one is not restored
        gap = _gap(stands, tiers.reach(known, live))
        known = replace(known, room=rounded(self._rows - gap))
        found = (yield from tiers.resume(known, live)).position
        self._missing = _gap(stands, found)
        if self._missing:
            self.restored, self._next = found, stands
        else:
            self.restored, self._next = stands, found
            self._waiting = [self._waits(found)] if found else []

    def _waits(self, position: int) -> Heard:
        """The hidden state that was restored, of the token at `position`."""
        token = mx.array([[int(self._prompt[position])]])
        return Heard(position, token, self._live.caches[STATE][0])

    # What is read

    def heard(self, tokens: mx.array, hidden: mx.array) -> None:
        """As `Listener.heard`. What was read and refused before is known by where this begins."""
        start = self._own.position([*self._caches]) - tokens.shape[1]
        self._cut(start)
        if start - self._next > MOST_WAITING:  # of forwards that are over
            self._if_there_is_memory(lambda: self._take(tokens[:, :1], only_free=True))
        if not self._is_over:
            self._waiting.append(Heard(start, tokens, hidden))

    def settle(self, cuts: Sequence[int]) -> None:
        """As `Listener.settle`. The head's rows alone are computed, not what it would make of them.

        They are stored where those of the caches are, so that whoever is restored there has both.
        """
        if self._waiting and not self._is_over:
            self._if_there_is_memory(lambda: self._settle(cuts))

    def _settle(self, cuts: Sequence[int]) -> None:
        ends = [] if self._missing else [at - 1 for at in cuts if at > 1]
        states = [(at, self._hidden(at)) for at in ends if at >= self._waiting[0].start]
        # While all of it is held: a copy takes over the whole buffer of what nobody else has.
        evaluate_to_keep([hidden for _, hidden in states])
        self._take(None)
        for at, hidden in states:
            snapshot = self._own.layout.stored(STATE, Snapshot((hidden,)))
            taken = checkpoints.take(self._own.layout, self._live.caches, at, {STATE: snapshot})
            is_end = at == len(self._prompt) - 2
            self._tiers.save(self._request, self._live, taken, is_end=is_end, is_branch_point=False)
        if states:
            self._live.materialize()

    def _hidden(self, position: int) -> mx.array:
        """A copy of the hidden state there, `(1, 1, width)`, which waits."""
        each = next(each for each in self._waiting if each.start <= position < each.end)
        return compact(each.cut(position, position + 1).hidden)

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
        rows = self._live.caches[0]
        output = self._own.read(tokens, hidden, rows)
        self.forwards += 1
        mx.eval(rows.state)  # what makes its rows, and no more
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
        self._live.caches[0].trim(most - 1)  # the model will say what it finds there
        return [int(token) for token in mx.concatenate(drafted, axis=1)[0]]

    def accepted(self, drafted: int, accepted: int) -> None:
        """As `Drafter.accepted`: what was right is heard when it is read."""

    # Memory

    def _make_room(self, end: int, *, only_free: bool = False) -> None:
        """Have rows for all positions before `end`. Raises `BudgetError`."""
        live, layout = self._live, self._own.layout
        more = rounded(end - self._missing) - live.capacity
        if more <= 0:
            return
        need = layout.growth_bytes(live.capacity, more) + layout.largest_buffer_bytes(live.capacity)
        if only_free and not self._tiers.memory.budget.has_room(need):
            raise BudgetError(f"{need:,} bytes are not free.")
        live.grow(more)

    def _if_there_is_memory(self, work: Callable[[], T]) -> T | None:
        """What `work` gives. Where memory runs out the reply goes on without drafts."""
        try:
            with self._own.at_work():
                return work()
        except (BudgetError, RuntimeError) as error:
            self._do_without(error)
            self._let_go()
            return None

    def _do_without(self, error: BudgetError | RuntimeError) -> None:
        """No more drafts where memory ran out; any other error is raised."""
        if isinstance(error, RuntimeError) and not is_allocation_failure(error):
            raise error
        log.info("A reply goes on without its head's drafts: %s", str(error))
        self._is_over = True

    # Its end

    def leave(self, read: int) -> None:
        """The request is over, perhaps before its reply: what was heard of the prompt's first `read` tokens is stored."""
        self.end(None if self._is_over else self._prompt[:read].tolist())

    def end(self, history: Sequence[int] | None) -> None:
        """As `Drafter.end`. What it has behind `history` is stored, so that the next turn goes on from there."""
        if not self._is_over and not self._missing and history is not None:
            self._if_there_is_memory(lambda: self._save(history))
        self._is_over = True
        self._let_go()

    def _save(self, history: Sequence[int]) -> None:
        self._cut(len(history))
        if not self._waiting or self._waiting[-1].end != len(history):
            return
        self._take(None)
        self._live.caches[STATE][0] = self._waiting[-1].hidden
        path = HeadTiers.path(np.array(history, dtype=np.int32))
        self._tiers.save_end(self._request, self._live, path)

    def give_up(self) -> None:
        """At once, without storing anything more."""
        self._is_over = True
        if not self._is_reading:  # else its next turn, or its end, lets go
            self._live.let_go()
            self._let_go()

    def _let_go(self) -> None:
        listen(self._caches, None)
        self._caches, self._waiting = (), []
        if self in self._own.running:
            self._own.running.remove(self)
        self._live.release()


def _gap(stands: int, found: int) -> int:
    """How many positions have no rows where caches stand, if so many rows are stored and the hidden state behind them."""
    return 0 if not stands or 0 < found == stands - 1 else stands - found


def _owned(heard: Heard) -> Heard:
    """The same, without what it was cut out of."""
    return Heard(heard.start, compact(heard.tokens), compact(heard.hidden))
