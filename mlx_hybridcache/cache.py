"""The public class: arguments checked, work handed to the worker thread, results handed back."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from mlx_lm.generate import GenerationResponse

from . import models
from .caches.room import REPLY_ROOM
from .decode.sampling import take_random_state
from .errors import ClosedError, GroupError, SettingError
from .prefill.schedule import MIN_STEP, STEP
from .report import CacheReport
from .request.arguments import check_keywords, check_text, checked_tokenizer, known_keywords
from .request.foreign import not_saved, savable
from .request.generation import Generation, Ready, handed_over, only, passed_through
from .request.info import CacheInfo
from .request.options import (
    KEYWORDS,
    check_generating,
    uncached,
)
from .request.prompts import NO_LIFETIMES, Prompts
from .request.request import Progress, Request
from .router.patch import Patch
from .settings import CacheSettings, adapted, info
from .store.budget import StoreStats
from .store.outline import Outline
from .store.references import CountedReferences
from .tokenizing.encoder import Encoder
from .tokens import Namespace
from .worker.mlx_thread import on_mlx_thread
from .worker.stream import Stream
from .worker.turns import Load, Pause
from .worker.worker import Worker

if TYPE_CHECKING:
    from .disk.tier.tier import DiskStats
    from .engine import Engine
    from .group.figures import RankFigures
    from .group.group import Group

T = TypeVar("T")

Through = Callable[[Iterator[GenerationResponse | Pause]], Iterator[T | Pause]]
"""Makes something else of a request's responses, on the worker thread."""

FLUSH_INTERVAL_SECONDS = 0.01
"""How often a flush looks whether it is done."""


@dataclass(frozen=True, slots=True)
class Outlines:
    """What is stored, as trees that never change; `disk` by what files call a namespace."""

    memory: Mapping[Namespace, Outline]
    disk: Mapping[Namespace, Outline]


class _Figures:
    """What a cache tells of what it holds."""

    engine: Engine
    worker: Worker

    def stats(self) -> StoreStats:
        """What is held, in bytes and counts. `summary` says the same from then on."""
        self.worker.call(self.engine.publish)
        return self.summary

    @property
    def summary(self) -> StoreStats:
        """The same as the last request left it, without waiting for the worker."""
        return self.engine.tiers.summary

    def disk_stats(self) -> DiskStats | None:
        """What the cache directory holds; None without one."""
        return self.worker.call(self.engine.tiers.disk.stats)

    @property
    def disk_summary(self) -> DiskStats | None:
        """The same as the last request or write left it, without waiting for the worker."""
        return self.engine.tiers.disk.summary

    @property
    def outlines(self) -> Outlines:
        """The trees of both tiers as the last request left them, without waiting for the worker."""
        tiers = self.engine.tiers
        return Outlines(tiers.outlines, tiers.disk.outlines)

    @property
    def ranks(self) -> tuple[RankFigures, ...]:
        """What each rank of a group said of itself last, rank 0 first; nothing where there is one process."""
        return self.engine.ranks


class HybridPromptCache(_Figures):
    """A prompt cache for one model, hybrid or not. Every method may be called from any thread.

    `memory_budget` is bytes or text with a unit and bounds the store and the running requests together.
    `memory_reserve` is what the store leaves of the system's memory, whatever others take: it shrinks for that, and
    with 0 never does. `exact` makes hot and cold agree bit for bit on devices where the shape of a slice changes
    the last bits, at the cost of at most one step of replay. `prefill_step_size` and `checkpoint_every` are tokens.
    `swa_full` stores every row of sliding windows, which then restore at any position, not at checkpoints only.
    `store_kv` (8 or 4 bits) and `store_state` ("int8") store rows and recurrent states smaller, at the cost of
    replies that may differ from cold ones. `cache_dir` keeps what is stored in files too, at most `disk_budget`
    bytes of them, for other processes and later runs. `max_conversations` bounds how many conversations are stored,
    where every branch of one, such as a regenerated reply, counts; `max_checkpoints` how many checkpoints lie on
    the way to any position. `cache_salt` separates those who must not share; every call can name its own. `router`
    is a patch, the path of one, or "auto": experts that compute the same get one router row in `model` itself, and
    it selects by groups from then on. With `kv_bits` keys and values are quantized in groups of `kv_group_size`,
    those of all tokens as soon as one behind `quantized_kv_start` is read, in each layer whose attention can look at such.
    `model` is one rank's part of it where there is a `group`; then each rank makes a cache with the same settings, all
    but rank 0 call `follow`, and rank 0 is asked for everything.

    Raises `BudgetError` for a budget smaller than one checkpoint with its rows, `RouterError` for another model's patch.
    Several caches may serve one model: what one would change under the others raises `AdapterError` or `RouterError`.
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
        prefill_step_size: int = STEP,
        checkpoint_every: int = STEP,
        checkpoint_min_step: int = MIN_STEP,
        swa_full: bool = False,
        store_kv: int | None = None,
        store_state: str | None = None,
        max_conversations: int | None = None,
        max_checkpoints: int | None = None,
        cache_dir: str | Path | None = None,
        disk_budget: int | str | None = None,
        router: Patch | str | Path | None = None,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 0,
        cache_salt: str = "",
        group: Group | None = None,
    ):
        given = locals()
        check_text("cache_salt", cache_salt)
        tokenizer = checked_tokenizer(model, tokenizer)
        settings = CacheSettings(**{each.name: given[each.name] for each in fields(CacheSettings)})
        self.group = group
        if group is not None:
            settings.check_for(group)
        self._open(model, tokenizer, settings, cache_salt)
        if group is not None:
            from .group.joined import begin

            begin(group, self.engine, self.worker)

    def _open(self, model: Any, tokenizer: Any, settings: CacheSettings, cache_salt: str) -> None:
        models.evaluate(model)  # here, where it was built
        layout = on_mlx_thread(lambda: settings.layout(model, self.group)).result()
        # Also when this one fails, or is dropped rather than closed.
        self._let_go = weakref.finalize(self, layout.release)
        load, references = Load(), CountedReferences()
        made = (model, tokenizer, layout, load, references, self.group)
        self.engine = engine = on_mlx_thread(lambda: settings.engine(*made)).result()
        self._let_go = weakref.finalize(self, engine.release)
        self.info: CacheInfo = info(engine)
        """What this cache is for all of its life, or for as long as an adapter is used."""
        self.load: Load = load
        """How many requests read, wait for what others read, and write."""
        self.encoder = Encoder.learn(tokenizer)
        """Turns text into tokens, and remembers what it has read within a bound of its own."""
        self._prompts = Prompts(self.encoder, layout.vocabulary, cache_salt, engine.sharing)
        self._close_files: Callable[[], object] = lambda: None
        self._disk_end: Callable[[], object] = lambda: None
        self.worker = Worker(
            engine.adapting.mlx_thread, "mlx-hybridcache", load, between=engine.between_turns
        )
        if settings.cache_dir is not None and not layout.unsupported:
            engine.tiers.disk = disk = settings.disk(
                engine, references, self.worker.post, self.group
            )
            self._close_files = disk.thread.close
            self._disk_end = weakref.finalize(self, disk.thread.close)

    @property
    def last_report(self) -> CacheReport | None:
        """The report of the call that finished last."""
        return self.engine.last_report

    @property
    def is_alive(self) -> bool:
        """Whether the worker thread can still serve requests."""
        return self.worker.is_alive

    @property
    def failure(self) -> GroupError | None:
        """Why a group of ranks serves nothing any more."""
        return None if self.group is None else self.group.failure

    # Generating

    @overload
    def stream_generate(
        self,
        prompt: str | Iterable[int],
        max_tokens: int = 256,
        *,
        boundaries: Sequence[int] = (),
        lifetimes: Mapping[int, float] = NO_LIFETIMES,
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
        lifetimes: Mapping[int, float] = NO_LIFETIMES,
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
        lifetimes: Mapping[int, float] = NO_LIFETIMES,
        prompt_progress_callback: Progress | None = None,
        cache_salt: str | None = None,
        use_cache: bool = True,
        seed: int | None = None,
        best_effort: bool = False,
        through: Through[Any] | None = None,
        **options: Any,
    ) -> Generation[Any]:
        """A reply to `prompt`, text or token ids; keyword arguments are `mlx_lm.stream_generate`'s.

        `boundaries` declares positions worth a checkpoint. `lifetimes` maps positions to seconds: what restores them
        is kept for so long, anew with each use, as long as anything else may go instead, within half the budget.
        `use_cache=False` reads all of it by mlx-lm alone. `best_effort` is for a reply of unknown length: no memory
        is kept ready for `max_tokens`, and where no more is to be had it ends with `length`. Drafts come from what is
        stored with `draft_from_cache`, from a `draft_model`, or from the `mtp.*` weights of the model in `draft_mtp`.
        Samplers, logits processors, the progress callback and `through` run on the worker thread. Samplers draw from
        a random stream that begins at `seed`, or at this thread's state. `through` takes the responses, a `PAUSE` for each
        turn that gives none, and yields what the caller gets; it may end early. Raises, before any work, `PromptError` for
        what cannot be read, `ArgumentError` for an argument that is none, `SettingError` for a model that cannot draft.
        """
        engine = self.engine
        check_keywords("stream_generate", options, KEYWORDS)
        around = uncached(options, use_cache=use_cache)
        given = {**options, "seed": seed, "through": through}
        check_generating(max_tokens, given, around, engine.tokenizer, engine.layout, self.info)
        engine.drafting.learn_asked({} if around else options, self.worker.call)
        asked = (boundaries, lifetimes, prompt_progress_callback, cache_salt)
        request = self._prompts.request(prompt, max_tokens, *asked, best_effort=best_effort)
        if options.get("sampler") is not None:
            options["seed"] = take_random_state() if seed is None else seed
        steps = engine.serve(request, options, around)
        steps = steps if through is None else passed_through(steps, through)
        return Generation(request, self.worker.stream(steps, request.job))

    def learn_draft(self, model: Any) -> None:
        """Make `model`, if any, ready to draft before a request needs it; `SettingError` for one that cannot."""
        self.engine.drafting.learn(model, self.worker.call)

    def learn_mtp(self, source: str | Path | None) -> None:
        """The same of the head that lies with the model, in a directory or a repository."""
        self.engine.drafting.learn_head(source, self.worker.call)

    # For frameworks that run the model themselves

    @known_keywords
    def prefill(
        self,
        prompt: str | Iterable[int],
        *,
        max_tokens: int = REPLY_ROOM,
        boundaries: Sequence[int] = (),
        lifetimes: Mapping[int, float] = NO_LIFETIMES,
        prompt_progress_callback: Progress | None = None,
        cache_salt: str | None = None,
    ) -> Ready:
        """Caches that have read all of `prompt` but its last token, restored as far as possible."""
        request = self._prompts.request(
            prompt, max_tokens, boundaries, lifetimes, prompt_progress_callback, cache_salt
        )
        return only(list(self._preparing(request, read=True)))

    @known_keywords
    async def aprefill(
        self,
        prompt: str | Iterable[int],
        *,
        max_tokens: int = REPLY_ROOM,
        boundaries: Sequence[int] = (),
        lifetimes: Mapping[int, float] = NO_LIFETIMES,
        prompt_progress_callback: Progress | None = None,
        cache_salt: str | None = None,
    ) -> Ready:
        """`prefill` on an event loop, which goes on meanwhile. Cancelled, it keeps what was read."""
        request = self._prompts.request(
            prompt, max_tokens, boundaries, lifetimes, prompt_progress_callback, cache_salt
        )
        stream = self._preparing(request, read=True)
        try:
            return only([each async for each in stream])
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
        request = self._prompts.request(
            prompt, 1, on_progress=prompt_progress_callback, cache_salt=cache_salt
        )
        return Generation(request, self.worker.stream(self.engine.warm(request), request.job))

    @known_keywords
    def restore(
        self,
        prompt: str | Iterable[int],
        *,
        max_tokens: int = REPLY_ROOM,
        cache_salt: str | None = None,
    ) -> Ready:
        """The same without reading anything: `rest` is all that is not restored."""
        request = self._prompts.request(prompt, max_tokens, cache_salt=cache_salt)
        return only(list(self._preparing(request, read=False)))

    def _preparing(self, request: Request, *, read: bool) -> Stream[Ready]:
        steps = handed_over(self.engine.prepare(request, read=read), request, self.worker)
        return self.worker.stream(steps, request.job)

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
        layout = self.engine.layout
        history = savable(layout, tokens, prompt_cache, exact=self.info.exact)
        request = self.engine.sharing.request(history, self._prompts.salt_of(cache_salt), 1)
        if not self.worker.call(self.engine.tiers.save_foreign, request, prompt_cache):
            raise not_saved(layout)

    @known_keywords
    def use_adapter(self, path: str | Path | None) -> None:
        """Answer with the LoRA adapter in a directory from now on, or with the model as it came, for None.

        What is stored stays, and adapters share nothing of it. Raises `AdapterError` for what cannot be used
        beside the model's weights, while requests are under way, and where another cache serves the model too.
        """
        self.info = self.worker.call(adapted, self.engine, self.load, path)

    # Looking and keeping

    @known_keywords
    def lookup(self, prompt: str | Iterable[int], *, cache_salt: str | None = None) -> CacheReport:
        """What would be restored for `prompt`. Changes nothing."""
        request = self._prompts.request(prompt, REPLY_ROOM, cache_salt=cache_salt)
        return self.worker.call(self.engine.lookup, request)

    @known_keywords
    def checkpoints(self, *, cache_salt: str | None = None) -> list[list[int]]:
        """The tokens that lead to each stored checkpoint."""
        spaces = self.engine.sharing.namespaces(self._prompts.salt_of(cache_salt))
        memory = self.engine.tiers.memory
        return self.worker.call(
            lambda: [tokens.tolist() for each in spaces for tokens, _ in memory.checkpoints(each)]
        )

    def clear(self) -> None:
        """Forget everything that is stored, for every salt; running requests go on.

        In a cache directory that is everything of every model, if this process writes there.
        """
        self.encoder.remembered.clear()
        self.worker.call(self.engine.clear)

    @known_keywords
    def pin(self, prompt: str | Iterable[int], *, cache_salt: str | None = None) -> int:
        """Never evict what restores `prompt`; returns the position kept. It must be stored.

        Raises `BudgetError` when pins would take more than half the budget.
        """
        tokens, salt = self._prompts.read(prompt, cache_salt)
        return self.worker.call(self.engine.pin, salt, tokens, is_pinned=True)

    @known_keywords
    def unpin(self, prompt: str | Iterable[int], *, cache_salt: str | None = None) -> int:
        """Treat what restores `prompt` like everything else again; returns its position."""
        tokens, salt = self._prompts.read(prompt, cache_salt)
        return self.worker.call(self.engine.pin, salt, tokens, is_pinned=False)

    @known_keywords
    def drop(self, prompt: str | Iterable[int], *, cache_salt: str | None = None) -> int:
        """Forget `prompt`, all that goes on behind it, and what leads to nothing else.

        Returns the position where that begins: the tokens before it are the beginning of something
        else too, and stay. Running requests go on, and store what they read. In a cache directory
        the files go as well, if this process writes there; one whose beginning has other uses stays
        as long as they do. Raises `NotStoredError` when `prompt` is
        not stored, up to its last token, and `PinnedError` when a pin would go; then nothing is forgotten.
        """
        tokens, salt = self._prompts.read(prompt, cache_salt)
        left = self.worker.call(self.engine.drop, salt, tokens)
        self.encoder.remembered.clear(salt)
        return left

    @known_keywords
    def flush(self, seconds: float | None = None) -> bool:
        """Wait until everything stored is on disk too, for `seconds` at most; whether it is.

        The most useful is written first. Without a cache directory there is nothing to wait for.
        """
        until = None if seconds is None else time.monotonic() + seconds
        while self.worker.call(self.engine.is_writing):
            self.worker.check_may_wait()
            if until is not None and time.monotonic() >= until:
                return False
            time.sleep(FLUSH_INTERVAL_SECONDS)
        return self.worker.call(self.engine.is_written)

    def follow(self) -> None:
        """On any rank of a group but 0: do what rank 0 does, until its cache is closed.

        Raises `GroupError` where a rank is lost before; then the process should end, as its worker may never.
        """
        if self.group is None or not self.group.rank:
            raise SettingError(
                "Only ranks behind rank 0 of a group follow; ask this cache instead."
            )
        self.group.wait()

    @known_keywords
    def close(self, flush_seconds: float = 20.0) -> None:
        """End running requests and the worker thread, and let go of everything in memory.

        What the cache directory lacks is written first, the most useful first, within
        `flush_seconds`. The model is then as it was before, but for a `router` that was asked for.
        """
        with suppress(ClosedError, GroupError):  # closing twice is no mistake
            self.flush(flush_seconds)
            self.worker.call(self.engine.close)
        self.worker.close()
        if self.group is not None:
            self.group.close()
        self.engine.tiers.memory.clear()  # what the requests that this ended have left
        self._let_go()
        self._disk_end()
        self._close_files()  # another thread that closes it may have come first

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
