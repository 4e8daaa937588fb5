"""The engine: match, restore, replay, save, generate. The journey of a request stands in `_answer`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from types import TracebackType
from typing import Any, Self

import mlx.core as mx
import numpy as np
from mlx_lm.generate import GenerationResponse, stream_generate, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import checkpoint as checkpoints
from . import models
from .errors import (
    BudgetError,
    CacheMismatchError,
    ClosedError,
    HybridCacheError,
    PromptError,
    SettingError,
)
from .generate import decode, random_state
from .layers.adapt import Layout, fresh_caches
from .replay import plan, replay
from .report import CacheReport, Reason
from .schedule import Grid, Reading
from .sizes import format_bytes, parse_bytes
from .store import Claim, Found, Store, StoreStats
from .tokens import Tokens, learn_turn_marks, namespace, prompt_tokens
from .worker import PAUSE, Pause, Stream, Worker

log = logging.getLogger("mlx_hybridcache")

ROW_STEP = 256
"""Buffers are sized in multiples of so many rows, as mlx-lm's own are."""

REPLY_ROOM = 8192
"""Rows kept ready for a reply whose length is not bounded, or bounded higher."""

UNCACHED_OPTIONS = ("kv_bits", "max_kv_size", "draft_model", "input_embeddings", "prompt_cache")
"""Options of `mlx_lm.stream_generate` whose requests are served without the cache, and say so."""

Progress = Callable[[int, int], None]


@dataclass(eq=False)
class _Request:
    """One request on its way: what was asked, and the account kept of it."""

    tokens: Tokens
    max_tokens: int = 0
    boundaries: tuple[int, ...] = ()
    on_progress: Progress = field(default=lambda read, total: None)
    report: CacheReport | None = None
    forwards: int = 0
    taken: int = 0
    refused: int = 0


@dataclass(frozen=True)
class Ready:
    """Caches for a framework that runs the model itself.

    `prompt_cache` are mlx-lm caches that stand at `position`; `rest` are the prompt's tokens from
    there on, at least one. They count against the budget until `release` is called or this object
    is dropped.
    """

    prompt_cache: list[Any]
    rest: list[int]
    position: int
    report: CacheReport
    _claim: _HeldClaim

    def release(self) -> None:
        """Say that the caches are no longer used."""
        self._claim.release()


class _HeldClaim:
    """A claim given back on the worker thread, at the latest when its holder is dropped."""

    def __init__(self, claim: Claim | None, worker: Worker):
        self._claim, self._worker = claim, worker

    def release(self) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            self._worker.post(claim.release)

    def __del__(self) -> None:
        self.release()


class Generation:
    """A reply under way: iterate for mlx-lm's `GenerationResponse`s, from any thread.

    `report` says what the cache did, from the moment the prompt is read. Closing it, or dropping
    it, cancels the request; what was read stays stored.
    """

    def __init__(self, request: _Request, stream: Stream[GenerationResponse]):
        self._request = request
        self._stream = stream

    def __iter__(self) -> Iterator[GenerationResponse]:
        return self

    def __next__(self) -> GenerationResponse:
        return next(self._stream)

    def close(self) -> None:
        """Stop here. Returns when the work has stopped."""
        self._stream.close()

    @property
    def report(self) -> CacheReport | None:
        """What the cache did for this request; None until its prompt is read."""
        return self._request.report


class HybridPromptCache:
    """A prompt cache for one model, hybrid or not. Every method may be called from any thread.

    `memory_budget` is bytes or text with a unit and bounds the store and the running requests
    together. `exact` makes hot and cold agree bit for bit on devices where the shape of a slice
    changes the last bits, at the cost of at most one step of replay. `prefill_step_size` and
    `checkpoint_every` are tokens. `swa_full` stores every row of sliding windows, which then
    restore at any position, not at checkpoints only. `cache_salt` separates namespaces.

    Raises `BudgetError` when the budget is smaller than one checkpoint with its rows.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        memory_budget: int | str | None = None,
        exact: bool = False,
        prefill_step_size: int = 2048,
        checkpoint_every: int = 2048,
        checkpoint_min_step: int = 512,
        swa_full: bool = False,
        cache_salt: str = "",
    ):
        if prefill_step_size < 1 or checkpoint_every < 1 or checkpoint_min_step < 1:
            raise ValueError(
                "prefill_step_size, checkpoint_every and checkpoint_min_step are >= 1."
            )
        if tokenizer is not None and not isinstance(tokenizer, TokenizerWrapper):
            tokenizer = TokenizerWrapper(tokenizer)
        models.evaluate(model)
        self.model, self.tokenizer = model, tokenizer
        self.layout = Layout.of(model, prefill_step_size, swa_full=swa_full)
        every = -(-checkpoint_every // prefill_step_size) * prefill_step_size
        self.grid = Grid(prefill_step_size, every, checkpoint_min_step, self.layout.alignment)
        self.exact = exact
        self.marks = learn_turn_marks(tokenizer)
        self.namespace = namespace(
            model=models.fingerprint(model),
            salt=cache_salt,
            swa_full=swa_full,
            exact=(str(mx.default_device()), version("mlx"), prefill_step_size) if exact else False,
        )
        budget = models.default_budget(model) if memory_budget is None else memory_budget
        self._store = Store(
            parse_bytes(budget),
            needs_checkpoints=self.layout.needs_snapshots,
            stride=prefill_step_size if exact else 1,
        )
        self._check_budget()
        self.last_report: CacheReport | None = None
        if self.layout.unsupported:
            log.warning(
                "%s cannot be stored by this version: requests are served without the cache.",
                ", ".join(self.layout.unsupported),
            )
        self._worker = Worker(held=lambda: _mlx_thread(model), name="mlx-hybridcache")

    def _check_budget(self) -> None:
        smallest = self.layout.running_bytes(ROW_STEP) + self.layout.snapshot_bytes
        smallest += ROW_STEP * self.layout.row_bytes
        if self._store.budget_bytes < smallest:
            raise BudgetError(
                f"memory_budget is {format_bytes(self._store.budget_bytes)}; one running request of "
                f"{ROW_STEP} tokens and one checkpoint of this model need {format_bytes(smallest)}."
            )

    # Generating

    def stream_generate(
        self,
        prompt: str | Iterable[int],
        max_tokens: int = 256,
        *,
        boundaries: Sequence[int] = (),
        prompt_progress_callback: Progress | None = None,
        **options: Any,
    ) -> Generation:
        """A reply to `prompt`, text or token ids; keyword arguments are `mlx_lm.stream_generate`'s.

        `boundaries` declares positions worth a checkpoint. Samplers, logits processors and the
        progress callback run on the worker thread; samplers draw from the calling thread's random
        state as it is now. Raises `PromptError` before any work for a prompt that cannot be read.
        """
        if self.tokenizer is None:
            raise HybridCacheError(
                "stream_generate needs a tokenizer; give one to the constructor."
            )
        if max_tokens == 0:
            raise SettingError("max_tokens must not be zero (use -1 for no limit).")
        request = self._request(prompt, boundaries, prompt_progress_callback)
        request.max_tokens = max_tokens
        uncached = [name for name in UNCACHED_OPTIONS if options.get(name) is not None]
        if options.get("sampler") is not None:
            options["seed"] = _take_random_state()
        if uncached or self.layout.unsupported:
            steps = self._answer_uncached(request, uncached, options)
        else:
            for name in (*UNCACHED_OPTIONS, "num_draft_tokens"):
                options.pop(name, None)
            steps = self._answer(request, options)
        return Generation(request, self._worker.stream(steps))

    def _answer(
        self, request: _Request, options: dict[str, Any]
    ) -> Iterator[GenerationResponse | Pause]:
        """The map: what happens to a request, in order. Each `yield` ends a turn of the worker."""
        tokens, began = request.tokens, time.perf_counter()
        found = self._match(request)
        capacity = _rounded(len(tokens) + _reply_room(request.max_tokens))
        claim, found = self._claim(found, capacity)
        try:
            caches = self._restore(found, capacity)
            for _ in self._replay(request, found, caches):
                yield PAUSE
            seconds = time.perf_counter() - began
            request.forwards += 1  # the last token's, which gives the first logits
            request.report = self._report(request, found, seconds)
            reply: list[int] = []
            try:
                for response in decode(
                    self.model,
                    self.tokenizer,
                    tokens,
                    caches,
                    max_tokens=request.max_tokens,
                    prefill_seconds=seconds,
                    before_step=_Room(self.layout, caches, claim, capacity).reach,
                    **options,
                ):
                    reply.append(response.token)
                    request.on_progress(len(tokens), len(tokens))
                    request.on_progress = lambda read, total: None
                    yield response
            except Exception as error:
                # Other errors may leave a step half done: running states would be a token ahead.
                if not isinstance(error, BudgetError):
                    reply.clear()
                raise
            finally:
                self._save_reply(tokens, reply, caches)
        finally:
            claim.release()
            self.last_report = request.report or self.last_report
            mx.clear_cache()

    def _match(self, request: _Request) -> Found:
        self._store.tick()
        return self._store.find(self.namespace, request.tokens)

    def _claim(self, found: Found, capacity: int) -> tuple[Claim, Found]:
        """Room for a running request; where the restored path itself is in the way, without it."""
        need = self.layout.running_bytes(capacity)
        try:
            return self._store.claim(need, found), found
        except BudgetError:
            claim = self._store.claim(need)
            return claim, replace(found, position=0, node=None)

    def _restore(self, found: Found, capacity: int) -> list[Any]:
        if found.position:
            self._store.use(found)
        return checkpoints.restore(
            self.layout, self.model, found.blocks(), found.checkpoint, found.position, capacity
        )

    def _replay(self, request: _Request, found: Found, caches: list[Any]) -> Iterator[int]:
        """Read what was not restored, but the last token, saving every checkpoint as it is crossed."""
        tokens = request.tokens
        reading = Reading(
            start=found.position,
            end=len(tokens) - 1,
            turn_starts=self.marks.starts(tokens),
            branch=found.match.matched,
            boundaries=request.boundaries,
        )
        route = plan(self.layout, self.grid, reading, exact=self.exact)
        request.on_progress(found.position, len(tokens))

        def afford(a: int, b: int, cuts: list[int]) -> list[int]:
            return self._afford(request, a, b, cuts)

        for read in replay(self.layout, self.model, caches, tokens, route, afford):
            request.forwards += 1
            for taken in read.taken:
                ends = taken.position == reading.end
                self._save(request, taken, caches, is_end=ends)
            request.on_progress(read.position, len(tokens))
            yield read.position

    def _afford(self, request: _Request, a: int, b: int, cuts: list[int]) -> list[int]:
        """Of the cuts in `(a, b]`, those whose snapshots and rows there is room for."""
        nodes = self._store.find(self.namespace, request.tokens[:b]).nodes()
        for kept in (cuts, cuts[-1:]):
            need = len(kept) * self.layout.snapshot_bytes + (b - a) * self.layout.row_bytes
            try:
                self._store.make_room(need, nodes)
            except BudgetError:
                continue
            request.refused += len(cuts) - len(kept)
            return kept
        request.refused += len(cuts)
        return []

    def _save(
        self,
        request: _Request,
        taken: checkpoints.Checkpoint,
        caches: Sequence[Any],
        *,
        is_end: bool,
    ) -> None:
        stored = self._store_at(request.tokens[: taken.position], taken, caches, is_end=is_end)
        request.taken += stored
        request.refused += not stored

    def _store_at(
        self,
        tokens: Tokens,
        taken: checkpoints.Checkpoint,
        caches: Sequence[Any],
        *,
        is_end: bool,
    ) -> bool:
        return self._store.save(
            self.namespace,
            tokens,
            lambda start: checkpoints.take_rows(self.layout, caches, start, len(tokens)),
            taken if self.layout.needs_snapshots else None,
            row_bytes=self.layout.row_bytes,
            is_end=is_end,
        )

    def _save_reply(self, tokens: Tokens, reply: list[int], caches: Sequence[Any]) -> None:
        """Checkpoint the end of a reply, unless the next turn's history will leave it out."""
        if not reply or self.exact or self.marks.strips(reply):
            return
        history = np.concatenate([tokens, np.array(reply, dtype=np.int32)])
        mx.eval([cache.state for cache in caches])
        if self.layout.mismatch(caches, len(history)) is None:
            self._take_and_store(history, caches)

    def _take_and_store(self, tokens: Tokens, caches: Sequence[Any]) -> bool:
        """Checkpoint `caches`, which stand at `len(tokens)`, if there is room."""
        found = self._store.find(self.namespace, tokens)
        missing = len(tokens) - found.match.matched
        need = self.layout.snapshot_bytes + missing * self.layout.row_bytes
        try:
            self._store.make_room(need, found.nodes())
        except BudgetError:
            return False
        taken = checkpoints.take(self.layout, caches, len(tokens))
        return self._store_at(tokens, taken, caches, is_end=True)

    def _answer_uncached(
        self, request: _Request, why: list[str], options: dict[str, Any]
    ) -> Iterator[GenerationResponse | Pause]:
        """mlx-lm's own path, for what the cache cannot serve; the report says so."""
        began = time.perf_counter()
        request.report = self._uncached_report(request, why)
        seed = options.pop("seed", None)
        responses = stream_generate(
            self.model,
            self.tokenizer,
            mx.array(request.tokens),
            max_tokens=request.max_tokens,
            prefill_step_size=self.grid.step,
            prompt_progress_callback=request.on_progress,
            **options,
        )
        if seed is not None:
            mx.random.seed(seed)
        try:
            for count, response in enumerate(responses):
                if count == 0:
                    seconds = time.perf_counter() - began
                    request.report = replace(request.report, prefill_seconds=seconds)
                mx.eval(response.logprobs)
                yield response
        finally:
            self.last_report = request.report

    # For frameworks that run the model themselves

    def prefill(
        self,
        prompt: str | Iterable[int],
        *,
        max_tokens: int = REPLY_ROOM,
        boundaries: Sequence[int] = (),
        prompt_progress_callback: Progress | None = None,
    ) -> Ready:
        """Caches that have read all of `prompt` but its last token, restored as far as possible."""
        request = self._request(prompt, boundaries, prompt_progress_callback)
        request.max_tokens = max_tokens
        return self._ready(request, read=True)

    def restore(self, prompt: str | Iterable[int], *, max_tokens: int = REPLY_ROOM) -> Ready:
        """The same without reading anything: `rest` is all that is not restored."""
        request = self._request(prompt, (), None)
        request.max_tokens = max_tokens
        return self._ready(request, read=False)

    def _ready(self, request: _Request, *, read: bool) -> Ready:
        made: list[Ready] = []

        def steps() -> Iterator[Pause]:
            began = time.perf_counter()
            tokens = request.tokens
            if self.layout.unsupported:
                report = self._uncached_report(request, [])
                held = _HeldClaim(None, self._worker)
                made.append(Ready(fresh_caches(self.model), tokens.tolist(), 0, report, held))
                return
            found = self._match(request)
            capacity = _rounded(len(tokens) + _reply_room(request.max_tokens))
            claim, found = self._claim(found, capacity)
            try:
                caches = self._restore(found, capacity)
                position = found.position
                if read:
                    for _ in self._replay(request, found, caches):
                        yield PAUSE
                    position = len(tokens) - 1
            except BaseException:
                claim.release()
                raise
            seconds = time.perf_counter() - began
            report = request.report = self._report(request, found, seconds)
            held = _HeldClaim(claim, self._worker)
            made.append(Ready(caches, tokens[position:].tolist(), position, report, held))

        for _ in self._worker.stream(steps()):
            pass
        self.last_report = made[0].report
        return made.pop()

    def save(self, tokens: Iterable[int], prompt_cache: Sequence[Any]) -> None:
        """Store what `prompt_cache` holds, which must have read exactly `tokens`.

        Raises `CacheMismatchError` when it does not stand there, and in exact mode, where only
        states that this library read along its own grid can be told to be exact; `BudgetError`
        when there is no room.
        """
        history = prompt_tokens(tokens, self.layout.vocabulary)
        if self.exact or self.layout.unsupported:
            raise CacheMismatchError(
                "An exact store keeps only what it has read itself; use prefill."
                if self.exact
                else f"{', '.join(self.layout.unsupported)} cannot be stored by this version."
            )
        why = self.layout.mismatch(prompt_cache, len(history))
        if why is not None:
            raise CacheMismatchError(
                f"Cannot save {len(history)} tokens: {why}. Nothing was stored."
            )
        mx.eval([cache.state for cache in prompt_cache])  # lazy arrays belong to this thread
        if not self._worker.call(self._take_and_store, history, prompt_cache):
            raise BudgetError(
                "Nothing was saved: there was no room (raise memory_budget or release caches)"
                + self.layout.stores_every_slice * ", or rows have left a sliding window"
                + "."
            )

    # Looking and keeping

    def lookup(self, prompt: str | Iterable[int]) -> CacheReport:
        """What would be restored for `prompt`. Changes nothing."""
        request = self._request(prompt, (), None)
        if self.layout.unsupported:
            return self._uncached_report(request, [])
        return self._worker.call(
            lambda: self._report(request, self._store.find(self.namespace, request.tokens), 0.0)
        )

    def stats(self) -> StoreStats:
        """What is held, in bytes and counts."""
        return self._worker.call(self._store.stats)

    def checkpoints(self) -> list[list[int]]:
        """The tokens that lead to each stored checkpoint."""
        return self._worker.call(
            lambda: [tokens.tolist() for tokens, _ in self._store.checkpoints(self.namespace)]
        )

    def clear(self) -> None:
        """Forget everything that is stored; running requests go on."""
        self._worker.call(self._store.clear)

    def pin(self, prompt: str | Iterable[int]) -> int:
        """Never evict what restores `prompt`; returns the position kept. It must be stored.

        Raises `BudgetError` when pins would take more than half the budget.
        """
        return self._worker.call(self._store.pin, self.namespace, self._tokens(prompt))

    def unpin(self, prompt: str | Iterable[int]) -> int:
        """Treat what restores `prompt` like everything else again; returns its position."""
        return self._worker.call(self._store.unpin, self.namespace, self._tokens(prompt))

    def close(self) -> None:
        """End running requests and the worker thread, and let go of everything stored."""
        with suppress(ClosedError):  # closing twice is no mistake
            self._worker.call(self._store.clear)
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Small things

    def _tokens(self, prompt: str | Iterable[int]) -> Tokens:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise PromptError("A text prompt needs a tokenizer; give one to the constructor.")
            bos = self.tokenizer.bos_token
            # The rule by which mlx_lm.stream_generate adds special tokens.
            ids = self.tokenizer.encode(
                prompt, add_special_tokens=bos is None or not prompt.startswith(bos)
            )
        else:
            ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        return prompt_tokens(ids, self.layout.vocabulary)

    def _request(
        self,
        prompt: str | Iterable[int],
        boundaries: Sequence[int],
        on_progress: Progress | None,
    ) -> _Request:
        request = _Request(self._tokens(prompt), boundaries=tuple(boundaries))
        if on_progress is not None:
            request.on_progress = on_progress
        return request

    def _report(self, request: _Request, found: Found, seconds: float) -> CacheReport:
        tokens, matched = request.tokens, found.match.matched
        contradicted = found.match.contradicted
        return CacheReport(
            prompt_tokens=len(tokens),
            matched_tokens=matched,
            restored_tokens=found.position,
            replayed_tokens=len(tokens) - found.position,
            forwards=request.forwards,
            tier="memory" if found.position else "none",
            reason=self._reason(tokens, found),
            diverged_at=matched if contradicted else None,
            prefill_seconds=seconds,
            checkpoints_taken=request.taken,
            checkpoints_refused=request.refused,
        )

    def _reason(self, tokens: Tokens, found: Found) -> Reason:
        if found.position == 0:
            if self._store.was_evicted(self.namespace, tokens):
                return Reason.EVICTED
            if self._store.known_elsewhere(self.namespace, tokens) > found.match.matched:
                return Reason.NAMESPACE
            return Reason.COLD
        if found.match.matched >= len(tokens) - 1:
            return Reason.EXACT
        return Reason.BRANCH if found.match.contradicted else Reason.PREFIX

    def _uncached_report(self, request: _Request, why: list[str]) -> CacheReport:
        return CacheReport(
            prompt_tokens=len(request.tokens),
            matched_tokens=0,
            restored_tokens=0,
            replayed_tokens=len(request.tokens),
            reason=Reason.DISABLED if why else Reason.UNSUPPORTED_LAYER,
            detail=", ".join(why or self.layout.unsupported),
        )


@contextmanager
def _mlx_thread(model: Any) -> Iterator[None]:
    """What the worker thread holds for its life: the wired limit, and its own MLX streams.

    MLX 0.32 ends the process with `terminate` at exit when a thread leaves its streams behind.
    """
    try:
        with wired_limit(model):
            yield
    finally:
        mx.clear_streams()


class _Room:
    """Keeps a running request's buffers ahead of what decoding writes, and paid for."""

    def __init__(self, layout: Layout, caches: Sequence[Any], claim: Claim, capacity: int):
        self._layout, self._caches, self._claim = layout, caches, claim
        self._capacity = capacity

    def reach(self, position: int) -> None:
        """Make sure that `position` tokens fit."""
        if position > self._capacity:
            self._claim.grow(REPLY_ROOM * self._layout.row_bytes)
            self._capacity += REPLY_ROOM
            checkpoints.grow(self._layout, self._caches, self._capacity)


def _reply_room(max_tokens: int) -> int:
    return min(max_tokens, REPLY_ROOM) if max_tokens > 0 else REPLY_ROOM


def _rounded(rows: int) -> int:
    return -(-rows // ROW_STEP) * ROW_STEP


def _take_random_state() -> int:
    """The calling thread's random state, and move it on, so that the next request draws anew."""
    state = random_state()
    mx.eval(mx.random.uniform())
    return state
