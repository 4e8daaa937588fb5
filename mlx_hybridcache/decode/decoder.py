"""Decode: caches that have read the prompt but its last token in, tokens out.

A lone reply decodes on its plain caches. Several at once decode as one of mlx-lm's batches, formed
when a second one is ready; this is the only file that knows those.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.generate import (
    GenerationBatch,
    StopSequences,
    _merge_caches,
)
from mlx_lm.models.cache import TokenBuffer
from mlx_lm.sample_utils import greedy_sampler

from ..caches import checkpoint as checkpoints
from ..caches.layout import Layout
from ..caches.live import CacheLender
from ..caches.room import (
    REPLY_ROOM,
    ROW_STEP,
    batch_bytes,
    rounded,
)
from ..errors import BudgetError
from ..store.budget import Claim
from ..store.materialize import Loans
from ..tokens import Tokens
from .sampling import Draws, Guard, LogitsProcessor, Sampler

log = logging.getLogger("mlx_hybridcache")

UNTAKEN = 8
"""Tokens that a batch makes for a reply whose client takes none, before that reply leaves it."""

WASTE = 2.0
"""A batch pads its replies to the longest one. It is formed while that at most doubles their rows."""

LEAVES_TO_OTHERS = 0.75
"""A reply that gets what fits grows only while running requests hold no more of the budget."""

NO_LIMIT = 2**31
"""Where a reply ends is decided here: a batch would let go of what it ends."""


@dataclass(frozen=True)
class Prepared:
    """Caches that stand at `position`, with room for `capacity` tokens, paid for by `claim`.

    The store may leave rows with `lender`, which is these caches, as long as they are.
    """

    caches: list[Any]
    position: int
    capacity: int
    claim: Claim
    lender: CacheLender | None = None


@dataclass(eq=False)
class Writer:
    """One reply under way. Its caches have read `start` tokens of a prompt and those in `read`.

    `made` are the last of these, which nobody took yet. It ends with a token of `ends`, or when `left`
    more are made; negative means no limit. `draws` is its random stream, if it has one.
    """

    start: int
    ends: Collection[int]
    left: int
    claim: Claim
    guard: Guard
    draws: Draws | None
    batch: _Batch
    lender: CacheLender | None
    read: list[int] = field(default_factory=list)
    made: deque[tuple[int, mx.array]] = field(default_factory=deque)

    @property
    def position(self) -> int:
        """Where its caches stand."""
        return self.start + len(self.read)

    @property
    def has_caches(self) -> bool:
        """False when its batch failed, until it is revived."""
        return bool(self.batch.steps.prompt_cache)

    @property
    def coming(self) -> int:
        """The token that is drawn already and that its caches read next."""
        token: mx.array = self.batch.steps._next_tokens
        return int(token)


@dataclass(eq=False)
class _Batch:
    """Replies that take their steps together, `capacity` rows each. A lone one is on plain caches."""

    steps: GenerationBatch
    capacity: int
    claim: Claim
    is_merged: bool = False
    writers: list[Writer] = field(default_factory=list)

    @property
    def has_room(self) -> bool:
        """Whether there are rows for the next step."""
        return max(writer.position for writer in self.writers) < self.capacity


class Decoder:
    """All replies under way on one model. With `batches=False` each keeps to itself.

    Whether a reply is the same in a batch as alone is for `batching` to say.
    """

    def __init__(self, model: Any, layout: Layout, loans: Loans, *, batches: bool):
        self._model = model
        self._layout = layout
        self._store, self._loans = loans.store, loans
        self._batches = batches
        self._merged: _Batch | None = None
        self._alone: list[Writer] = []

    def begin(
        self,
        tokens: Tokens,
        ready: Prepared,
        *,
        ends: Collection[int],
        max_tokens: int,
        sampler: Sampler | None = None,
        logits_processors: Sequence[LogitsProcessor] | None = None,
        seed: int | None = None,
    ) -> Writer:
        """A reply behind `tokens` (int32, `(n,)`), whose caches stand at `n - 1`.

        It ends with one of the tokens in `ends` or with `max_tokens`, if positive. Processors see the whole prompt. `seed` is the state of the random stream that the sampler
        draws from, kept apart from other replies' on this thread.
        """
        guard = Guard()
        draws = None if sampler is None or seed is None else Draws(sampler, seed)
        sampler = sampler if draws is None else draws
        steps = GenerationBatch(
            self._model,
            [0],
            mx.array(tokens[-1:]),
            ready.caches,
            [tokens[:-1].tolist() if logits_processors else []],
            [greedy_sampler if sampler is None else guard.sampler(sampler)],
            greedy_sampler,
            [[guard.processor(each) for each in logits_processors or ()]],
            [StopSequences()],
            [NO_LIMIT],
        )
        mx.eval(steps._next_tokens)  # the first step is done before anything is counted
        batch = _Batch(steps, ready.capacity, ready.claim)
        writer = Writer(
            len(tokens), ends, max_tokens, ready.claim, guard, draws, batch, ready.lender
        )
        batch.writers.append(writer)
        self._alone.append(writer)
        if self._batches:
            self._merge()
        return writer

    def take(self, writer: Writer) -> tuple[int, mx.array] | None:
        """The reply's next token and all log-probabilities in its place, `(vocabulary,)`.

        The others of its batch get their next one, too. None when its batch has failed: it goes on
        once it is revived.
        """
        if not writer.made and writer.guard.error is None and writer.has_caches:
            self._step(writer.batch)
        if writer.made:
            return writer.made.popleft()
        if writer.guard.error is not None:
            raise writer.guard.error
        return None

    def makes_room(self, writer: Writer) -> bool:
        """Whether a reply that gets what fits can take its next step: room is made for it now.

        While others run it leaves them a part of the memory.
        """
        batch = writer.batch
        if writer.made or not writer.has_caches or batch.has_room:
            return True
        store = self._store
        need = len(batch.writers) * self._more_rows(batch) * self._layout.row_bytes
        is_alone = store.running_bytes == batch.claim.nbytes and len(batch.writers) == 1
        if not is_alone and store.running_bytes + need > LEAVES_TO_OTHERS * store.budget_bytes:
            return False
        try:
            self._grow(batch)
        except BudgetError:
            return False
        return True

    def revive(self, writer: Writer, ready: Prepared) -> None:
        """Go on alone, on caches that stand where those of its failed batch stood."""
        assert ready.position == writer.position and not writer.has_caches
        writer.claim, writer.lender = ready.claim, ready.lender
        steps = writer.batch.steps
        steps.prompt_cache = ready.caches
        writer.batch = _Batch(steps, ready.capacity, ready.claim, writers=[writer])

    def end(self, writer: Writer, *, keep: bool) -> list[Any] | None:
        """Let a reply go, and return its plain caches, which `writer.claim` then pays for.

        They stand at `writer.position`, which tokens that nobody took are a part of.

        From a batch they are taken only to `keep` them: None when a step of it failed half way, or
        when there is no room to take them out.
        """
        batch = writer.batch
        if not batch.is_merged:
            self._alone.remove(writer)
            batch.writers.clear()  # a cycle would keep the caches until the next collection
            plain, batch.steps.prompt_cache = list(batch.steps.prompt_cache), []
            return plain or None
        caches = self._take_out(writer) if keep and writer.guard.error is None else None
        self._leave(writer)
        return caches

    # Steps

    def _step(self, batch: _Batch) -> None:
        """One token for every reply of a batch."""
        if not batch.has_room:
            self._grow(batch)
        drawn = [None if writer.draws is None else writer.draws.state for writer in batch.writers]
        try:
            responses = batch.steps.next()
        except Exception as error:  # the step is half done: these caches are of no use any more
            if not batch.is_merged:
                batch.writers[0].guard.error = error
                raise
            for writer, state in zip(batch.writers, drawn, strict=True):
                if writer.draws is not None and state is not None:
                    writer.draws.state = state
            steps: Any = batch.steps
            steps._next_tokens = steps._current_tokens  # what this step was to read
            steps._next_logprobs = steps._current_logprobs
            self._disband(batch.writers, error)
            return
        for writer, response in zip(list(batch.writers), responses, strict=True):
            writer.read.append(response.token)
            writer.left -= 1
            writer.made.append((response.token, response.logprobs))
            is_last = writer.left == 0 or response.token in writer.ends
            if batch.is_merged and (is_last or len(writer.made) > UNTAKEN):
                self._set_apart(writer)

    def _more_rows(self, batch: _Batch) -> int:
        """As many as a lone reply has written, so that it is copied seldom, but no more than it may write."""
        if batch.is_merged:
            return ROW_STEP
        (writer,) = batch.writers
        more = min(REPLY_ROOM, max(ROW_STEP, rounded(len(writer.read))))
        return more if writer.left < 0 else min(more, rounded(writer.left))

    def _grow(self, batch: _Batch) -> None:
        """More room, while the old buffers and the new ones are both held for a moment."""
        count, more = len(batch.writers), self._more_rows(batch)
        passing = count * batch.capacity * max(kind.row_bytes for kind in self._layout.kinds)
        batch.claim.grow(count * more * self._layout.row_bytes, passing=passing)
        batch.capacity += more
        if not batch.is_merged:  # mlx-lm's batches grow by themselves
            checkpoints.grow(self._layout, batch.steps.prompt_cache, batch.capacity)

    def _disband(self, writers: Sequence[Writer], error: Exception) -> None:
        """A batch failed. Each of its replies goes on alone, once it has caches again; so do all later ones."""
        log.warning(
            "Replies of this model are decoded one by one from now on: a batch of %d failed (%s). "
            "Each goes on from what is stored of it.",
            len(writers),
            str(error),  # a record that keeps the error keeps the batch's buffers
        )
        self._batches = False
        self._merged = None
        for writer in writers:
            batch = writer.batch
            try:
                steps = self._single(batch.steps, batch.writers.index(writer), [])
            except Exception as lost:  # not even the tokens that were drawn can be had
                writer.guard.error = lost
                steps = GenerationBatch.empty(self._model, greedy_sampler)
            batch.claim.release()
            writer.claim = Claim(self._store, 0)
            writer.batch = _Batch(steps, 0, writer.claim, writers=[writer])
            if writer not in self._alone:
                self._alone.append(writer)

    # Batches

    def _merge(self) -> None:
        """Put every reply that is alone into one batch, if there are two and it is worth it."""
        there = self._merged.writers if self._merged is not None else []
        alone = [writer for writer in self._alone if not writer.made]  # their clients keep up
        if not _is_worth_it([*there, *alone]):
            return
        joining = [writer for writer in alone if self._stop_lending(writer)]
        if joining and _is_worth_it([*there, *joining]) and self._join(joining):
            return
        for writer in joining:
            if writer.lender is not None:
                self._loans.lend(writer.lender)

    def _stop_lending(self, writer: Writer) -> bool:
        """Let the store have all of this reply's rows itself, so that its caches may go; False without room."""
        if writer.lender is None:
            return True
        # A batch is a speed-up: nothing that is stored goes for it.
        if not self._loans.own(writer.lender):
            return False
        self._loans.lends_no_more(writer.lender)  # at once: what makes room next would borrow again
        return True

    def _join(self, joining: list[Writer]) -> bool:
        """The same for replies from whom nothing is borrowed; False where there is no free room."""
        before = self._merged
        members = [*(before.writers if before is not None else ()), *joining]
        longest = max(writer.position for writer in members)
        # mlx-lm merges to the exact length, and makes room for more with the next step.
        capacity = max(longest, before.capacity if before is not None else 0)
        claims = [writer.claim for writer in joining] + ([before.claim] if before else [])
        held = sum(claim.nbytes for claim in claims)
        need, passing = batch_bytes(self._layout, len(members), capacity, held)
        extra = self._store.claim_free(passing)
        if extra is None:
            return False
        for writer in joining:
            if writer.lender is not None:
                writer.lender.let_go()
                writer.lender = None
        try:
            steps = _together(
                [writer.batch.steps for writer in joining], before.steps if before else None
            )
        except Exception as error:  # caches are merged in part: none of them can go on
            extra.release()
            self._disband(members, error)
            return True
        for each in [*claims, extra]:
            each.release()
        claim = self._store.claim(need)  # no more than was released
        for writer in joining:
            self._alone.remove(writer)
        self._merged = batch = _Batch(steps, capacity, claim, is_merged=True, writers=members)
        for writer in members:
            writer.batch, writer.claim = batch, claim
        return True

    def _take_out(self, writer: Writer) -> list[Any] | None:
        """Plain caches of one reply of a batch, with a claim of its own; None without room."""
        batch = writer.batch
        # What mlx-lm makes of an exact size with the next token.
        capacity = writer.position + ROW_STEP
        try:
            writer.claim = self._store.claim(self._layout.running_bytes(capacity))
        except BudgetError:
            return None
        caches = batch.steps.extract_cache(batch.writers.index(writer))
        mx.eval([cache.state for cache in caches])
        self._layout.stand(caches, writer.position)
        return list(caches)

    def _leave(self, writer: Writer) -> None:
        """Take a reply out of its batch; the others close up."""
        batch = writer.batch
        left = [other for other in batch.writers if other is not writer]
        batch.steps.filter([i for i, other in enumerate(batch.writers) if other is not writer])
        batch.writers = left
        if writer.claim is batch.claim:
            writer.claim = Claim(self._store, 0)
        if left:
            mx.eval([cache.state for cache in batch.steps.prompt_cache])
            # The padding that only this one needed goes with it.
            batch.capacity -= max(0, writer.position - max(other.position for other in left))
            batch.claim.shrink(len(left) * self._layout.running_bytes(batch.capacity))
        else:
            batch.claim.release()
            self._merged = None

    def _set_apart(self, writer: Writer) -> None:
        """Give a reply of a batch caches of its own: it has ended, or its client does not take it."""
        batch, index = writer.batch, writer.batch.writers.index(writer)
        caches = self._take_out(writer)
        if caches is None:
            writer.guard.error = BudgetError(
                "There was no memory to set this reply aside, which its client did not take in time."
            )
            self._leave(writer)
            return
        steps = self._single(batch.steps, index, caches)
        self._leave(writer)
        writer.batch = _Batch(steps, writer.position + ROW_STEP, writer.claim, writers=[writer])
        self._alone.append(writer)

    def _single(self, shared: Any, index: int, caches: list[Any]) -> Any:
        """The steps of one reply of a batch, on plain `caches` of its own."""
        steps = GenerationBatch.empty(self._model, greedy_sampler)
        steps.uids, steps.prompt_cache = [0], caches
        for name in ("tokens", "samplers", "logits_processors", "stop_sequences", "max_tokens"):
            setattr(steps, name, [getattr(shared, name)[index]])
        for name in ("_next_logprobs", "_num_tokens", "_matchers"):
            setattr(steps, name, [getattr(shared, name)[index]])
        # Not the buffer of a step that failed, which may have taken its token in already.
        steps._token_context = [TokenBuffer(list(steps.tokens[0]))]
        steps._next_tokens = shared._next_tokens[index : index + 1]
        mx.eval(steps._next_tokens, steps._next_logprobs)
        return steps


def merged(every: Sequence[Sequence[Any]]) -> list[Any]:
    """One set of mlx-lm's batch caches out of the plain ones of several replies, unevaluated."""
    return list(_merge_caches(every))


def _together(
    joining: Sequence[GenerationBatch], before: GenerationBatch | None
) -> GenerationBatch:
    """The steps of lone replies as those of one batch, which grows where there was one `before`.

    A layer at a time, and each lets go of what it was made from: their plain caches have no other holder.
    """
    columns = [steps.prompt_cache for steps in joining]
    caches = before.prompt_cache if before is not None else []
    for layer in range(len(columns[0])):
        (cache,) = merged([column[layer : layer + 1] for column in columns])
        for column in columns:
            column[layer] = None
        if before is None:
            caches.append(cache)
        else:
            caches[layer].extend(cache)
        del cache
        mx.eval(caches[layer].state)
        mx.clear_cache()
    for steps in joining:
        steps.prompt_cache = []
    whole, *others = (*joining,) if before is None else (before, *joining)
    for other in others:
        whole.extend(other)
    whole.prompt_cache = caches
    return whole


def _is_worth_it(members: Sequence[Writer]) -> bool:
    """Whether a batch of these replies pads their rows at most to `WASTE` times as many."""
    rows = [writer.position for writer in members]
    return len(rows) > 1 and len(rows) * max(rows) <= WASTE * sum(rows)
