"""The engine: match, restore, replay, generate, save. The journey of a request stands in `answer`.

Everything here runs on the worker thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx_lm.generate import GenerationResponse

from .caches.layout import Layout
from .caches.live import LiveCaches
from .caches.relief import Relief
from .decode.adapting import Adapting
from .decode.decoder import Decoder
from .decode.reply import Reply
from .decode.responses import respond
from .decode.uncached import respond_uncached
from .drafting.drafting import Drafting, told
from .prefill.followers import Followers
from .prefill.prefill import Prefill
from .report import CacheReport
from .request.options import for_the_cache
from .request.request import Request
from .request.sharing import Sharing
from .store.match import AnyFound
from .tiers import Tiers
from .tokens import Tokens
from .worker.turns import Pause, at_once

T = TypeVar("T")


@dataclass(eq=False)
class Keeping:
    """What is done with what both tiers hold, at once, between two turns, and what waits for room in them."""

    tiers: Tiers
    relief: Relief
    drafting: Drafting

    def between_turns(self) -> None:
        """What the system lacks is let go of."""
        self.relief.relieve()

    def publish(self) -> None:
        """Leave figures and outlines where any thread may read them."""
        self.tiers.publish()

    def pin(self, salt: str, tokens: Tokens, *, is_pinned: bool) -> int:
        """Keep what restores `tokens`, or no longer; returns its position."""
        return self.tiers.pin(salt, tokens, is_pinned=is_pinned)

    def is_writing(self) -> bool:
        """Whether something is being written to disk, or will be without waiting for anything."""
        return self.tiers.disk.is_writing()

    def is_written(self) -> bool:
        """Whether everything in memory is on disk too, as far as this process writes."""
        return self.tiers.disk.is_written()

    def in_time(self, request: Request, does: Callable[[], T]) -> Generator[Pause, None, T]:
        """What `does` gives a request, once there is room for it where there is some soon."""
        return (yield from self.tiers.disk.with_room(lambda: at_once(does), request.job))

    def close(self) -> None:
        """Hold nothing in memory any more, whatever ends from now on."""
        self.tiers.close()

    def clear(self) -> None:
        """Forget everything, in memory and in files."""
        self.tiers.clear()
        self.relief.give_back()

    def drop(self, salt: str, tokens: Tokens) -> int:
        """Forget what only `tokens` and what goes on behind them need; where that begins."""
        start = self.tiers.drop(salt, tokens)
        self.drafting.forget(salt, tokens)
        self.relief.give_back()
        return start


@dataclass(eq=False)
class Engine(Keeping):
    """One model with its tiers: what a request goes through, in turns."""

    model: Any
    tokenizer: Any
    layout: Layout
    sharing: Sharing
    followers: Followers
    prefill: Prefill
    decoder: Decoder
    last_report: CacheReport | None = field(default=None, init=False)
    adapting: Adapting = field(init=False)

    @property
    def ranks(self) -> tuple[Any, ...]:
        """What each rank of a group says of itself; nothing where there is one process."""
        return ()

    def __post_init__(self) -> None:
        self.adapting = Adapting(self.model, self.layout, self.sharing, self.decoder)

    def release(self) -> None:
        """Let the model and its draft models be what they were."""
        self.layout.release()
        self.drafting.release()

    def serve(
        self, request: Request, options: dict[str, Any], around: list[str]
    ) -> Iterator[GenerationResponse | Pause]:
        """Through the cache, or by mlx-lm alone where an option or the model asks for that."""
        if around or self.layout.unsupported:
            for name in ("draft_from_cache", "draft_mtp"):
                options.pop(name, None)
            return self.answer_uncached(request, around, options)
        return self.answer(request, for_the_cache(options))

    def answer(
        self, request: Request, options: dict[str, Any]
    ) -> Iterator[GenerationResponse | Pause]:
        """The map: what happens to a request, in order. Each `yield` ends a turn of the worker."""
        live = self.tiers.live(request)  # its caches, which are not there yet
        with self._keeping(request, live), self.drafting.listening(request, live, options):
            yield from self.read(request, live)  # as far as its last token
            reply = self._begin(request, live, options)  # alone or in a batch
            # Unless the template will strip the reply.
            with self.drafting.ending(request, reply), self._saving_end(request, reply):
                yield from self._write(request, reply)  # a token a turn

    def read(self, request: Request, live: LiveCaches) -> Iterator[Pause]:
        """The map's first half; where memory runs out there is a second try."""
        yield from self._twice(self._read, request, live)

    def _read(self, request: Request, live: LiveCaches) -> Generator[Pause, None, AnyFound]:
        yield from self.followers.join(request, live)  # whoever reads the same beginning goes first
        try:
            found = yield from self._resume(request, live)  # at the deepest checkpoint
            yield from self.drafting.resume(live)  # what its drafts go on from
            yield from self.prefill.read(request, live, found)  # a slice a turn; each cut is saved
        finally:
            self.followers.leave(request)
        return found

    def _resume(self, request: Request, live: LiveCaches) -> Generator[Pause, None, AnyFound]:
        self.relief.relieve(self.layout.running_bytes(request.rows))  # before anything is found
        resume = partial(self.tiers.resume, request, live)
        found = yield from self.tiers.disk.with_room(resume, request.job)  # drafts do not wait so
        self.tiers.publish_begun()
        return found

    def _twice(
        self,
        part: Callable[[Request, LiveCaches], Generator[Pause, None, AnyFound]],
        request: Request,
        live: LiveCaches,
    ) -> Iterator[Pause]:
        """A part of the journey, and the report on it; where memory runs out, with a second try."""
        began = time.perf_counter()
        found = yield from self.relief.twice(partial(part, request, live), live.release)
        self.tiers.report(request, found, time.perf_counter() - began)

    def _begin(self, request: Request, live: LiveCaches, options: dict[str, Any]) -> Reply:
        request.job.left = 0
        request.account.forwards += 1  # the last token's, which gives the first logits
        request.account.amend()
        drafts, processors = options.pop("drafts"), options.get("logits_processors") or ()
        return self.decoder.begin(
            request.tokens,
            live,
            ends=self.tokenizer.eos_token_ids,
            max_tokens=request.max_tokens,
            speculation=self.drafting.speculation(request, live, drafts, processors),
            **options,
        )

    def _write(self, request: Request, reply: Reply) -> Iterator[GenerationResponse | Pause]:
        report = request.account.report
        assert report is not None
        for response in respond(
            self.decoder,
            reply,
            self.tokenizer,
            prompt_tokens=len(request.tokens),
            prefill_seconds=report.prefill_seconds,
            revive=partial(self._revive, request, reply),
            room=partial(self.in_time, request),
            best_effort=request.best_effort,
        ):
            is_first = isinstance(response, GenerationResponse) and response.generation_tokens == 1
            if is_first:
                request.on_progress(len(request.tokens), len(request.tokens))
            if reply.speculation is not None:
                request.account.amend(**told(reply.speculation))
            yield response
            if is_first:
                reply.live.materialize()
                yield from self.drafting.read(request, reply)

    def _revive(self, request: Request, reply: Reply) -> Iterator[Pause]:
        """A reply whose batch failed goes on alone: what is stored of it is restored, the rest read again."""
        tokens = np.array([*request.tokens, *reply.read, reply.coming], dtype=np.int32)
        asked = (tokens, request.namespace.salt, reply.left)
        again = self.sharing.request(*asked, job=request.job, best_effort=request.best_effort)
        reply.live.namespace, reply.live.tokens = again.namespace, again.tokens
        yield from self.read(again, reply.live)
        self.decoder.revive(reply)
        request.job.left = 0
        request.account.forwards += again.account.forwards
        request.account.amend(
            detail=f"its batch failed behind {len(reply.read)} tokens of the reply; it went on alone"
        )

    @contextmanager
    def _saving_end(self, request: Request, reply: Reply) -> Iterator[None]:
        """Checkpoint the end of a reply, unless the next turn's history will leave part of it out and nobody drafts.

        That is where its caches stand: behind tokens too that were made ahead and that nobody took.
        """
        live, is_left, feeds_drafts = reply.live, True, self.drafting.feeds(reply)
        try:
            yield
        except BaseException as error:
            is_left = isinstance(error, GeneratorExit)  # whoever takes the reply has enough of it
            raise
        finally:
            self.decoder.take_back(reply)
            read = reply.read
            is_exact = self.sharing.is_exact(reply.position)
            keep = bool(read) and not is_exact
            keep = keep and (feeds_drafts or self._is_of_use(request, read))
            self.decoder.end(reply, keep=keep)
            if keep and live.is_standing and reply.guard.error is None:
                history = np.concatenate([request.tokens, np.array(read, dtype=np.int32)])
                mx.eval([cache.state for cache in live.caches])
                self.tiers.save_end(request, live, history)
            live.ended_well = is_left and reply.guard.error is None

    def _is_of_use(self, request: Request, read: list[int]) -> bool:
        """Whether the next turn's history can go on from the end of a reply. Of rows alone it takes any part."""
        marks = self.prefill.marks
        if self.layout.needs_snapshots and marks.ends_otherwise(read):
            return False
        return not marks.strips(read, request.tokens)

    @contextmanager
    def _keeping(self, request: Request, live: LiveCaches) -> Iterator[None]:
        """Whatever ends a request, rows that only its caches hold move to the store, and its claim is given back.

        The next turn may go on in its buffers.
        """
        try:
            yield
        finally:
            try:
                self.tiers.end(live)
            finally:
                self._close(request)
                mx.clear_cache()

    def _close(self, request: Request) -> None:
        """The account of a request is complete."""
        self.last_report = request.account.report or self.last_report
        self.tiers.publish()

    # Parts of the journey

    def prepare(self, request: Request, *, read: bool) -> Iterator[LiveCaches | Pause]:
        """The first half alone, for who runs the model: its last item are the caches, to be handed over.

        The store leaves nothing in those, because they are changed elsewhere.
        """
        live = self.tiers.live(request, shares=False)
        with self._keeping(request, live):
            if self.layout.unsupported:
                live.stand(self.layout.fresh_caches(self.model), 0, 0)
                request.account.report = request.uncached_report([], self.layout.unsupported)
            elif read:
                yield from self.read(request, live)
            else:
                yield from self._twice(self._resume, request, live)
            yield live

    def warm(self, request: Request) -> Iterator[CacheReport | Pause]:
        """The first half for requests to come: nothing but what is stored is left of it.

        Its last item is what such a request would find.
        """
        live = self.tiers.live(request)
        with self._keeping(request, live):
            if self.layout.unsupported:
                request.account.report = request.uncached_report([], self.layout.unsupported)
            else:
                yield from self.read(request, live)
        again = (request.tokens, request.namespace.salt, request.max_tokens)
        yield self._would_find(self.sharing.request(*again))

    def lookup(self, request: Request) -> CacheReport:
        """What a request would find, without changing anything."""
        return self._would_find(request)

    def _would_find(self, request: Request) -> CacheReport:
        if self.layout.unsupported:
            return request.uncached_report([], self.layout.unsupported)
        return self.tiers.lookup(request)

    def answer_uncached(
        self, request: Request, why: list[str], options: dict[str, Any]
    ) -> Iterator[GenerationResponse | Pause]:
        """mlx-lm's own path, for what the cache cannot serve; the report says so."""
        request.job.left = 0  # mlx-lm reads the prompt in one go, so there is nothing to plan
        request.account.report = request.uncached_report(why, self.layout.unsupported)
        live = self.tiers.live(request, shares=False)  # mlx-lm has its own: these only pay
        with self._keeping(request, live):
            need = self.layout.running_bytes(request.rows)
            live.claim = yield from self.in_time(request, partial(self.tiers.memory.claim, need))
            self.tiers.publish()
            is_ours = why == ["use_cache=False"] and self.layout.precision is not None
            if is_ours:  # the same reply, of which nothing is stored
                options = {**options, "prompt_cache": self.layout.fresh_caches(self.model)}
            yield from respond_uncached(
                self.model,
                self.tokenizer,
                request,
                live.claim,
                options,
                step=self.sharing.step,
                growth=self.layout.growth_bytes,
                room=partial(self.in_time, request),
            )
