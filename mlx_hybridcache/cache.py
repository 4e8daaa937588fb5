"""The public class: arguments checked, work handed to the worker thread, results handed back."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import mlx.core as mx
from mlx_lm.generate import GenerationResponse, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import models
from .caches.layout import Layout
from .caches.room import REPLY_ROOM, ROW_STEP, longest_prompt
from .decode import batch_check as batching
from .decode.decoder import Prepared
from .decode.sampling import random_state
from .disk.tier import DiskStats, DiskTier, Lent
from .engine import Engine
from .errors import (
    ArgumentError,
    BudgetError,
    CacheMismatchError,
    ClosedError,
    HybridCacheError,
    PromptError,
    SettingError,
)
from .machine import Pressure, default_reserve
from .prefill.schedule import Grid
from .report import CacheReport
from .request.arguments import (
    check_counts,
    check_keywords,
    check_model,
    check_text,
    check_whole,
    known_keywords,
    positions,
    token_ids,
)
from .request.generation import Generation, HeldClaim, Ready
from .request.info import CacheInfo
from .request.request import Progress, Request
from .router import Patch, applied, apply, choose_patch
from .sizes import format_bytes, parse_bytes
from .store.budget import StoreStats
from .store.outline import Outline
from .store.store import Store
from .tokens import Namespace, Tokens, learn_turn_marks, prompt_tokens, settings_digest
from .worker.worker import (
    Load,
    Pause,
    Stream,
    Worker,
    closed,
)

log = logging.getLogger("mlx_hybridcache")

T = TypeVar("T")

Through = Callable[[Iterator[GenerationResponse | Pause]], Iterator[T | Pause]]
"""Makes something else of a request's responses, on the worker thread."""

UNCACHED_OPTIONS = ("kv_bits", "max_kv_size", "draft_model", "input_embeddings", "prompt_cache")
"""Options of `mlx_lm.stream_generate` whose requests are served without the cache, and say so."""

WITHOUT_EFFECT = ("num_draft_tokens", "kv_group_size", "quantized_kv_start", "prefill_step_size")
"""Options that qualify one of those, or that the constructor has decided."""

KEYWORDS = (
    *("max_tokens", "boundaries", "prompt_progress_callback", "cache_salt", "use_cache", "seed"),
    *("best_effort", "through", "sampler", "logits_processors"),
    *(*UNCACHED_OPTIONS, *WITHOUT_EFFECT),
)
"""What `stream_generate` takes: its own, and those of mlx-lm's."""

FLUSH_INTERVAL_SECONDS = 0.01
"""How often a flush looks whether it is done."""


@dataclass(frozen=True, slots=True)
class Outlines:
    """What is stored, as trees that never change; `disk` by what files call a namespace."""

    memory: Mapping[Namespace, Outline]
    disk: Mapping[Namespace, Outline]


class HybridPromptCache:
    """A prompt cache for one model, hybrid or not. Every method may be called from any thread.

    `memory_budget` is bytes or text with a unit and bounds the store and the running requests
    together. `memory_reserve` is what the store leaves of the system's memory, whatever others take:
    it shrinks for that, and with 0 never does. `exact` makes hot and cold agree bit for bit on
    devices where the shape of a slice changes the last bits, at the cost of at most one step of
    replay. `prefill_step_size` and `checkpoint_every` are tokens. `swa_full` stores every row of sliding windows, which then
    restore at any position, not at checkpoints only. `cache_dir` keeps what is stored in files too, at
    most `disk_budget` bytes of them, for other processes and later runs. `max_conversations` bounds how many
    conversations are stored, where every branch of one, such as a regenerated reply, counts;
    `max_checkpoints` how many checkpoints lie on the way to any position. `cache_salt` separates
    those who must not share; every call can name its own. `router` is a patch, the path of one, or
    "auto": experts that compute the same get one router row in `model` itself, and it selects by groups
    from then on.

    Raises `BudgetError` when the budget is smaller than one checkpoint with its rows, `RouterError`
    for a patch that was made for another model.
    """

    @known_keywords
    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        memory_budget: int | str | None = None,
        memory_reserve: int | str | None = None,
        exact: bool = False,
        prefill_step_size: int = 2048,
        checkpoint_every: int = 2048,
        checkpoint_min_step: int = 512,
        swa_full: bool = False,
        max_conversations: int | None = None,
        max_checkpoints: int | None = None,
        cache_dir: str | Path | None = None,
        disk_budget: int | str | None = None,
        router: Patch | str | Path | None = None,
        cache_salt: str = "",
    ):
        check_model(model, tokenizer)
        check_text("cache_salt", cache_salt)
        check_counts(
            prefill_step_size=prefill_step_size,
            checkpoint_every=checkpoint_every,
            checkpoint_min_step=checkpoint_min_step,
        )
        if tokenizer is not None and not isinstance(tokenizer, TokenizerWrapper):
            tokenizer = TokenizerWrapper(tokenizer)
        models.evaluate(model)
        layout = Layout.of(model, prefill_step_size, swa_full=swa_full)
        # Also when this one fails, or is dropped rather than closed.
        self._let_go = weakref.finalize(self, layout.release)
        every = -(-checkpoint_every // prefill_step_size) * prefill_step_size
        budget = models.default_budget(model) if memory_budget is None else memory_budget
        store = Store(
            parse_bytes(budget),
            needs_checkpoints=layout.needs_snapshots,
            stride=prefill_step_size if exact else 1,
            max_conversations=max_conversations,
            max_checkpoints=max_checkpoints,
            holders=(lent := Lent()),
        )
        _check_budget(layout, store)
        if disk_budget is not None and cache_dir is None:
            raise SettingError("disk_budget needs a cache_dir to hold.")
        if router is not None:
            apply(model, choose_patch(model, tokenizer, router))
        load = Load()
        device = (str(mx.default_device()), version("mlx"), prefill_step_size)
        self.engine = Engine(
            model=model,
            tokenizer=tokenizer,
            layout=layout,
            grid=Grid(prefill_step_size, every, checkpoint_min_step, layout.alignment),
            store=store,
            marks=learn_turn_marks(tokenizer),
            settings=settings_digest(
                model=models.fingerprint(model),
                swa_full=swa_full,
                exact=device if exact else False,
                # The rows are in the fingerprint, how they are selected from is not.
                **({} if (selection := applied(model)) is None else {"router": selection}),
            ),
            exact=exact,
            # Which bits a batch gives depends on the device, so exact mode decodes one by one.
            batches=not exact and not layout.unsupported and batching.shown(model, layout),
            load=load,
            pressure=Pressure(
                default_reserve() if memory_reserve is None else parse_bytes(memory_reserve)
            ),
        )
        self.info = _info(self.engine)
        """What this cache is for all of its life."""
        self._salt = cache_salt
        self._disk_end: Callable[[], object] = lambda: None
        if layout.unsupported:
            log.warning(
                "%s cannot be stored by this version: requests are served without the cache.",
                ", ".join(layout.unsupported),
            )
        self._worker = Worker(
            held=lambda: _mlx_thread(model),
            name="mlx-hybridcache",
            load=load,
            between=self.engine.relieve,
        )
        if cache_dir is not None and not layout.unsupported:
            disk = DiskTier.open(
                Path(cache_dir).expanduser(),
                None if disk_budget is None else parse_bytes(disk_budget),
                store,
                lent,
                layout,
                model,
                every,
                self._worker.post,
            )
            self._disk_end = weakref.finalize(self, disk.thread.close)
            self.engine.disk = disk

    @property
    def last_report(self) -> CacheReport | None:
        """The report of the call that finished last."""
        return self.engine.last_report

    @property
    def load(self) -> Load:
        """How many requests read, wait for what others read, and write."""
        return self.engine.load

    @property
    def is_alive(self) -> bool:
        """Whether the worker thread can still serve requests."""
        return self._worker.is_alive

    # Generating

    @overload
    def stream_generate(
        self,
        prompt: str | Iterable[int],
        max_tokens: int = 256,
        *,
        boundaries: Sequence[int] = (),
        prompt_progress_callback: Progress | None = None,
        cache_salt: str | None = None,
        use_cache: bool = True,
        seed: int | None = None,
        best_effort: bool = False,
        through: None = None,
        **options: Any,
    ) -> Generation[GenerationResponse]: ...

    @overload
    def stream_generate(
        self,
        prompt: str | Iterable[int],
        max_tokens: int = 256,
        *,
        boundaries: Sequence[int] = (),
        prompt_progress_callback: Progress | None = None,
        cache_salt: str | None = None,
        use_cache: bool = True,
        seed: int | None = None,
        best_effort: bool = False,
        through: Through[T],
        **options: Any,
    ) -> Generation[T]: ...

    def stream_generate(
        self,
        prompt: str | Iterable[int],
        max_tokens: int = 256,
        *,
        boundaries: Sequence[int] = (),
        prompt_progress_callback: Progress | None = None,
        cache_salt: str | None = None,
        use_cache: bool = True,
        seed: int | None = None,
        best_effort: bool = False,
        through: Through[Any] | None = None,
        **options: Any,
    ) -> Generation[Any]:
        """A reply to `prompt`, text or token ids; keyword arguments are `mlx_lm.stream_generate`'s.

        `boundaries` declares positions worth a checkpoint. `use_cache=False` reads all of it by
        mlx-lm alone. `best_effort` is for a reply of unknown length: no memory is kept ready for all of
        `max_tokens`, and where no more is to be had the reply ends with `length`. Samplers, logits
        processors, the progress callback and `through` run on the worker thread. Samplers draw from a random stream that begins at `seed`, or at the calling
        thread's random state as it is now. `through` takes the responses, with a `PAUSE` for each
        turn that gives none, and yields what the caller gets; ending early ends the request with
        the tokens that it took. Raises, before any work, `PromptError` for a prompt that cannot be
        read, and `SettingError` for a `draft_model` beside layers that cannot take tokens back.
        """
        engine = self.engine
        if engine.tokenizer is None:
            raise HybridCacheError(
                "stream_generate needs a tokenizer; give one to the constructor."
            )
        check_keywords("stream_generate", options, KEYWORDS)
        if not isinstance(max_tokens, int):
            raise ArgumentError(f"max_tokens is {max_tokens!r}; a whole number is needed.")
        if max_tokens == 0:
            raise SettingError("max_tokens must not be zero (use -1 for no limit).")
        if options.get("draft_model") is not None and not engine.layout.goes_back:
            raise SettingError(
                "draft_model cannot be used with this model: drafted tokens that are refused must be "
                "taken back, which its recurrent or sliding-window layers cannot do in mlx-lm, so that "
                "the reply would be another one. Leave it out."
            )
        request = self._request(
            prompt, max_tokens, boundaries, prompt_progress_callback, cache_salt
        )
        request.best_effort = best_effort
        uncached = [name for name in UNCACHED_OPTIONS if options.get(name) is not None]
        if not use_cache:
            uncached.append("use_cache=False")
        if options.get("sampler") is not None:
            options["seed"] = _take_random_state() if seed is None else seed
        if uncached or engine.layout.unsupported:
            steps = engine.answer_uncached(request, uncached, options)
        else:
            for name in (*UNCACHED_OPTIONS, *WITHOUT_EFFECT):
                options.pop(name, None)
            steps = engine.answer(request, options)
        if through is not None:
            steps = _through(steps, through)
        return Generation(request, self._worker.stream(steps, request.job))

    # For frameworks that run the model themselves

    @known_keywords
    def prefill(
        self,
        prompt: str | Iterable[int],
        *,
        max_tokens: int = REPLY_ROOM,
        boundaries: Sequence[int] = (),
        prompt_progress_callback: Progress | None = None,
        cache_salt: str | None = None,
    ) -> Ready:
        """Caches that have read all of `prompt` but its last token, restored as far as possible."""
        request = self._request(
            prompt, max_tokens, boundaries, prompt_progress_callback, cache_salt
        )
        return _only(list(self._preparing(request, read=True)))

    @known_keywords
    async def aprefill(
        self,
        prompt: str | Iterable[int],
        *,
        max_tokens: int = REPLY_ROOM,
        boundaries: Sequence[int] = (),
        prompt_progress_callback: Progress | None = None,
        cache_salt: str | None = None,
    ) -> Ready:
        """`prefill` on an event loop, which goes on meanwhile. Cancelled, it keeps what was read."""
        request = self._request(
            prompt, max_tokens, boundaries, prompt_progress_callback, cache_salt
        )
        stream = self._preparing(request, read=True)
        try:
            return _only([each async for each in stream])
        finally:
            stream.cancel()

    @known_keywords
    def warm(
        self,
        prompt: str | Iterable[int],
        *,
        prompt_progress_callback: Progress | None = None,
        cache_salt: str | None = None,
    ) -> Generation[CacheReport]:
        """Read all of `prompt` but its last token, for requests to come; nothing is held of it.

        Iterate to wait, on any thread or event loop: the one item is what `lookup` finds then.
        Cancelled, it keeps what was read.
        """
        request = self._request(prompt, 1, (), prompt_progress_callback, cache_salt)
        return Generation(request, self._worker.stream(self.engine.warm(request), request.job))

    @known_keywords
    def restore(
        self,
        prompt: str | Iterable[int],
        *,
        max_tokens: int = REPLY_ROOM,
        cache_salt: str | None = None,
    ) -> Ready:
        """The same without reading anything: `rest` is all that is not restored."""
        request = self._request(prompt, max_tokens, cache_salt=cache_salt)
        return _only(list(self._preparing(request, read=False)))

    def _preparing(self, request: Request, *, read: bool) -> Stream[Ready]:
        steps = _handed_over(self.engine.prepare(request, read=read), request, self._worker)
        return self._worker.stream(steps, request.job)

    @known_keywords
    def save(
        self,
        tokens: Iterable[int],
        prompt_cache: Sequence[Any],
        *,
        cache_salt: str | None = None,
    ) -> None:
        """Store what `prompt_cache` holds, which must have read exactly `tokens`.

        Raises `CacheMismatchError` when it does not stand there, and in exact mode, where only
        states that this library read along its own grid can be told to be exact; `BudgetError`
        when there is no room.
        """
        engine, layout = self.engine, self.engine.layout
        history = prompt_tokens(tokens, layout.vocabulary)
        if layout.depends_on_slices(len(history)):
            raise CacheMismatchError(
                f"Beyond {layout.slicing_limit:,} tokens what this model computes depends on the "
                f"slices they are read in; use prefill, whose slices are known. Found {len(history):,}."
            )
        if engine.exact or layout.unsupported:
            raise CacheMismatchError(
                "An exact store keeps only what it has read itself; use prefill."
                if engine.exact
                else f"{', '.join(layout.unsupported)} cannot be stored by this version."
            )
        why = layout.mismatch(prompt_cache, len(history))
        if why is not None:
            raise CacheMismatchError(
                f"Cannot save {len(history)} tokens: {why}. Nothing was stored."
            )
        mx.eval([cache.state for cache in prompt_cache])  # lazy arrays belong to this thread
        namespace = self._namespace(cache_salt)
        if not self._worker.call(engine.save_caches, namespace, history, prompt_cache):
            raise BudgetError(
                "Nothing was saved: there was no room (raise memory_budget or release caches)"
                + layout.stores_every_slice * ", or rows have left a sliding window"
                + "."
            )

    # Looking and keeping

    @known_keywords
    def lookup(self, prompt: str | Iterable[int], *, cache_salt: str | None = None) -> CacheReport:
        """What would be restored for `prompt`. Changes nothing."""
        request = self._request(prompt, REPLY_ROOM, cache_salt=cache_salt)
        return self._worker.call(self.engine.lookup, request)

    def stats(self) -> StoreStats:
        """What is held, in bytes and counts. `summary` says the same from then on."""
        self._worker.call(self.engine.publish)
        return self.summary

    @property
    def summary(self) -> StoreStats:
        """The same as the last request left it, without waiting for the worker."""
        return self.engine.summary

    def disk_stats(self) -> DiskStats | None:
        """What the cache directory holds; None without one."""
        disk = self.engine.disk
        return None if disk is None else self._worker.call(disk.stats)

    @property
    def disk_summary(self) -> DiskStats | None:
        """The same as the last request or write left it, without waiting for the worker."""
        return None if self.engine.disk is None else self.engine.disk.summary

    @property
    def outlines(self) -> Outlines:
        """The trees of both tiers as the last request left them, without waiting for the worker."""
        disk = self.engine.disk
        return Outlines(self.engine.outlines, {} if disk is None else disk.outlines)

    @known_keywords
    def checkpoints(self, *, cache_salt: str | None = None) -> list[list[int]]:
        """The tokens that lead to each stored checkpoint."""
        spaces, store = self.engine.namespaces(self._salt_of(cache_salt)), self.engine.store
        return self._worker.call(
            lambda: [tokens.tolist() for each in spaces for tokens, _ in store.checkpoints(each)]
        )

    def clear(self) -> None:
        """Forget everything that is stored, for every salt; running requests go on.

        In a cache directory that is everything of every model, if this process writes there.
        """
        self._worker.call(self.engine.clear)

    @known_keywords
    def pin(self, prompt: str | Iterable[int], *, cache_salt: str | None = None) -> int:
        """Never evict what restores `prompt`; returns the position kept. It must be stored.

        Raises `BudgetError` when pins would take more than half the budget.
        """
        tokens, salt = self._tokens(prompt), self._salt_of(cache_salt)
        return self._worker.call(self.engine.pin, salt, tokens, is_pinned=True)

    @known_keywords
    def unpin(self, prompt: str | Iterable[int], *, cache_salt: str | None = None) -> int:
        """Treat what restores `prompt` like everything else again; returns its position."""
        tokens, salt = self._tokens(prompt), self._salt_of(cache_salt)
        return self._worker.call(self.engine.pin, salt, tokens, is_pinned=False)

    @known_keywords
    def drop(self, prompt: str | Iterable[int], *, cache_salt: str | None = None) -> int:
        """Forget `prompt`, all that goes on behind it, and what leads to nothing else.

        Returns the position where that begins: the tokens before it are the beginning of something
        else too, and stay. Running requests go on, and store what they read. In a cache directory
        the files go as well, if this process writes there; one whose beginning has other uses stays
        as long as they do. Raises `NotStoredError` when `prompt` is
        not stored, up to its last token, and `PinnedError` when a pin would go; then nothing is forgotten.
        """
        tokens, salt = self._tokens(prompt), self._salt_of(cache_salt)
        return self._worker.call(self.engine.drop, salt, tokens)

    @known_keywords
    def flush(self, seconds: float | None = None) -> bool:
        """Wait until everything stored is on disk too, for `seconds` at most; whether it is.

        The most useful is written first. Without a cache directory there is nothing to wait for.
        """
        disk = self.engine.disk
        until = None if seconds is None else time.monotonic() + seconds
        while disk is not None and self._worker.call(disk.is_writing):
            self._worker.check_may_wait()
            if until is not None and time.monotonic() >= until:
                return False
            time.sleep(FLUSH_INTERVAL_SECONDS)
        return disk is None or self._worker.call(lambda: disk.is_written)

    @known_keywords
    def close(self, flush_seconds: float = 20.0) -> None:
        """End running requests and the worker thread, and let go of everything in memory.

        What the cache directory lacks is written first, the most useful first, within
        `flush_seconds`. The model is then as it was before, but for a `router` that was asked for.
        """
        with suppress(ClosedError):  # closing twice is no mistake
            self.flush(flush_seconds)
            self._worker.call(self.engine.store.clear)
        self._worker.close()
        self._let_go()
        self._disk_end()
        if self.engine.disk is not None:  # another thread that closes it may have come first
            self.engine.disk.thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _salt_of(self, cache_salt: str | None) -> str:
        if cache_salt is None:
            return self._salt
        check_text("cache_salt", cache_salt)
        return cache_salt

    def _namespace(self, cache_salt: str | None) -> Namespace:
        return Namespace(self.engine.settings, self._salt_of(cache_salt))

    def _tokens(self, prompt: str | Iterable[int]) -> Tokens:
        if isinstance(prompt, str):
            tokenizer = self.engine.tokenizer
            if tokenizer is None:
                raise PromptError("A text prompt needs a tokenizer; give one to the constructor.")
            check_whole(prompt)
            # The rule by which mlx_lm.stream_generate adds special tokens.
            bos = tokenizer.bos_token
            ids = tokenizer.encode(
                prompt, add_special_tokens=bos is None or not prompt.startswith(bos)
            )
        else:
            ids = token_ids(prompt)
        return prompt_tokens(ids, self.engine.layout.vocabulary)

    def _request(
        self,
        prompt: str | Iterable[int],
        max_tokens: int,
        boundaries: Sequence[int] = (),
        on_progress: Progress | None = None,
        cache_salt: str | None = None,
    ) -> Request:
        tokens, salt = self._tokens(prompt), self._salt_of(cache_salt)
        request = self.engine.request(tokens, salt, max_tokens, positions(boundaries, len(tokens)))
        if on_progress is not None:
            request.on_progress = on_progress
        return request


def _handed_over(
    steps: Iterator[Prepared | Pause], request: Request, worker: Worker
) -> Iterator[Ready | Pause]:
    """Caches as their caller gets them; made here, what nobody takes any more is given back too."""
    for step in steps:
        if isinstance(step, Pause):
            yield step
        else:
            assert request.report is not None
            rest = request.tokens[step.position :].tolist()
            held = HeldClaim(step.claim, worker)
            yield Ready(step.caches, rest, step.position, request.report, held)


def _only(found: list[Ready]) -> Ready:
    if not found:  # what the worker's end cuts short ends without an error
        raise closed()
    return found[0]


def _through(
    steps: Iterator[GenerationResponse | Pause], through: Through[T]
) -> Iterator[T | Pause]:
    with closing(steps):  # type: ignore[type-var]  # both ways of answering are generators
        yield from through(steps)


def _info(engine: Engine) -> CacheInfo:
    layout, budget_bytes = engine.layout, engine.store.budget_bytes
    return CacheInfo(
        settings=engine.settings,
        marks=engine.marks,
        vocabulary=layout.vocabulary,
        needs_checkpoints=layout.needs_snapshots,
        unsupported=layout.unsupported,
        layers=len(layout.kinds),
        checkpoint_layers=sum(kind.needs_snapshot for kind in layout.kinds),
        row_bytes=layout.row_bytes,
        checkpoint_bytes=layout.snapshot_bytes,
        slicing_limit=layout.slicing_limit,
        longest_prompt=longest_prompt(layout, budget_bytes),
        budget_bytes=budget_bytes,
        reserve_bytes=engine.pressure.reserve_bytes,
        exact=engine.exact,
        batches=engine.batches,
        merges=layout.merges,
        model=engine.model,
    )


def _check_budget(layout: Layout, store: Store) -> None:
    smallest = layout.running_bytes(ROW_STEP) + layout.snapshot_bytes + ROW_STEP * layout.row_bytes
    if store.budget_bytes < smallest:
        raise BudgetError(
            f"memory_budget is {format_bytes(store.budget_bytes)}; one running request of "
            f"{ROW_STEP} tokens and one checkpoint of this model need {format_bytes(smallest)}."
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


def _take_random_state() -> int:
    """The calling thread's random state, and move it on, so that the next request draws anew."""
    state = random_state()
    mx.eval(mx.random.uniform())
    return state
