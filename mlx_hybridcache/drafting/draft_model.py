"""A draft model: its prompts are restored, read and stored as the served model's are, in namespaces of their own."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..caches.layout import Layout
from ..caches.relief import is_allocation_failure
from ..caches.rollback.trail import Trail, trail_bytes
from ..caches.room import ROW_STEP
from ..errors import BudgetError
from ..prefill.prefill import Prefill
from ..request.request import Request
from ..request.sharing import Sharing
from ..store.budget import Claim
from ..tiers import Tiers
from ..worker.turns import Pause
from .at_work import AtWork

log = logging.getLogger("mlx_hybridcache")


@dataclass(eq=False)
class DraftModel(AtWork):
    """A model that drafts for another one, with what its own prompts go through."""

    model: Any
    layout: Layout
    sharing: Sharing
    tiers: Tiers
    prefill: Prefill

    def drafter(self, request: Request, vocabulary: int) -> ModelDrafter:
        """One for the reply to a request, of a model with so many tokens. It holds nothing yet."""
        own = self.sharing.request(
            request.tokens,
            request.namespace.salt,
            request.max_tokens,
            boundaries=request.boundaries,
            best_effort=request.best_effort,
            job=request.job,
        )
        return ModelDrafter(self, own, min(vocabulary, self.layout.vocabulary))


class ModelDrafter:
    """Drafts for one reply: what a draft model finds likeliest, token by token.

    Its caches have read what was written, up to a place, and what it drafted last behind that. What was
    wrong of it they go back over, which is seen in the history. Without memory it drafts nothing.
    """

    def __init__(self, own: DraftModel, request: Request, vocabulary: int):
        self.restored = 0
        self._forwards = 0
        self._own = own
        self._request = request
        self._vocabulary = vocabulary
        self._live = own.tiers.live(request)
        self._claim: Claim | None = None
        self._trail: Trail | None = None
        self._drafted: list[int] = []  # what was read behind the place where the trail begins
        self._is_reading = False
        self._is_ready = False
        self._is_over = int(request.tokens.max()) >= own.layout.vocabulary

    @property
    def forwards(self) -> int:
        """Calls of the draft model so far, those for the prompt included."""
        return self._forwards + self._request.account.forwards

    # The prompt

    def read(self) -> Iterator[Pause]:
        """All but the prompt's last token: restored as far as it is stored, a slice a turn."""
        if self._is_over:
            return
        self._is_reading = True
        self._own.running.append(self)
        try:
            yield from self._own.turns(self._reading(), lambda: self._is_over)
        except (BudgetError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_allocation_failure(error):
                raise
            log.info("A reply goes on without its draft model: %s", str(error))
            self._is_over = True
        finally:
            self._is_reading = False
            if self._is_over:
                self._let_go()

    def _reading(self) -> Generator[Pause, None, None]:
        request, live = self._request, self._live
        found = yield from self._own.tiers.resume(request, live)
        self.restored = found.position
        yield from self._own.prefill.read(request, live, found)
        self._is_ready = True

    # Drafts

    def propose(self, history: Sequence[int], most: int) -> list[int]:
        """As `Drafter.propose`."""
        layout, end = self._own.layout, len(history)
        if self._is_over or not self._is_ready:
            return []
        with self._own.at_work():
            self._go_back(history, end - 1)  # its logits are needed behind the coming token
            most = min(most, layout.longest_block, layout.tokens_ahead(end))
            if most < 1 or not self._has_room(end + most):
                return []
            self._claim = self._own.tiers.memory.claim_free(trail_bytes(layout, most))
            return [] if self._claim is None else self._draft(history, most)

    def _draft(self, history: Sequence[int], most: int) -> list[int]:
        likeliest = self._read(history[self._live.position :])
        trail = Trail(self._own.layout, self._live.caches, self._live.position)
        drafted = [likeliest]
        while len(drafted) < most:
            drafted.append(self._read(drafted[-1:]))
            trail.step()
        self._trail, self._drafted = trail, drafted[:-1]
        return drafted

    def accepted(self, drafted: int, accepted: int) -> None:
        """As `Drafter.accepted`: what was wrong is seen in the history."""

    def _read(self, tokens: Sequence[int]) -> int:
        """Into its caches, in as many forwards as it takes; the likeliest token behind them."""
        own, live, left = self._own, self._live, list(tokens)
        while True:
            part = left[: max(1, own.layout.tokens_ahead(live.position))]
            left = left[len(part) :]
            logits = own.model(mx.array(part)[None], cache=live.caches)[0, -1]
            likeliest = mx.argmax(logits[: self._vocabulary])
            mx.eval(likeliest, [cache.state for cache in live.caches], own.layout.lazy())
            self._forwards += 1
            live.position += len(part)
            if not left:
                return int(likeliest)

    def _go_back(self, history: Sequence[int], end: int) -> None:
        """Behind what was right of the last draft, and no further than `end`."""
        trail, drafted, self._trail, self._drafted = self._trail, self._drafted, None, []
        if trail is not None:
            start = self._live.position - len(drafted)
            right = _agreed(drafted, history[start : min(start + len(drafted), end)])
            trail.keep(right)
            self._live.position = start + right
        self._give_claim_back()

    def _has_room(self, rows: int) -> bool:
        """Whether its caches have so many rows, or more are to be had."""
        live = self._live
        if rows > live.capacity:
            try:
                live.grow(max(ROW_STEP, (rows - len(self._request.tokens)) // ROW_STEP * ROW_STEP))
            except BudgetError:
                return False
        return True

    # Its end

    def end(self, history: Sequence[int] | None) -> None:
        """As `Drafter.end`. The state behind `history` is stored, so that the next turn goes on from there."""
        if self._is_over:
            return
        self._is_over = True
        if self._is_reading:
            return  # its next turn, or its end, lets go
        try:
            if self._is_ready and history is not None:
                with self._own.at_work():
                    self._save(history)
        finally:
            self._let_go()

    def _save(self, history: Sequence[int]) -> None:
        self._go_back(history, len(history))
        missing = history[self._live.position :]
        if missing and self._has_room(len(history)):
            self._read(missing)
        tokens = np.array(history[: self._live.position], dtype=np.int32)
        self._own.tiers.save_end(self._request, self._live, tokens)

    def give_up(self) -> None:
        """At once, without storing anything more."""
        if not self._is_reading:
            self._live.let_go()
            self._let_go()
        self._is_over = True

    def _let_go(self) -> None:
        self._trail = None
        self._give_claim_back()
        if self in self._own.running:
            self._own.running.remove(self)
        self._live.release()

    def _give_claim_back(self) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.release()


def _agreed(drafted: Sequence[int], written: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(drafted, written, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(drafted), len(written)))
