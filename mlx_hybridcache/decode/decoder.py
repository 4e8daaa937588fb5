"""Decode: caches that have read the prompt but its last token in, tokens out.

A lone reply decodes on its plain caches. Several at once decode as one of mlx-lm's batches, formed
when a second one is ready.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ..caches.layout import Layout
from ..caches.live import LiveCaches
from ..caches.memory import MemoryStore
from ..caches.room import ROW_STEP, batch_bytes
from ..errors import BudgetError
from ..tokens import Tokens
from .batch import Batch, Made, together
from .reply import Alone, Reply, Steps, Together
from .sampling import Draws, Guard, LogitsProcessor, Sampler
from .speculate.speculation import Speculation

log = logging.getLogger("mlx_hybridcache")

UNTAKEN = 8
"""Tokens that a batch makes for a reply whose client takes none, before that reply leaves it."""

WASTE = 2.0
"""A batch pads its replies to the longest one. It is formed while that at most doubles their rows."""

LEAVES_TO_OTHERS = 0.75
"""A reply that gets what fits grows only while running requests hold no more of the budget."""


class Decoder:
    """All replies under way on one model. With `batches=False` each keeps to itself.

    Whether a reply is the same in a batch as alone is for `batch_check` to say. `agreed` makes of a sampler one
    that gives every rank of a group the same token; then a batch that fails is not survived, as others may have
    done what failed here.
    """

    agreed: Callable[[Sampler | None], Sampler] | None = None

    def __init__(self, model: Any, layout: Layout, store: MemoryStore, *, batches: bool):
        self._model = model
        self._layout = layout
        self._store = store
        self.batches = batches
        self._merged: Together | None = None
        self._alone: list[Reply] = []
        self._is_late = (
            False  # a reply could not join the others, because nobody took its drafts yet
        )

    def begin(
        self,
        tokens: Tokens,
        live: LiveCaches,
        *,
        ends: Collection[int],
        max_tokens: int,
        sampler: Sampler | None = None,
        logits_processors: Sequence[LogitsProcessor] | None = None,
        seed: int | None = None,
        speculation: Speculation | None = None,
    ) -> Reply:
        """A reply behind `tokens` (int32, `(n,)`), whose live caches stand at `n - 1`.

        It ends with one of the tokens in `ends` or with `max_tokens`, if positive. Processors see the
        whole prompt. `seed` is the state of the random stream that the sampler draws from, kept
        apart from other replies' on this thread. With a `speculation` it drafts while it is alone.
        """
        guard = Guard()
        draws = None if sampler is None or seed is None else Draws(sampler, seed)
        chosen = sampler if draws is None else draws
        batch = Batch.of_one(
            self._model,
            tokens,
            live.caches,
            self._sampler(None if chosen is None else guard.sampler(chosen)),
            [guard.processor(each) for each in logits_processors or ()],
        )
        reply = Reply(len(tokens), ends, max_tokens, live, guard, draws, speculation)
        live.position = reply.position
        self._set_alone(reply, batch)
        if self.batches:
            self._merge()
        return reply

    def _sampler(self, sampler: Sampler | None) -> Sampler | None:
        return sampler if self.agreed is None else self.agreed(sampler)

    def take(self, reply: Reply) -> Made | None:
        """The reply's next token. The others of its batch get their next one, too.

        None when its batch has failed: it goes on once it is revived. Raises `BudgetError`, with nothing changed,
        where there is no room for it.
        """
        if not reply.made and reply.guard.error is None and reply.has_caches:
            if self._is_late:
                self._merge()
            self._step(reply.steps)
        if reply.made:
            return reply.made.popleft()
        if reply.guard.error is not None:
            raise reply.guard.error
        return None

    def makes_room(self, reply: Reply) -> bool:
        """Whether a reply that gets what fits can take its next step: room is made for it now.

        While others run it leaves them a part of the memory. Raises `BudgetError` where there will be room soon.
        """
        steps = reply.steps
        if reply.made or not reply.has_caches or steps.has_room:
            return True
        store, count = self._store, len(steps.replies)
        need = count * self._layout.growth_bytes(steps.capacity, steps.more_rows)
        is_only = store.budget.running_bytes == steps.claim.nbytes and count == 1
        most = LEAVES_TO_OTHERS * store.budget.limit_bytes
        if not is_only and store.budget.running_bytes + need > most:
            if reply.speculation is None:
                return False
            reply.speculation.end(None)  # what drafts it may hold more than the reply itself
            reply.speculation = None
            return self.makes_room(reply)
        try:
            steps.grow()
        except BudgetError as error:
            if error.fits_soon:
                raise
            return False
        return True

    def revive(self, reply: Reply) -> None:
        """Go on alone: its live caches stand again where those of its failed batch stood."""
        assert reply.live.position == reply.position and not reply.has_caches
        reply.steps.batch.caches = reply.live.caches

    def take_back(self, reply: Reply) -> None:
        """Of a lone reply's drafts what nobody took goes back, so that it ends with what was taken."""
        count = len(reply.made)
        if reply.speculation is None or not count or reply.guard.error is not None:
            return
        reply.speculation.take_back(count)
        reply.made.clear()
        del reply.read[-count:]
        reply.live.position = reply.position

    def end(self, reply: Reply, *, keep: bool) -> None:
        """Let a reply go. Its live caches stand at its position then, with what nobody took of it.

        From a batch they are taken only to `keep` them: there are none when a step of it failed half
        way, or when there is no room to take them out.
        """
        steps = reply.steps
        if reply.speculation is not None:
            reply.speculation.let_go()
        if not steps.is_merged:
            self._alone.remove(reply)
            steps.batch.caches = []
            steps.replies.clear()  # a cycle would keep the caches until the next collection
            return
        if keep and reply.guard.error is None:
            self._take_out(reply)
        self._leave(reply)

    # Steps

    def _step(self, steps: Steps) -> None:
        """One token for every reply that takes its steps together."""
        if not steps.has_room:
            steps.grow()
        if not steps.is_merged and self._is_spared(steps.replies[0]):
            return
        drawn = [None if reply.draws is None else reply.draws.state for reply in steps.replies]
        try:
            every = steps.batch.next()
        except Exception as error:  # the step is half done: these caches are of no use any more
            if not steps.is_merged or self.agreed is not None:
                for reply in steps.replies:
                    reply.guard.error = error
                raise
            for reply, state in zip(steps.replies, drawn, strict=True):
                if reply.draws is not None and state is not None:
                    reply.draws.state = state
            steps.batch.rewind()
            steps.claim.release()
            self._disband(steps.replies, error)
            return
        for reply, made in zip([*steps.replies], every, strict=True):
            reply.takes(made)
            if steps.is_merged and (reply.is_last or len(reply.made) > UNTAKEN):
                self._set_apart(reply)

    def _is_spared(self, reply: Reply) -> bool:
        """Whether a lone reply has its next tokens without a step of a single one."""
        if self._is_all(reply):
            reply.takes_only(reply.steps.batch.only())
            return True
        return self._speculate(reply)

    def _is_all(self, reply: Reply) -> bool:
        """Whether a lone reply's coming token is all of it, so that a forward over it would be for its end alone.

        That end is two tokens behind the prompt's, which is stored, and whoever goes on from there has a slice to
        read anyway: such replies choose among answers, or ask how long a first token takes. Who sees tokens as
        they are drawn sees this one yet, and so do all ranks of a group.
        """
        if self.agreed is not None or reply.steps.batch.has_processors:
            return False
        return reply.left == 1 and not reply.read

    def _speculate(self, reply: Reply) -> bool:
        """The next tokens of a lone reply by one forward; False where it has nothing to draft."""
        if reply.speculation is None:
            return False
        try:
            every = reply.speculation.step(reply)
        except Exception as error:
            reply.guard.error = error
            raise
        for made in every:
            reply.takes(made)
        return bool(every)

    def _disband(self, replies: Sequence[Reply], error: Exception) -> None:
        """A batch failed. Each of its replies goes on alone, once it has caches again; so do all later ones."""
        log.warning(
            "Replies of this model are decoded one by one from now on: a batch of %d failed (%s). "
            "Each goes on from what is stored of it.",
            len(replies),
            str(error),  # a record that keeps the error keeps the batch's buffers
        )
        self.batches = False
        self._merged = None
        for reply in [*replies]:
            steps = reply.steps
            try:
                batch = steps.batch.single(steps.replies.index(reply), [])
            except Exception as lost:  # not even the tokens that were drawn can be had
                reply.guard.error = lost
                batch = Batch.of_none(self._model)
            self._set_alone(reply, batch)

    def _set_alone(self, reply: Reply, batch: Batch) -> None:
        reply.steps = Alone(batch, reply)
        if reply not in self._alone:
            self._alone.append(reply)

    # Batches

    def _merge(self) -> None:
        """Put every reply that is alone into one batch, if there are two and it is worth it."""
        there = self._merged.replies if self._merged is not None else []
        # Whose clients keep up; what has ended waits for its caches to be stored.
        alone = [reply for reply in self._alone if not reply.made and not reply.is_last]
        self._is_late = len(self._alone) > 1 and any(
            reply.speculation is not None and reply.made and not reply.is_last
            for reply in self._alone
        )
        if not _is_worth_it([*there, *alone]):
            return
        # A batch is a speed-up: nothing that is stored goes for it.
        joining = [reply for reply in alone if reply.live.detach()]
        if joining and _is_worth_it([*there, *joining]) and self._join(joining):
            return
        for reply in joining:
            reply.live.attach()

    def _join(self, joining: list[Reply]) -> bool:
        """The same for replies in whose caches nothing is left; False where there is no free room."""
        before = self._merged
        members = [*(before.replies if before is not None else ()), *joining]
        longest = max(reply.position for reply in members)
        # mlx-lm merges to the exact length, and makes room for more with the next step.
        capacity = max(longest, before.capacity if before is not None else 0)
        claims = [reply.live.claim for reply in joining] + ([before.claim] if before else [])
        held = sum(claim.nbytes for claim in claims)
        granted = {reply: reply.live.claim.nbytes for reply in joining}
        need, passing = batch_bytes(self._layout, len(members), capacity, held)
        extra = self._store.claim_free(passing)
        if extra is None:
            return False
        for reply in joining:
            reply.live.hand_over()
            if reply.speculation is not None:  # in a batch nobody drafts
                reply.speculation.end(reply.read)
                reply.speculation = None
        try:
            batch = together(
                [reply.steps.batch for reply in joining], before.batch if before else None
            )
        except Exception as error:  # caches are merged in part: none of them can go on
            self._disband(members, error)
            return True
        finally:
            for each in [*claims, extra]:
                each.release()
        claim = self._store.claim(max(need, held))  # no more than was released
        granted |= before.granted if before is not None else {}
        self._merged = Together(self._layout, batch, members, capacity, claim, granted)
        for reply in members:
            reply.steps = self._merged
        for reply in joining:
            self._alone.remove(reply)
        return True

    def _take_out(self, reply: Reply) -> bool:
        """Plain caches of one reply of a batch, with a claim of their own; False without room."""
        batch, live = reply.steps.batch, reply.live
        # What mlx-lm makes of an exact size with the next token.
        capacity = reply.position + ROW_STEP
        try:
            live.claim = self._store.claim(self._layout.running_bytes(capacity))
        except BudgetError:
            return False
        caches = batch.extract(reply.steps.replies.index(reply))
        self._layout.stand(caches, reply.position)
        live.stand(caches, reply.position, capacity)
        return True

    def _set_apart(self, reply: Reply) -> None:
        """Give a reply of a batch caches of its own: it has ended, or its client does not take it."""
        if not self._take_out(reply):
            reply.guard.error = BudgetError(
                "There was no memory to set this reply aside, which its client did not take in time."
            )
            self._leave(reply)
            return
        steps = reply.steps
        batch = steps.batch.single(steps.replies.index(reply), reply.live.caches)
        self._leave(reply)
        self._set_alone(reply, batch)

    def _leave(self, reply: Reply) -> None:
        """Take a reply out of its batch, if it is there yet."""
        steps = reply.steps
        if isinstance(steps, Together) and reply in steps.replies:
            steps.remove(reply)
            if not steps.replies and self._merged is steps:
                self._merged = None


def _is_worth_it(members: Sequence[Reply]) -> bool:
    """Whether a batch of these replies pads their rows at most to `WASTE` times as many."""
    rows = [reply.position for reply in members]
    return len(rows) > 1 and len(rows) * max(rows) <= WASTE * sum(rows)
