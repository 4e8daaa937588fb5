"""mlx-lm's batches: the one file that knows `GenerationBatch`, of one reply or of several.

A lone reply decodes on its plain caches, several on one set of mlx-lm's merged ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import (
    GenerationBatch,
    StopSequences,
    _merge_caches,
)
from mlx_lm.models.cache import TokenBuffer
from mlx_lm.sample_utils import greedy_sampler

from ..tokens import Tokens
from .sampling import LogitsProcessor, Sampler

NO_LIMIT = 2**31
"""Where a reply ends is decided by the decoder: a batch would let go of what it ends."""


class Made(NamedTuple):
    """A token, all log-probabilities in its place, `(vocabulary,)`, and whether it was drafted."""

    token: int
    logprobs: mx.array
    from_draft: bool = False


class Batch:
    """Replies that take their steps together, in order."""

    def __init__(self, model: Any, steps: GenerationBatch):
        self._model = model
        self._steps: Any = steps

    @classmethod
    def of_one(
        cls,
        model: Any,
        tokens: Tokens,
        caches: list[Any],
        sampler: Sampler | None,
        processors: Sequence[LogitsProcessor],
    ) -> Batch:
        """A reply behind `tokens` (int32, `(n,)`), whose plain caches stand at `n - 1`.

        They read the last one, and the first token of the reply is drawn.
        """
        steps = GenerationBatch(
            model,
            [0],
            mx.array(tokens[-1:]),
            caches,
            [tokens[:-1].tolist() if processors else []],
            [greedy_sampler if sampler is None else sampler],
            greedy_sampler,
            [[*processors]],
            [StopSequences()],
            [NO_LIMIT],
        )
        mx.eval(steps._next_tokens)  # the first step is done before anything is counted
        return cls(model, steps)

    @classmethod
    def of_none(cls, model: Any) -> Batch:
        """For a reply of which nothing is left."""
        return cls(model, GenerationBatch.empty(model, greedy_sampler))

    @property
    def caches(self) -> list[Any]:
        """What is decoded on: the very list. Plain caches, or mlx-lm's merged ones; empty when let go."""
        caches: list[Any] = self._steps.prompt_cache
        return caches

    @caches.setter
    def caches(self, caches: list[Any]) -> None:
        self._steps.prompt_cache = caches

    @property
    def coming(self) -> int:
        """The token of a lone reply that is drawn already, and that its caches read next."""
        return int(self._steps._next_tokens)

    def next(self) -> list[Made]:
        """One token for every reply."""
        return [Made(each.token, each.logprobs) for each in self._steps.next()]

    @property
    def has_processors(self) -> bool:
        """Whether anybody follows the tokens of these replies as they are drawn."""
        return any(self._steps.logits_processors)

    def only(self) -> Made:
        """The coming token of a lone reply that is all of it: its caches do not read it."""
        (logprobs,) = self._steps._next_logprobs
        mx.eval(logprobs)  # who gets it may be on another thread
        return Made(self.coming, logprobs)

    def verified(
        self,
        block: Sequence[int],
        logits: mx.array,
        ends: Collection[int],
        has_failed: Callable[[], bool],
    ) -> list[Made]:
        """The beginning of `block` that a lone reply would have written one by one.

        The block is its coming token and drafted ones, which its caches have read; `logits` are
        `(len(block), vocabulary)`. What is drawn behind each token says whether the next one is
        right, so that samplers and processors are asked as often as without a draft, and for the
        same. It ends with the first token in `ends`, or when `has_failed`.
        """
        steps, made = self._steps, []
        logprobs = steps._next_logprobs[0]
        draws = self._draws(block, logits)
        for index, token in enumerate(block):
            made.append(Made(token, logprobs, from_draft=index > 0))
            drawn, logprobs = next(draws)
            is_right = block[index + 1 : index + 2] == [int(drawn)]
            if token in ends or has_failed() or not is_right:
                break
        mx.eval(logprobs, [each.logprobs for each in made])
        steps.tokens[0].extend(each.token for each in made)
        steps._current_tokens = mx.array([made[-1].token])
        steps._current_logprobs = [made[-1].logprobs]
        steps._next_tokens, steps._next_logprobs = drawn, [logprobs]
        return made

    def _draws(self, block: Sequence[int], logits: mx.array) -> Iterator[tuple[mx.array, mx.array]]:
        """What is drawn behind each token, `(1,)`, and the log-probabilities there, `(vocabulary,)`."""
        (sampler,), (processors,) = self._steps.samplers, self._steps.logits_processors
        if sampler is greedy_sampler and not processors:
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            drawn = sampler(logprobs)
            mx.eval(drawn)
            yield from zip(mx.split(drawn, len(block)), logprobs, strict=True)
            return
        (context,) = self._steps._token_context
        for index, token in enumerate(block):
            row = logits[index : index + 1]
            if processors:
                seen = context.update_and_fetch(mx.array([token]))
                for processor in processors:
                    row = processor(seen, row)
            row = row - mx.logsumexp(row, axis=-1, keepdims=True)
            yield sampler(row), row[0]

    def rewind(self) -> None:
        """A step failed half way: what it was to read is still to be read."""
        steps = self._steps
        steps._next_tokens, steps._next_logprobs = steps._current_tokens, steps._current_logprobs

    def extract(self, index: int) -> list[Any]:
        """Plain caches of one reply, evaluated."""
        caches = list(self._steps.extract_cache(index))
        mx.eval([cache.state for cache in caches])
        return caches

    def remove(self, index: int, count: int) -> None:
        """Take one of `count` replies out; the others close up."""
        self._steps.filter([i for i in range(count) if i != index])
        if count > 1:
            mx.eval([cache.state for cache in self.caches])

    def single(self, index: int, caches: list[Any]) -> Batch:
        """One of its replies by itself, on plain `caches`."""
        steps, shared = GenerationBatch.empty(self._model, greedy_sampler), self._steps
        steps.uids, steps.prompt_cache = [0], caches
        for name in ("tokens", "samplers", "logits_processors", "stop_sequences", "max_tokens"):
            setattr(steps, name, [getattr(shared, name)[index]])
        for name in ("_next_logprobs", "_num_tokens", "_matchers"):
            setattr(steps, name, [getattr(shared, name)[index]])
        # Not the buffer of a step that failed, which may have taken its token in already.
        steps._token_context = [TokenBuffer(list(steps.tokens[0]))]
        steps._next_tokens = shared._next_tokens[index : index + 1]
        mx.eval(steps._next_tokens, steps._next_logprobs)
        return Batch(self._model, steps)


def together(joining: Sequence[Batch], before: Batch | None) -> Batch:
    """Lone replies as one batch, which grows where there was one `before`.

    A layer at a time, and each lets go of what it was made from: their plain caches have no other holder.
    """
    columns = [each.caches for each in joining]
    caches = before.caches if before is not None else []
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
    for each in joining:
        each.caches = []
    whole, *others = (*joining,) if before is None else (before, *joining)
    for other in others:
        whole._steps.extend(other._steps)
    whole.caches = caches
    return whole


def merged(every: Sequence[Sequence[Any]]) -> list[Any]:
    """One set of mlx-lm's batch caches out of the plain ones of several replies, unevaluated."""
    return list(_merge_caches(every))
