"""Decode: caches that have read the prompt but its last token in, mlx-lm's responses out.

A lone reply decodes on its plain caches. Several at once decode as one of mlx-lm's batches, formed
when a second one is ready; this is the only file that knows those.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.generate import GenerationBatch, GenerationResponse, StopSequences, _merge_caches
from mlx_lm.sample_utils import greedy_sampler

from . import checkpoint as checkpoints
from .budget import Claim
from .errors import BudgetError
from .layers.adapt import Layout
from .lender import CacheLender
from .loans import Loans
from .tokens import Tokens

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
Sampler = Callable[[mx.array], mx.array]
T = TypeVar("T")

ROW_STEP = 256
"""Buffers are sized in multiples of so many rows, as mlx-lm's own are."""

REPLY_ROOM = 8192
"""Rows kept ready for a reply whose length is not bounded, or bounded higher."""

UNTAKEN = 8
"""Tokens that a batch makes for a reply whose client takes none, before that reply leaves it."""

WASTE = 2.0
"""A batch pads its replies to the longest one. It is formed while that at most doubles their rows."""

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


class _Guard:
    """Lets an error of one reply's sampler or processor end that reply, not its batch."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def sampler(self, sampler: Sampler) -> Sampler:
        def guarded(logprobs: mx.array) -> mx.array:
            try:
                return sampler(logprobs)
            except Exception as error:
                self.error = self.error or error
                return greedy_sampler(logprobs)  # any token: nobody gets to see it

        return guarded

    def processor(self, processor: LogitsProcessor) -> LogitsProcessor:
        def guarded(tokens: mx.array, logits: mx.array) -> mx.array:
            try:
                return processor(tokens, logits)
            except Exception as error:
                self.error = self.error or error
                return logits

        return guarded


@dataclass(eq=False)
class Writer:
    """One reply under way. Its caches stand at `position`; `made` are tokens that nobody took yet.

    It ends with a token of `ends`, or when `left` more are made; negative means no limit.
    """

    position: int
    ends: Collection[int]
    left: int
    claim: Claim
    guard: _Guard
    batch: _Batch
    lender: CacheLender | None
    made: deque[tuple[int, mx.array]] = field(default_factory=deque)


@dataclass(eq=False)
class _Batch:
    """Replies that take their steps together, `capacity` rows each. A lone one is on plain caches."""

    steps: GenerationBatch
    capacity: int
    claim: Claim
    is_merged: bool = False
    writers: list[Writer] = field(default_factory=list)


class Decoder:
    """All replies under way on one model. With `batches=False` each keeps to itself.

    On the CPU a reply has the same bits in a batch as alone (test_batches); on a GPU the shape of a
    batch can change the last ones.
    """

    def __init__(self, model: Any, layout: Layout, loans: Loans, *, batches: bool):
        self._model = model
        self._layout = layout
        self._store, self._loans = loans.store, loans
        self._batches = batches and layout.batches_exactly
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
        guard = _Guard()
        draws = sampler if sampler is None or seed is None else _drawing(sampler, seed)
        steps = GenerationBatch(
            self._model,
            [0],
            mx.array(tokens[-1:]),
            ready.caches,
            [tokens[:-1].tolist() if logits_processors else []],
            [greedy_sampler if draws is None else guard.sampler(draws)],
            greedy_sampler,
            [[guard.processor(each) for each in logits_processors or ()]],
            [StopSequences()],
            [NO_LIMIT],
        )
        mx.eval(steps._next_tokens)  # the first step is done before anything is counted
        batch = _Batch(steps, ready.capacity, ready.claim)
        writer = Writer(len(tokens), ends, max_tokens, ready.claim, guard, batch, ready.lender)
        batch.writers.append(writer)
        self._alone.append(writer)
        if self._batches:
            self._merge()
        return writer

    def take(self, writer: Writer) -> tuple[int, mx.array]:
        """The reply's next token and all log-probabilities in its place, `(vocabulary,)`.

        The others of its batch get their next one, too.
        """
        if not writer.made:
            if writer.guard.error is not None:
                raise writer.guard.error
            self._step(writer.batch)
        return writer.made.popleft()

    def end(self, writer: Writer, *, keep: bool) -> list[Any] | None:
        """Let a reply go, and return its plain caches, which `writer.claim` then pays for.

        From a batch they are taken only to `keep` them: None when a step of it failed half way, or
        when there is no room to take them out.
        """
        batch = writer.batch
        if not batch.is_merged:
            self._alone.remove(writer)
            batch.writers.clear()  # a cycle would keep the caches until the next collection
            plain, batch.steps.prompt_cache = list(batch.steps.prompt_cache), []
            return plain
        caches = self._take_out(writer) if keep and writer.guard.error is None else None
        self._leave(writer)
        return caches

    # Steps

    def _step(self, batch: _Batch) -> None:
        """One token for every reply of a batch."""
        longest = max(writer.position for writer in batch.writers)
        if longest + 1 > batch.capacity:
            self._grow(batch)
        try:
            responses = batch.steps.next()
        except Exception as error:  # the step is half done: no reply of this batch can go on
            for writer in batch.writers:
                writer.guard.error = error
            raise
        for writer, response in zip(list(batch.writers), responses, strict=True):
            writer.position += 1
            writer.left -= 1
            writer.made.append((response.token, response.logprobs))
            is_last = writer.left == 0 or response.token in writer.ends
            if batch.is_merged and (is_last or len(writer.made) > UNTAKEN):
                self._set_apart(writer)

    def _grow(self, batch: _Batch) -> None:
        """More room, while the old buffers and the new ones are both held for a moment."""
        count = len(batch.writers)
        more = ROW_STEP if batch.is_merged else REPLY_ROOM
        passing = count * batch.capacity * max(kind.row_bytes for kind in self._layout.kinds)
        batch.claim.grow(count * more * self._layout.row_bytes, passing=passing)
        batch.capacity += more
        if not batch.is_merged:  # mlx-lm's batches grow by themselves
            checkpoints.grow(self._layout, batch.steps.prompt_cache, batch.capacity)

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
        if not self._loans.own(writer.lender, may_evict=True):
            return False
        self._loans.lends_no_more(writer.lender)  # at once: what makes room next would borrow again
        return True

    def _join(self, joining: list[Writer]) -> bool:
        """The same for replies from whom nothing is borrowed; False without room."""
        before = self._merged
        members = [*(before.writers if before is not None else ()), *joining]
        longest = max(writer.position for writer in members)
        # mlx-lm merges to the exact length, and makes room for more with the next step.
        capacity = max(longest, before.capacity if before is not None else 0)
        held = sum(writer.claim.nbytes for writer in joining) if before is not None else 0
        need, passing = batch_bytes(self._layout, len(members), capacity, held)
        try:  # beside what they hold themselves, until they are merged
            claim = self._store.claim(need + passing)
        except BudgetError:
            return False
        for writer in joining:
            if writer.lender is not None:
                writer.lender.let_go()
                writer.lender = None
        merged = _merge_caches([writer.batch.steps.prompt_cache for writer in joining])
        first, *others = (writer.batch.steps for writer in joining)
        first.prompt_cache = merged
        for other in others:
            other.prompt_cache = []
            first.extend(other)
        if before is not None:
            before.steps.extend(first)
        steps = before.steps if before is not None else first
        mx.eval([cache.state for cache in steps.prompt_cache])
        claim.shrink(need)
        if before is not None:
            before.claim.release()
        for writer in joining:
            writer.claim.release()
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
        steps, shared = GenerationBatch.empty(self._model, greedy_sampler), batch.steps
        steps.uids, steps.prompt_cache = [0], caches
        for name in ("tokens", "samplers", "logits_processors", "stop_sequences", "max_tokens"):
            setattr(steps, name, [getattr(shared, name)[index]])
        for name in ("_next_logprobs", "_token_context", "_num_tokens", "_matchers"):
            setattr(steps, name, [getattr(shared, name)[index]])
        steps._next_tokens = shared._next_tokens[index : index + 1]
        mx.eval(steps._next_tokens, steps._next_logprobs)
        self._leave(writer)
        writer.batch = _Batch(steps, writer.position + ROW_STEP, writer.claim, writers=[writer])
        self._alone.append(writer)


def respond(
    decoder: Decoder,
    writer: Writer,
    tokenizer: Any,
    *,
    prompt_tokens: int,
    prefill_seconds: float,
) -> Iterator[GenerationResponse]:
    """A reply as mlx-lm's `stream_generate` gives it, to its end.

    When the k-th response is yielded, the reply's caches stand k tokens behind the prompt, but for
    tokens that its batch made ahead.
    """
    detokenizer = tokenizer.detokenizer
    began = time.perf_counter()
    count, finish = 0, None
    while finish is None:
        token, logprobs = decoder.take(writer)
        count += 1
        if token in writer.ends:
            finish = "stop"
        else:
            detokenizer.add_token(token)
            finish = "length" if writer.left == len(writer.made) == 0 else None
        if finish is not None:
            detokenizer.finalize()
        yield GenerationResponse(
            text=detokenizer.last_segment,
            token=token,
            logprobs=logprobs,
            from_draft=False,
            prompt_tokens=prompt_tokens,
            prompt_tps=prompt_tokens / max(prefill_seconds, 1e-9),
            generation_tokens=count,
            generation_tps=count / max(time.perf_counter() - began, 1e-9),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish,
        )


def _is_worth_it(members: Sequence[Writer]) -> bool:
    """Whether a batch of these replies pads their rows at most to `WASTE` times as many."""
    rows = [writer.position for writer in members]
    return len(rows) > 1 and len(rows) * max(rows) <= WASTE * sum(rows)


def rounded(rows: int) -> int:
    """So many rows as buffers have."""
    return -(-rows // ROW_STEP) * ROW_STEP


def request_rows(prompt_tokens: int, max_tokens: int) -> int:
    """Rows of a request's caches: its prompt and room for its reply. `max_tokens <= 0` means no limit."""
    room = min(max_tokens, REPLY_ROOM) if max_tokens > 0 else REPLY_ROOM
    return rounded(prompt_tokens + room)


def batch_bytes(
    layout: Layout, members: int, capacity: int, joining_bytes: int = 0
) -> tuple[int, int]:
    """What a batch of `members` replies with `capacity` rows each claims, and what for a moment more.

    Both beside what its members hold until they are merged. `joining_bytes` are those of the members
    that come to a batch which is there already: their caches are merged twice.
    """
    passing = joining_bytes + members * ROW_STEP * layout.row_bytes
    return members * layout.running_bytes(capacity), passing


def _drawing(sampler: Sampler, seed: int) -> Sampler:
    """A sampler with a random stream of its own: MLX has one per thread, and replies take turns."""
    state = seed

    def draw(logprobs: mx.array) -> mx.array:
        nonlocal state
        mx.random.seed(state)
        token = sampler(logprobs)
        state = random_state()
        return token

    return draw


def seeded(steps: Iterator[T], seed: int | None) -> Iterator[T]:
    """The same steps, each drawing from a random stream of their own, which `seed` begins."""
    while True:
        if seed is not None:
            mx.random.seed(seed)
        try:
            step = next(steps)
        except StopIteration:
            return
        if seed is not None:
            seed = random_state()
        yield step


def random_state() -> int:
    """This thread's random state as the seed that would bring it back."""
    state: Any = mx.random.state  # mlx declares it as an object
    high, low = (int(word) for word in state[0].tolist())
    return high << 32 | low
