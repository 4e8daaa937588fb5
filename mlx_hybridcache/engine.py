"""The engine: match, restore, replay, generate, save. The journey of a request stands in `answer`.

Everything here runs on the worker thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import GenerationResponse, stream_generate

from .account import divergence, report, uncached_report
from .caches import checkpoint as checkpoints
from .caches.kinds.rows import RowBlock
from .caches.layout import Layout, fresh_caches
from .caches.live import CacheLender
from .caches.room import ROW_STEP, longest_prompt
from .decode.decoder import Decoder, Prepared, Writer
from .decode.responses import respond
from .decode.sampling import seeded
from .disk.tier import DiskTier
from .errors import BudgetError, NotStoredError, PinnedError
from .machine import Pressure, give_back
from .prefill.followers import Readers
from .prefill.replay import plan, replay
from .prefill.schedule import Grid, Reading, partings
from .report import CacheReport
from .request.request import Request
from .store.budget import Claim, StoreStats
from .store.match import Found
from .store.materialize import Loans
from .store.outline import Outline, wall_clock
from .store.store import Store
from .store.tree import Rows
from .tokens import Namespace, Tokens, TurnMarks, settings_digest
from .worker.worker import PAUSE, Load, Pause

log = logging.getLogger("mlx_hybridcache")

GIVEN_BACK = 32
"""What was freed goes back to the system when it is such a part of the budget: 8 ms of work then."""


@dataclass(eq=False)
class Engine:
    """One model with its store: what a request goes through, in turns."""

    model: Any
    tokenizer: Any
    layout: Layout
    grid: Grid
    store: Store
    marks: TurnMarks
    settings: str
    exact: bool
    batches: bool
    load: Load = field(default_factory=Load)
    disk: DiskTier | None = None
    pressure: Pressure = field(default_factory=lambda: Pressure(0))
    loans: Loans = field(init=False)
    decoder: Decoder = field(init=False)
    readers: Readers = field(init=False)
    last_report: CacheReport | None = field(default=None, init=False)
    summary: StoreStats = field(init=False)
    outlines: Mapping[Namespace, Outline] = field(init=False)

    def __post_init__(self) -> None:
        self.loans = Loans(self.store)
        self.loans.on_owned = self._owned
        self.decoder = Decoder(self.model, self.layout, self.loans, batches=self.batches)
        self.readers = Readers(self.layout, self.grid, self._restorable)
        self.publish()

    def _owned(self) -> None:
        if self.disk is not None:
            self.disk.owned()

    def is_exact(self, tokens: int) -> bool:
        """Whether so many tokens are read along the grid only: what is computed of them depends on it."""
        return self.exact or self.layout.depends_on_slices(tokens)

    def namespaces(self, salt: str) -> list[Namespace]:
        """Where `salt`'s prompts are stored: what can be cut anywhere, and what only the grid can."""
        plain = Namespace(self.settings, salt)
        if self.exact or self.layout.slicing_limit is None:
            return [plain]
        gridded = settings_digest(settings=self.settings, slices=self.grid.step)
        return [plain, Namespace(gridded, salt)]

    def request(
        self, tokens: Tokens, salt: str, max_tokens: int, boundaries: Sequence[int] = ()
    ) -> Request:
        """What was asked, with where it belongs."""
        found = Request(tokens, self.namespace(salt, len(tokens)), max_tokens, tuple(boundaries))
        found.exact = self.is_exact(len(tokens))
        if self.layout.depends_on_slices(len(tokens)):
            found.detail = (
                f"beyond {self.layout.slicing_limit:,} tokens this model computes them by the slice "
                f"they are read in, so only what was read in the same slices of {self.grid.step:,} is shared"
            )
        return found

    def namespace(self, salt: str, tokens: int) -> Namespace:
        """The one for prompts of so many tokens."""
        return self.namespaces(salt)[-1 if self.layout.depends_on_slices(tokens) else 0]

    def publish(self) -> None:
        """Leave both tiers' figures and outlines where any thread may read them."""
        now = wall_clock()
        self.summary, self.outlines = self.store.stats(), self.store.outlines(now)
        if self.disk is not None:
            self.disk.publish(now)

    def clear(self) -> None:
        """Forget everything, in memory and in files."""
        self.store.clear()
        if self.disk is not None:
            self.disk.clear()
        self._give_back()
        self.publish()

    def relieve(self, coming_bytes: int = 0) -> None:
        """Between turns: let go what the system lacks, and give back what was let go by then."""
        store = self.store
        missing = self.pressure.excess(store.stored_bytes, coming_bytes)
        if missing:
            store.shrink(missing)
            self.publish()
        if store.freed_bytes > (0 if missing else store.budget_bytes // GIVEN_BACK):
            self._give_back()

    def _give_back(self) -> None:
        self.store.freed_bytes = 0
        mx.clear_cache()
        give_back()

    def pin(self, salt: str, tokens: Tokens, *, is_pinned: bool) -> int:
        """Keep what restores `tokens` in both tiers, or no longer; returns its position."""
        spaces = self.namespaces(salt)
        stored = {each: self._in_use(each, tokens)[0] for each in spaces}
        most = max(spaces, key=lambda each: stored[each])
        if is_pinned or not stored[most]:
            spaces = [most]
        position = max(
            self._pin(each, tokens, is_pinned) for each in spaces if stored[each] or each == most
        )
        self.publish()
        return position

    def _pin(self, namespace: Namespace, tokens: Tokens, is_pinned: bool) -> int:
        change = self.store.pin if is_pinned else self.store.unpin
        position = change(namespace, tokens)
        if self.disk is not None:
            self.disk.pin(namespace, tokens[:position], is_pinned=is_pinned)
        return position

    def drop(self, salt: str, tokens: Tokens) -> int:
        """Forget what only `tokens` and what goes on behind them need, in both tiers.

        Returns the position where that begins: what is before it has other uses.
        """
        going = [(each, *self._in_use(each, tokens)) for each in self.namespaces(salt)]
        _, stored, start = max(going, key=lambda one: one[1])
        if stored < self._stored_end(len(tokens)):
            raise NotStoredError(
                f"{stored:,} of these {len(tokens):,} tokens are stored; only what is stored to its "
                "end can be dropped."
            )
        pins = sum(
            max(tier.pins(each, tokens[:end], begin) for tier in self._tiers())
            for each, end, begin in going
        )
        if pins:
            raise PinnedError(f"{pins} of what would go is pinned. Unpin it first.")
        for each, end, begin in going:
            for tier in self._tiers():
                tier.drop(each, tokens[:end], begin)
        self._give_back()
        self.publish()
        return start

    def _in_use(self, namespace: Namespace, tokens: Tokens) -> tuple[int, int]:
        """How many of `tokens` are stored there, and how many of those something else needs too."""
        stored = max(tier.shared(namespace, tokens)[0] for tier in self._tiers())
        if stored >= len(tokens) - 1:
            tokens = tokens[:stored]  # a prompt's last token is read anew for each reply
        return stored, max(tier.shared(namespace, tokens)[1] for tier in self._tiers())

    def _stored_end(self, tokens: int) -> int:
        """How far a prompt of so many tokens is stored when it is stored to its end."""
        end = tokens - 1
        return max(1, end - end % self.grid.every if self.is_exact(tokens) else end)

    def _tiers(self) -> list[Store | DiskTier]:
        return [self.store] if self.disk is None else [self.store, self.disk]

    def answer(
        self, request: Request, options: dict[str, Any]
    ) -> Iterator[GenerationResponse | Pause]:
        """The map: what happens to a request, in order. Each `yield` ends a turn of the worker."""
        if self.layout.lends_rows:
            request.lender = CacheLender(request.namespace, request.tokens, self.layout)
        ready = yield from self._prepare(request)
        request.job.left = 0
        writer: Writer | None = None
        claim = ready.claim
        try:
            request.forwards += 1  # the last token's, which gives the first logits
            assert request.report is not None
            request.report = replace(request.report, forwards=request.forwards)
            writer = self.decoder.begin(
                request.tokens,
                ready,
                ends=self.tokenizer.eos_token_ids,
                max_tokens=request.max_tokens,
                **options,
            )
            del ready  # a batch that takes its caches over must be the last to hold them
            for response in respond(
                self.decoder,
                writer,
                self.tokenizer,
                prompt_tokens=len(request.tokens),
                prefill_seconds=request.report.prefill_seconds,
                revive=partial(self._revive, request, writer),
                best_effort=request.best_effort,
            ):
                is_first = (
                    isinstance(response, GenerationResponse) and response.generation_tokens == 1
                )
                if is_first:
                    request.on_progress(len(request.tokens), len(request.tokens))
                yield response
                if is_first:
                    self._own(request)
        finally:
            try:
                if writer is not None:
                    self._end(request, writer)
                    claim = writer.claim
            finally:
                self._give_up(request, claim)
                self._close(request)
                mx.clear_cache()

    def prepare(self, request: Request, *, read: bool) -> Iterator[Prepared | Pause]:
        """The first half alone, for who runs the model: its last item are the caches.

        Nothing is borrowed from those, because they are changed elsewhere.
        """
        if self.layout.unsupported:
            yield self._empty(request)
            return
        yield (yield from self._prepare(request, read=read))
        self._close(request)

    def warm(self, request: Request) -> Iterator[CacheReport | Pause]:
        """The first half for requests to come: nothing but what is stored is left of it.

        Its last item is what such a request would find.
        """
        if self.layout.unsupported:
            request.report = uncached_report(request, [], self.layout.unsupported)
        else:
            if self.layout.lends_rows:
                request.lender = CacheLender(request.namespace, request.tokens, self.layout)
            ready = yield from self._prepare(request)
            claim = ready.claim
            del ready  # the lender is the last to hold its caches, and gives them to the store
            self._give_up(request, claim)
            mx.clear_cache()
        self._close(request)
        yield self.lookup(self.request(request.tokens, request.namespace.salt, request.max_tokens))

    def longest_prompt(self) -> int | None:
        """The most tokens that a prompt may have for its caches to fit the budget; None: any number."""
        return longest_prompt(self.layout, self.store.budget_bytes)

    def _close(self, request: Request) -> None:
        """The account of a request is complete."""
        self.last_report = request.report
        self.publish()

    def _prepare(self, request: Request, *, read: bool = True) -> Generator[Pause, None, Prepared]:
        """Match, restore and, if `read`, replay all but the last token.

        Memory that MLX cannot get is made: half of the store goes, and what is read by then serves
        a second try.
        """
        began = time.perf_counter()
        try:
            return (yield from self._try(request, began, read=read))
        except RuntimeError as error:
            if not _is_allocation_failure(error):
                raise
            log.warning("Memory ran out while a prompt was read; making room for a second try.")
        self.store.shrink(self.store.stored_bytes // 2)
        self._give_back()
        return (yield from self._try(request, began, read=read))

    def _try(
        self, request: Request, began: float, *, read: bool
    ) -> Generator[Pause, None, Prepared]:
        if read:
            yield from self.readers.join(request)
        try:
            capacity = request.rows
            self.relieve(self.layout.running_bytes(capacity))  # before anything is found to restore
            caches, found, claim = yield from self._resume(request, capacity)
            position = found.position
            self.publish()
            try:
                if read:
                    for position in self._replay(request, found, caches):
                        try:
                            yield PAUSE
                        except BaseException:  # left between two slices, where all layers agree
                            self._save_last(request, request.tokens[:position], caches, claim)
                            raise
                    position = len(request.tokens) - 1
            except BaseException:
                self._give_up(request, claim)
                self.publish()
                raise
        finally:
            if read:
                self.readers.leave(request)
        request.report = report(self.store, request, found, time.perf_counter() - began)
        return Prepared(caches, position, capacity, claim, request.lender)

    def _give_up(self, request: Request, claim: Claim) -> None:
        """A request's caches go. What it read stays: rows that only they hold move to the store."""
        try:
            if request.lender is not None:
                self.loans.take_over(request.lender, claim)
        finally:
            claim.release()

    def _own(self, request: Request) -> None:
        """What was read so far outlives the request from now on, where that costs nobody anything."""
        if request.lender is not None:
            self.loans.own(request.lender)

    def _resume(
        self, request: Request, capacity: int
    ) -> Generator[Pause, None, tuple[list[Any], Found, Claim]]:
        """Caches that stand as far into the prompt as either tier reaches, what was found, their bytes."""
        self.store.tick()
        if self.disk is not None:
            self.disk.tick()
        while True:
            found = self._find(request)
            request.divergence = divergence(request, found)
            deeper = self._on_disk(request, found.position)
            if deeper is not None:
                try:
                    promoted = yield from self._promote(request, found, deeper, capacity)
                except BudgetError:
                    pass  # what memory has needs less
                else:
                    if promoted is not None:
                        return promoted
                    request.rejected += 1
                    continue  # without the file that was not what it should be
            return self._restore(request, found, capacity)

    def _on_disk(self, request: Request, beyond: int) -> Found | None:
        if self.disk is None:
            return None
        found = self.disk.find(request.namespace, request.tokens, beyond)
        if found is None:
            return None
        found = self._resumable(request, found)
        return found if found.position > beyond else None

    def _find(self, request: Request) -> Found:
        return self._resumable(request, self.store.find(request.namespace, request.tokens))

    def _resumable(self, request: Request, found: Found) -> Found:
        """Rows restore anywhere, but an exact request goes on only where a slice of the grid ends."""
        if not request.exact or self.layout.needs_snapshots:
            return found
        return replace(found, position=found.position - found.position % self.grid.step)

    def _promote(
        self, request: Request, found: Found, deeper: Found, capacity: int
    ) -> Generator[Pause, None, tuple[list[Any], Found, Claim] | None]:
        """The same from files, which the disk thread reads while others have their turns.

        What was read is in memory then like what was just computed. None when a file failed.
        """
        assert self.disk is not None
        need = self.layout.running_bytes(capacity) + self.layout.snapshot_bytes
        if self.layout.stores_every_slice:
            need += deeper.position * self.layout.row_bytes
        lender = request.lender
        claim = self.store.claim(need, found)
        try:
            landing = yield from self.disk.promote(found, deeper, capacity, request.job)
            if landing is None:
                claim.release()
                return None
            caches, checkpoint = landing.caches(self.model)
            self._lend(request, caches, deeper.position)
            tokens = request.tokens[: deeper.position]
            self._save_at(
                request.namespace,
                tokens,
                landing.block if lender is None else lender.rows_to(deeper.position),
                checkpoint,
                row_bytes=self.layout.row_bytes if lender is None else 0,
                is_end=False,
            )
            del landing, checkpoint  # a buffer that is held twice is copied when it is written to
            claim.shrink(self.layout.running_bytes(capacity))
        except BaseException:
            self._give_up(request, claim)
            raise
        match = max(found.match, deeper.match, key=lambda match: match.matched)
        return caches, Found(match, deeper.position, None, tier="disk"), claim

    def _restorable(self, request: Request) -> int:
        position = self._find(request).position
        deeper = self._on_disk(request, position)
        return position if deeper is None else deeper.position

    def _restore(
        self, request: Request, found: Found, capacity: int
    ) -> tuple[list[Any], Found, Claim]:
        """From memory; where the restored path itself is in the way of the request, without it."""
        need = self.layout.running_bytes(capacity)
        state = found.checkpoint
        snapshots = list(state.snapshots) if state is not None else []
        del state
        # Of a run that is restored in part MLX makes copies on the way, an array at a time.
        passing = found.cut_tokens() * self.layout.array_bytes
        try:
            claim, blocks = self._claim(request, found, need + passing)
        except BudgetError:
            claim, blocks = self.store.claim(need), []
            found = replace(found, position=0, node=None)
            snapshots.clear()
        try:
            if found.position:
                self.store.use(found)
            caches = checkpoints.restore(
                self.layout,
                self.model,
                blocks,
                snapshots,
                found.position,
                capacity,
                is_spent=claim.nbytes > need,  # what moves is held once
            )
            claim.shrink(need)
            self._lend(request, caches, found.position)
        except BaseException:
            self._give_up(request, claim)
            raise
        return caches, found, claim

    def _claim(self, request: Request, found: Found, need: int) -> tuple[Claim, list[RowBlock]]:
        """Room for what is restored, and the rows to restore; a checkpoint goes for it at the last."""
        if request.lender is None:
            return self.store.claim(need, found), found.blocks()
        try:
            return self.loans.claim_for(need, found, request.lender)
        except BudgetError:
            return self.loans.claim_for(need, found, request.lender, spends_checkpoint=True)

    def _lend(self, request: Request, caches: list[Any], position: int) -> None:
        """The store may leave rows in `caches`, whose first `position` are as it has them."""
        if request.lender is not None:
            request.lender.caches = caches
            request.lender.alike = [(0, position)]
            self.loans.lend(request.lender)

    def _replay(self, request: Request, found: Found, caches: list[Any]) -> Iterator[int]:
        """Read what was not restored, but the last token, saving every checkpoint as it is crossed."""
        tokens = request.tokens
        reading = Reading(
            start=found.position,
            end=len(tokens) - 1,
            turn_starts=self.marks.starts(tokens),
            branch=found.match.matched,
            boundaries=request.boundaries,
        )
        route = plan(self.layout, self.grid, reading, exact=request.exact)
        parted = partings(reading, self.grid, is_inside=found.is_inside)
        request.on_progress(found.position, len(tokens))
        request.advance(found.position)

        def step() -> int:
            whole = request.exact or not self.load.is_shared
            return self.grid.step if whole else self.grid.shared_step

        def afford(a: int, b: int, cuts: list[int]) -> list[int]:
            return self._afford(request, b, cuts, parted)

        slices = replay(
            self.layout,
            self.model,
            caches,
            tokens,
            route,
            step=step,
            stops=request.stops,
            afford=afford,
        )
        for read in slices:
            request.forwards += 1
            position, left = read.position, [*read.taken]
            del read  # what the store lets go of again must not be held from here
            while left:
                at = left[0].position
                is_end, is_parting = at == reading.end, at in parted
                self._save(request, left.pop(0), caches, is_end=is_end, is_parting=is_parting)
            self._own(request)
            request.advance(position)
            request.on_progress(position, len(tokens))
            yield position

    def _afford(
        self, request: Request, end: int, cuts: list[int], parted: Container[int]
    ) -> list[int]:
        """Of the cuts in the slice that ends at `end`, those whose snapshots and rows are worth their room."""
        kept = self.store.afford(
            request.namespace,
            request.tokens[:end],
            cuts,
            partings=parted,
            row_bytes=self._stored_row_bytes(request.lender),
            snapshot_bytes=self.layout.snapshot_bytes,
        )
        request.refused += len(cuts) - len(kept)
        return kept

    def _save(
        self,
        request: Request,
        taken: checkpoints.Checkpoint,
        caches: Sequence[Any],
        *,
        is_end: bool,
        is_parting: bool,
    ) -> None:
        tokens = request.tokens[: taken.position]
        stored = self._save_from(
            request.namespace,
            tokens,
            taken,
            caches,
            request.lender,
            is_end=is_end,
            is_parting=is_parting,
        )
        request.taken += stored
        request.refused += not stored

    def _stored_row_bytes(self, lender: CacheLender | None) -> int:
        """What a token's rows add to the store now: nothing where they stay in running caches."""
        return self.layout.row_bytes if lender is None else 0

    def _save_from(
        self,
        namespace: Namespace,
        tokens: Tokens,
        taken: checkpoints.Checkpoint,
        caches: Sequence[Any],
        lender: CacheLender | None,
        *,
        is_end: bool,
        is_parting: bool = False,
    ) -> bool:
        def copied(start: int) -> Rows | None:
            return checkpoints.take_rows(self.layout, caches, start, len(tokens))

        rows_of = copied if lender is None else lender.rows_to(len(tokens))
        row_bytes = self._stored_row_bytes(lender)
        return self._save_at(
            namespace,
            tokens,
            rows_of,
            taken,
            row_bytes=row_bytes,
            is_end=is_end,
            is_parting=is_parting,
        )

    def _save_at(
        self,
        namespace: Namespace,
        tokens: Tokens,
        rows_of: Callable[[int], Rows | None],
        taken: checkpoints.Checkpoint | None,
        *,
        row_bytes: int,
        is_end: bool,
        is_parting: bool = False,
    ) -> bool:
        """Into the memory tier, and from there to the disk in time."""
        is_stored = self.store.save(
            namespace,
            tokens,
            rows_of,
            taken if self.layout.needs_snapshots else None,
            row_bytes=row_bytes,
            is_end=is_end,
            is_parting=is_parting,
        )
        if is_stored and self.disk is not None:
            self.disk.offer(namespace, self.store.find(namespace, tokens).nodes()[-1])
        return is_stored

    def _revive(self, request: Request, writer: Writer) -> Iterator[Pause]:
        """A reply whose batch failed goes on alone: what is stored of it is restored, the rest read again."""
        report = request.report
        assert report is not None
        read = np.array([*request.tokens, *writer.read, writer.coming], dtype=np.int32)
        again = self.request(read, request.namespace.salt, writer.left)
        again.job, again.best_effort = request.job, request.best_effort
        if self.layout.lends_rows:
            again.lender = CacheLender(again.namespace, again.tokens, self.layout)
        self.decoder.revive(writer, (yield from self._prepare(again)))
        request.lender, request.job.left = again.lender, 0
        request.forwards += again.forwards
        request.report = replace(
            report,
            forwards=request.forwards,
            detail=f"its batch failed behind {len(writer.read)} tokens of the reply; it went on alone",
        )

    def _end(self, request: Request, writer: Writer) -> None:
        """Checkpoint the end of a reply, unless the next turn's history will leave part of it out.

        That is where its caches stand: behind tokens too that were made ahead and that nobody took.
        """
        reply = writer.read
        is_exact = self.is_exact(writer.position)
        keep = bool(reply) and not is_exact and not self.marks.strips(reply)
        caches, lender = self.decoder.end(writer, keep=keep), request.lender
        if caches is None:
            return
        if lender is not None:
            lender.caches = caches
        if not keep or writer.guard.error is not None:
            return
        history = np.concatenate([request.tokens, np.array(reply, dtype=np.int32)])
        mx.eval([cache.state for cache in caches])
        self._save_last(request, history, caches, writer.claim)

    def _save_last(
        self, request: Request, history: Tokens, caches: Sequence[Any], claim: Claim
    ) -> None:
        """Caches that are about to go leave their state as a checkpoint, if they stand at `history`'s end."""
        if request.exact or self.layout.mismatch(caches, len(history)) is not None:
            return
        lender = request.lender
        if lender is not None:
            lender.tokens = history
        try:
            self.store.make_room(max(kind.snapshot_bytes for kind in self.layout.kinds))
        except BudgetError:
            return
        taken = checkpoints.move_state(self.layout, caches, len(history))
        claim.shrink(claim.nbytes - taken.nbytes)
        self._save_from(request.namespace, history, taken, caches, lender, is_end=True)

    def save_caches(self, namespace: Namespace, tokens: Tokens, caches: Sequence[Any]) -> bool:
        """Checkpoint `caches`, which stand at `len(tokens)`, if there is room."""
        found = self.store.find(namespace, tokens)
        missing = len(tokens) - found.match.matched
        need = self.layout.snapshot_bytes + missing * self.layout.row_bytes
        try:
            self.store.make_room(need, found.nodes())
        except BudgetError:
            return False
        taken = checkpoints.take(self.layout, caches, len(tokens))
        return self._save_from(namespace, tokens, taken, caches, None, is_end=True)

    def lookup(self, request: Request) -> CacheReport:
        """What a request would find, without changing anything."""
        if self.layout.unsupported:
            return uncached_report(request, [], self.layout.unsupported)
        found = self._find(request)
        deeper = self._on_disk(request, found.position)
        if deeper is not None:
            found = replace(deeper, tier="disk")
        return report(self.store, request, found, 0.0)

    # Without the cache

    def answer_uncached(
        self, request: Request, why: list[str], options: dict[str, Any]
    ) -> Iterator[GenerationResponse | Pause]:
        """mlx-lm's own path, for what the cache cannot serve; the report says so."""
        began = time.perf_counter()
        request.job.left = 0  # mlx-lm reads the prompt in one go, so there is nothing to plan
        request.report = told = uncached_report(request, why, self.layout.unsupported)
        capacity = request.rows
        claim = self.store.claim(self.layout.running_bytes(capacity))
        self.publish()
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
        try:
            for response in seeded(responses, seed):
                if response.generation_tokens == 1:
                    seconds = time.perf_counter() - began
                    request.report = replace(told, prefill_seconds=seconds)
                mx.eval(response.logprobs)
                is_full = len(request.tokens) + response.generation_tokens >= capacity
                if is_full and response.finish_reason is None:
                    capacity += ROW_STEP
                    try:
                        claim.grow(ROW_STEP * self.layout.row_bytes)
                    except BudgetError:
                        if not request.best_effort:
                            raise
                        response.finish_reason = "length"
                yield response
                if response.finish_reason is not None:
                    return
        finally:
            responses.close()
            claim.release()
            self._close(request)

    def _empty(self, request: Request) -> Prepared:
        """Empty caches, for a model whose caches cannot be restored."""
        self.last_report = request.report = uncached_report(request, [], self.layout.unsupported)
        return Prepared(fresh_caches(self.model), 0, 0, self.store.claim(0))


def _is_allocation_failure(error: RuntimeError) -> bool:
    """MLX has no class for it: `[metal::malloc] Unable to allocate`, `[malloc_or_wait]`, and so on."""
    said = str(error).lower()
    return any(word in said for word in ("malloc", "unable to allocate", "out of memory"))
