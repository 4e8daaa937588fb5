"""Both tiers: where a prompt goes on, what is saved of it on the way, and what is kept or forgotten.

Memory is asked first; files go on where memory ends. What is saved goes into memory, and from there
to the disk in time.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Generator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .caches import checkpoint as checkpoints
from .caches.checkpoint import Checkpoint
from .caches.kinds.rows import origins_of
from .caches.layout import Layout
from .caches.live import LiveCaches, RowsFrom
from .caches.memory import MemoryFound, MemoryStore
from .caches.retaining.pool import BufferPool
from .disk.tier.no_disk import NoDisk
from .errors import BudgetError, NotStoredError, PinnedError
from .report import CacheReport, Reason
from .request.request import Request
from .request.sharing import Sharing
from .store.budget import StoreStats
from .store.lazy_rows import rows_before
from .store.match import AnyFound, Found
from .store.materialize import Materializer
from .store.outline import Outline, wall_clock
from .store.tree import R, S
from .tokens import Namespace, Tokens
from .worker.turns import Pause

if TYPE_CHECKING:
    from .disk.parts import FileFound
    from .disk.tier.tier import DiskTier

log = logging.getLogger("mlx_hybridcache")

TRIES = 64
"""Files that one request passes over before it is content with memory: each try reads what leads to one."""


_STORED = ("checkpoints", "nodes", "pinned", "soft_pinned", "evictions")
"""Figures of which one has changed when more than recency has in a tree."""


class Tiers:
    """Memory and disk behind one set of verbs. `disk` is there once its directory is open."""

    summary: StoreStats
    """What memory held last: any thread may read it."""
    outlines: Mapping[Namespace, Outline]
    """Memory's trees: any thread may look at them."""

    def __init__(self, model: Any, layout: Layout, sharing: Sharing, memory: MemoryStore):
        self.memory = memory
        self.disk: DiskTier | NoDisk = NoDisk()
        self._model = model
        self._layout = layout
        self._sharing = sharing
        self._materializer = Materializer(memory)
        self._materializer.on_materialized = self._materialized
        self.pool = BufferPool(memory.budget)
        """Of requests that have ended."""
        self._materializer.let_retained_go = self.pool.make_room
        self.publish()

    def beside(self, model: Any, layout: Layout, sharing: Sharing) -> Tiers:
        """The same for a draft model, in the same store, budget and directory, in namespaces of its own."""
        for each in (settings := [each.settings for each in sharing.namespaces("")]):
            self.memory.settle_needs(each, needs_checkpoints=layout.needs_snapshots)
        self.disk.learn(layout, model, settings)
        beside = copy(self)
        beside._model, beside._layout, beside._sharing = model, layout, sharing
        return beside

    def publish(self) -> None:
        """Leave both tiers' figures and outlines where any thread may read them."""
        now = wall_clock()
        self.summary, self.outlines = self.memory.stats(), self.memory.outlines(now)
        self.disk.publish(now)

    def publish_begun(self) -> None:
        """A request was resumed: what it holds is shown, and what came or went for it.

        That it used something is shown with its end. An outline takes as long as the conversation that it is of.
        """
        before, now = self.summary, self.memory.stats()
        if any(getattr(before, name) != getattr(now, name) for name in _STORED):
            self.publish()
        self.summary = now

    def _materialized(self) -> None:
        """Rows that lay in live caches are memory's own: what waited for them may be written."""
        self.disk.materialized()

    def live(self, request: Request, *, shares: bool = True) -> LiveCaches:
        """Caches for a request, not there yet. Without `shares` the store leaves nothing in them."""
        self._sharing.check(request)
        return LiveCaches(
            self._materializer, self._layout, request.namespace, request.tokens, shares=shares
        )

    # Finding

    def find(self, request: Request, live: LiveCaches) -> MemoryFound:
        """Where memory resumes a prompt."""
        found = self.memory.find(request.namespace, request.tokens, live.known)
        live.saw(found.match)
        return self._resumable(request, found)

    def reach(self, request: Request, live: LiveCaches) -> int:
        """The position from which a prompt would go on at this moment."""
        return self._deepest(request, self.find(request, live)).position

    def lookup(self, request: Request) -> CacheReport:
        """What a request would find, without changing anything."""
        in_memory = self.memory.find(request.namespace, request.tokens)
        found = self._deepest(request, self._resumable(request, in_memory))
        return request.report(found, self._reason(request, found))

    def report(self, request: Request, found: AnyFound, seconds: float) -> None:
        """A prompt is read: what was found for it, and what was done."""
        request.account.report = request.report(found, self._reason(request, found), seconds)

    def _deepest(self, request: Request, found: MemoryFound) -> AnyFound:
        return self._on_disk(request, found.position) or found

    def _on_disk(self, request: Request, beyond: int) -> FileFound | None:
        found = self.disk.find(request.namespace, request.tokens, beyond)
        if found is None:
            return None
        found = self._resumable(request, found)
        return replace(found, tier="disk") if found.position > beyond else None

    def _resumable(self, request: Request, found: Found[R, S]) -> Found[R, S]:
        """Rows restore anywhere, but an exact request goes on only where a slice of the grid ends."""
        if not request.exact or self._layout.needs_snapshots:
            return found
        return replace(found, position=found.position - found.position % self._sharing.step)

    def _reason(self, request: Request, found: AnyFound) -> Reason:
        memory, namespace, tokens = self.memory, request.namespace, request.tokens
        if request.account.rejected:
            return Reason.DISK_REJECTED
        if found.position == 0:
            if memory.was_evicted(namespace, tokens):
                return Reason.EVICTED
            if memory.known_elsewhere(namespace, tokens) > found.match.matched:
                return Reason.NAMESPACE
            return Reason.COLD
        if found.match.matched >= len(tokens) - 1:
            return Reason.EXACT
        return Reason.BRANCH if found.match.contradicted else Reason.PREFIX

    # Resuming

    def resume(self, request: Request, live: LiveCaches) -> Generator[Pause, None, AnyFound]:
        """Fill `live` as far into the prompt as either tier reaches; returns what was found. Raises `BudgetError`."""
        found = yield from self._resume(request, live)
        self.hold(request, found.position)
        return found

    def _resume(self, request: Request, live: LiveCaches) -> Generator[Pause, None, AnyFound]:
        self.memory.tick()
        self.disk.tick()
        for _ in range(TRIES):
            found = self.find(request, live)
            request.matched(found)
            deeper = self._on_disk(request, found.position)
            if deeper is None:
                break
            try:
                promoted = yield from self._promote(request, live, found, deeper)
            except BudgetError as error:
                if error.fits_soon:
                    raise
                break  # what memory has needs less
            if promoted is not None:
                return promoted
            request.account.rejected += 1  # again, without the file that was not what it should be
        else:
            found = self.find(request, live)
        return self._restore(request, live, found)

    def _promote(
        self, request: Request, live: LiveCaches, found: MemoryFound, deeper: FileFound
    ) -> Generator[Pause, None, AnyFound | None]:
        """From files, which the disk thread reads while others have their turns.

        What was read is in memory then like what was just computed. None when a file failed.
        """
        layout, capacity, position = self._layout, request.rows, deeper.position
        need = layout.running_bytes(capacity) + layout.stored_snapshot_bytes
        if layout.stores_every_slice or layout.storing:  # beside the rows of the caches
            need += layout.rows_nbytes(0, position)
        need += layout.restoring_bytes(position)
        live.claim = self.memory.claim(need, found)
        covered = min(found.match.matched, position)
        origins = origins_of(rows_before(found.nodes(), covered), covered)
        try:
            buffers = yield from self.disk.promote(
                layout, found, deeper, capacity, live.claim, request.job
            )
            if buffers is None:
                live.release()
                return None
            caches, checkpoint = buffers.caches(self._model)
            live.restored(caches, position, capacity, origins)
            rows = live.rows_to(position, copied=buffers.block)
            self._save(request.namespace, request.tokens[:position], checkpoint, live, rows)
            del caches, buffers, checkpoint, rows  # a buffer held twice is copied when written to
            live.claim.shrink(layout.running_bytes(capacity))
        except BaseException:
            live.release()
            raise
        farther: AnyFound = max(found, deeper, key=lambda each: each.match.matched)
        return replace(farther, position=position, node=None, tier="disk")

    def _restore(self, request: Request, live: LiveCaches, found: MemoryFound) -> MemoryFound:
        """From memory; where the restored path itself is in the way of the request, without it."""
        layout, capacity = self._layout, request.rows
        if live.retains and self._taken_over(request, live, found):
            return found
        if found.position:
            capacity += live.headroom(capacity)
        need = layout.running_bytes(capacity)
        snapshots = list(found.checkpoint.snapshots) if found.checkpoint is not None else []
        passing = layout.restoring_bytes(found.position, found.cut_tokens())
        try:
            blocks = live.claim_for(need + passing, found)
        except BudgetError as error:
            if error.fits_soon:
                raise
            live.claim, blocks = self.memory.claim(need), []
            found = replace(found, position=0, node=None)
            snapshots.clear()
        if found.position:
            self.memory.use(found)
        origins = origins_of(blocks, found.position)
        caches = checkpoints.restore(
            layout,
            self._model,
            blocks,
            snapshots,
            found.position,
            capacity,
            is_spent=live.claim.nbytes > need,  # what moves is held once
        )
        live.claim.shrink(need)
        live.restored(caches, found.position, capacity, origins)
        return found

    def end(self, live: LiveCaches) -> None:
        """A request is over: its buffers are retained for the next turn where that costs nobody anything."""
        try:
            if self.pool.most and (retained := live.retain()) is not None:
                self.pool.put(retained)
        except Exception as error:  # it would have been a gain only
            # As text: a record that keeps the error keeps the buffers.
            log.warning("The buffers of a request could not be retained: %s", str(error))
        finally:
            live.release()

    def _taken_over(self, request: Request, live: LiveCaches, found: MemoryFound) -> bool:
        """In the buffers of the turn before, if they are still there."""
        retained = self.pool.take(request.namespace, request.tokens, found)
        if retained is None or not live.take_over(self._model, retained, found, request.rows):
            return False
        self.memory.taken_over += 1
        self.memory.use(found)
        return True

    # Saving

    def afford(
        self,
        request: Request,
        live: LiveCaches,
        end: int,
        cuts: list[int],
        branch_points: Container[int],
        lasting: Container[int],
    ) -> list[int]:
        """Of the cuts in the slice that ends at `end`, those whose snapshots and rows are worth their room."""
        kept = self.memory.afford(
            request.namespace,
            request.tokens[:end],
            cuts,
            branch_points=branch_points,
            rows_nbytes=live.stored_nbytes,
            snapshot_bytes=self._layout.stored_snapshot_bytes,
            lasting=lasting,
            known=live.known,
        )
        request.account.refused += len(cuts) - len(kept)
        return kept

    def save(
        self,
        request: Request,
        live: LiveCaches,
        taken: Checkpoint,
        *,
        is_end: bool,
        is_branch_point: bool,
    ) -> None:
        """A checkpoint that was crossed while a prompt was read, with the rows that lead to it."""
        tokens = request.tokens[: taken.position]
        is_stored = self._save(
            request.namespace, tokens, taken, live, is_end=is_end, is_branch_point=is_branch_point
        )
        request.account.taken += is_stored
        request.account.refused += not is_stored

    def save_end(self, request: Request, live: LiveCaches, history: Tokens) -> None:
        """Caches that are about to go leave their state as a checkpoint, if they stand at `history`'s end."""
        if request.exact or not live.stands_at(len(history)):
            return
        live.tokens, live.position = history, len(history)
        try:
            self.memory.budget.make_room(self._layout.largest_snapshot_bytes)
        except BudgetError:
            return
        self._save(request.namespace, history, live.move_state(), live, is_end=True)

    def save_foreign(self, request: Request, caches: Sequence[Any]) -> bool:
        """Checkpoint caches that others read, at the end of the request's tokens, if there is room."""
        tokens = request.tokens
        found = self.memory.find(request.namespace, tokens)
        need = self._layout.stored_snapshot_bytes
        need += self._layout.rows_nbytes(found.match.matched, len(tokens))
        try:
            self.memory.budget.make_room(need, found.nodes())
        except BudgetError:
            return False
        live = self.live(request, shares=False)
        live.stand([*caches], len(tokens), len(tokens))
        taken = checkpoints.take(self._layout, caches, len(tokens))
        return self._save(request.namespace, tokens, taken, live, is_end=True)

    def _save(
        self,
        namespace: Namespace,
        tokens: Tokens,
        taken: Checkpoint | None,
        live: LiveCaches,
        rows: RowsFrom | None = None,
        *,
        is_end: bool = False,
        is_branch_point: bool = False,
    ) -> bool:
        """Into memory, and from there to the disk in time."""
        node = self.memory.save(
            namespace,
            tokens,
            rows or live.rows_to(len(tokens)),
            taken if self._layout.needs_snapshots else None,
            rows_nbytes=live.stored_nbytes,
            is_end=is_end,
            is_branch_point=is_branch_point,
            known=live.known,
        )
        if node is None:
            return False
        live.known = node
        self.disk.offer(namespace, node)
        return True

    # Keeping and forgetting

    def hold(self, request: Request, end: int) -> None:
        """Soft pins for what restores the request's lifetimes up to `end`, in both tiers."""
        lifetimes = {at: each for at, each in request.lifetimes.items() if at <= end}
        if lifetimes:
            namespace, tokens = request.namespace, request.tokens[:end]
            request.account.soft_pins |= self.memory.hold(namespace, tokens, lifetimes)
            self.disk.hold(namespace, tokens, lifetimes)

    def pin(self, salt: str, tokens: Tokens, *, is_pinned: bool) -> int:
        """Keep what restores `tokens` in both tiers, or no longer; returns its position."""
        spaces = self._sharing.namespaces(salt)
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
        position = (self.memory.pin if is_pinned else self.memory.unpin)(namespace, tokens)
        self.disk.pin(namespace, tokens[:position], is_pinned=is_pinned)
        return position

    def drop(self, salt: str, tokens: Tokens) -> int:
        """Forget what only `tokens` and what goes on behind them need, in both tiers.

        Returns the position where that begins: what is before it has other uses.
        """
        going = [(each, *self._in_use(each, tokens)) for each in self._sharing.namespaces(salt)]
        _, stored, start = max(going, key=lambda one: one[1])
        if stored < self._sharing.stored_end(len(tokens)):
            raise NotStoredError(
                f"{stored:,} of these {len(tokens):,} tokens are stored; only what is stored to its "
                "end can be dropped."
            )
        both = (self.memory, self.disk)
        pins = sum(
            max(tier.pins(each, tokens[:end], begin) for tier in both) for each, end, begin in going
        )
        if pins:
            raise PinnedError(f"{pins} of what would go is pinned. Unpin it first.")
        self.pool.clear()
        self.forget(salt, tokens)
        self.publish()
        return start

    def forget(self, salt: str, tokens: Tokens) -> None:
        """The same of as much of it as is stored: a draft model may have less."""
        for each in self._sharing.namespaces(salt):
            end, begin = self._in_use(each, tokens)
            for tier in (self.memory, self.disk):
                tier.drop(each, tokens[:end], begin)

    def clear(self) -> None:
        """Forget everything, in memory and in files."""
        self.pool.clear()
        self.memory.clear()
        self.disk.clear()
        self.publish()

    def close(self) -> None:
        """Hold nothing in memory any more, whatever ends from now on."""
        self.pool.close()
        self.memory.clear()

    def _in_use(self, namespace: Namespace, tokens: Tokens) -> tuple[int, int]:
        """How many of `tokens` are stored there, and how many of those something else needs too."""
        both = (self.memory, self.disk)
        stored = max(tier.shared(namespace, tokens)[0] for tier in both)
        if stored >= len(tokens) - 1:
            tokens = tokens[:stored]  # a prompt's last token is read anew for each reply
        return stored, max(tier.shared(namespace, tokens)[1] for tier in both)
