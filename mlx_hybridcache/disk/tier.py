"""The disk tier beside the memory tier: which checkpoints go down, and how a prompt comes up again.

Used on the worker thread, which does no file operation: files are the disk thread's. What is written
is lent to it as views of the store's own arrays; what it reads goes straight into the buffers of the
caches that are being restored.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import shutil
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..caches.checkpoint import Checkpoint
from ..caches.kinds.rows import RowBlock
from ..caches.layout import Layout
from ..errors import BudgetError, SettingError, refusal
from ..sizes import format_bytes
from ..store.budget import Holders
from ..store.lazy_rows import is_borrowing
from ..store.match import Found
from ..store.outline import Outline, wall_clock
from ..store.store import Store
from ..store.tree import Held, Node, common_length
from ..tokens import Namespace, Tokens
from ..worker.turns import PAUSE, Job, Pause
from .arrays import (
    Freight,
    Landing,
    Shapes,
    rows_freight,
    state_freight,
)
from .catalogue import (
    Catalogue,
    Lacking,
    parts_of,
    state_of,
)
from .chains import Chains, Difference
from .directory import Directory
from .segment import NameTakenError, Segment
from .thread import Change, DiskThread, Transfer
from .write_behind import Waiting

log = logging.getLogger("mlx_hybridcache")

WORTH = 64
"""Tokens that files must save beyond memory before they are read."""

QUEUE_SHARE = 16
"""What waits to be written is at most this part of the memory budget, or one segment."""

MOST_BYTES = 100 * 10**9
"""The default disk budget is never more."""

MOST_UNWRITTEN = 4096
"""Checkpoints on a waiting list that is then rid of those that memory has let go of."""

LOOKS = 16
"""Checkpoints that are looked at in one go to find what they lack."""

PIECE = 32
"""Files or positions that are taken over in one go when another process changed the directory."""

FULL = {errno.ENOSPC, errno.EDQUOT}
"""Errors that say that the directory holds all that it can."""

REST_SECONDS = 30.0
"""How long nothing is written after a write that failed."""


class Lent(Holders):
    """What the disk thread holds of the memory tier. What the store lets go of meanwhile counts on."""

    def __init__(self) -> None:
        self._holds: dict[int, int] = {}
        self._gone: set[int] = set()

    def lend(self, payload: Held) -> None:
        """One more holds it."""
        self._holds[id(payload)] = self._holds.get(id(payload), 0) + 1

    def give_back(self, payload: Held) -> int:
        """One less holds it; the bytes that are held no longer by anybody."""
        self._holds[id(payload)] -= 1
        if self._holds[id(payload)]:
            return 0
        del self._holds[id(payload)]
        is_gone = id(payload) in self._gone
        self._gone.discard(id(payload))
        return payload.nbytes if is_gone else 0

    def dropped(self, payload: Held) -> int:
        if id(payload) not in self._holds:
            return 0
        self._gone.add(id(payload))
        return payload.nbytes

    def split(self, rows: Held) -> int:
        return self.dropped(rows)

    def is_held(self, payload: Held) -> bool:
        return id(payload) in self._holds


@dataclass(frozen=True, slots=True)
class DiskStats:
    """What the directory holds for all models, and what this process did there."""

    budget_bytes: int
    held_bytes: int
    checkpoints: int
    files: int
    is_writer: bool
    queued_bytes: int
    unwritten: int
    written_bytes: int
    read_bytes: int
    rejected: int
    failures: int


@dataclass(eq=False)
class _Writing:
    """One checkpoint on its way down: `tokens` lead to it, `left` is what its files still lack."""

    node: Node
    name: Namespace
    namespace: str
    tokens: Tokens
    left: deque[Lacking]


@dataclass(eq=False)
class DiskTier:
    """Writes behind and reads ahead for one engine. `step` bounds a file of rows, in tokens."""

    thread: DiskThread
    catalogue: Catalogue
    store: Store
    lent: Lent
    layout: Layout
    shapes: Shapes
    step: int
    model: str = ""
    _unwritten: Waiting = field(init=False)
    _borrowing: dict[Node, Namespace] = field(default_factory=dict, init=False)
    _clearing: dict[Node, Namespace] = field(default_factory=dict, init=False)
    _is_looking: bool = field(default=False, init=False)
    _current: _Writing | None = field(default=None, init=False)
    _in_flight: dict[tuple[str, str], tuple[Segment, _Writing]] = field(
        default_factory=dict, init=False
    )
    _cleared: set[tuple[str, str]] = field(default_factory=set, init=False)
    _taken: set[tuple[str, str]] = field(default_factory=set, init=False)
    _coming: deque[Difference] = field(default_factory=deque, init=False)
    _is_behind: bool = field(default=False, init=False)
    _newer_bytes: int = field(default=0, init=False)
    _rest_until: float = field(default=0.0, init=False)
    _written_bytes: int = field(default=0, init=False)
    _read_bytes: int = field(default=0, init=False)
    _rejected: int = field(default=0, init=False)
    _failures: int = field(default=0, init=False)
    summary: DiskStats = field(init=False)
    """What `stats` said last: any thread may read it."""
    outlines: Mapping[Namespace, Outline] = field(init=False)
    """The directory's trees, by what files call a namespace: any thread may look at them."""

    def __post_init__(self) -> None:
        self._unwritten = Waiting(self._is_there, MOST_UNWRITTEN)
        self.publish(None)

    def publish(self, now: float | None) -> None:
        """Leave figures and outlines where any thread may read them. `now` is the wall clock."""
        self.summary = self.stats()
        self.outlines = self.catalogue.store.outlines(now)

    @classmethod
    def open(
        cls,
        root: Path,
        budget_bytes: int | None,
        store: Store,
        lent: Lent,
        layout: Layout,
        model: Any,
        step: int,
        post: Callable[[Callable[[], None]], None],
    ) -> DiskTier:
        """The tier in the directory `root`, which is made if need be. `post` runs things on the worker.

        Without `budget_bytes` half of what is free there, at most `MOST_BYTES`. Raises `SettingError`
        when the directory cannot be used.
        """
        directory = Directory(root)
        try:
            entries = directory.open()
            if budget_bytes is None:
                held = sum(entry.file_nbytes for entry in entries) + directory.newer_bytes
                budget_bytes = held + min(shutil.disk_usage(root).free // 2, MOST_BYTES)
        except OSError as error:
            raise SettingError(
                f"The cache directory {root} cannot be used: {refusal(error)}"
            ) from error
        catalogue = Catalogue(
            budget_bytes,
            needs_checkpoints=store.needs_checkpoints,
            stride=store.stride,
        )
        thread = DiskThread(directory, _weakly(post))
        name = str(getattr(model, "model_type", ""))
        shapes = Shapes.of(layout, model)
        tier = cls(thread, catalogue, store, lent, layout, shapes, step, name)
        catalogue.on_unneeded(tier.delete)
        chains = Chains()
        difference = chains.change(entries)
        thread.watch(chains, tier.changed)
        tier._leave_room()
        for useless in [*catalogue.take(difference), *chains.orphans()]:
            tier.delete(useless)
        tier.publish(None)
        log.info(
            "%s holds %d checkpoints in %s (%s).",
            root,
            catalogue.checkpoints,
            format_bytes(catalogue.store.used_bytes()),
            "writing" if directory.is_writer else "another process writes; reading only",
        )
        return tier

    # Finding

    def find(self, namespace: Namespace, tokens: Tokens, beyond: int) -> Found | None:
        """Where files resume `tokens`, if that is worth reading them when memory reaches `beyond`."""
        found = self.catalogue.find(digest(namespace), tokens)
        return found if found.position >= beyond + WORTH else None

    # Writing

    def offer(self, namespace: Namespace, node: Node) -> None:
        """A checkpoint, or the rows of a model that needs none, is in memory; write it in time."""
        self._unwritten.add(node, namespace)
        self._write_behind()

    def owned(self) -> None:
        """Rows that lay in a running request's caches are the store's: what waited for them is due."""
        self._unwritten.update(self._borrowing.items())
        self._borrowing.clear()
        self._write_behind()

    def _write_behind(self) -> None:
        try:
            self.write()
        except Exception:  # what goes wrong here must not cost a reply
            log.exception("Writing to %s fails; it goes on without.", self.thread.directory.root)
            self._rest_until = math.inf

    def write(self) -> None:
        """Hand over what the queue has room for, the most useful first."""
        most = self.store.budget_bytes // QUEUE_SHARE
        looks = 0
        while self.may_write and (self._queued == 0 or self._queued < most):
            if self._current is None:
                if not self._unwritten:
                    return
                if looks == LOOKS:
                    self._look_later()
                    return
                looks += 1
                self._current = self._next()
            if self._current is not None:
                self._hand_over(self._current)

    def _look_later(self) -> None:
        """Much of what is due is there already: others have their turns before more is looked at."""

        def look() -> None:
            self._is_looking = False
            self._write_behind()

        if not self._is_looking:
            self._is_looking = True
            self.thread.later(look)

    @property
    def may_write(self) -> bool:
        """Whether this process writes, and the last write did not just fail."""
        return self.thread.directory.is_writer and time.monotonic() >= self._rest_until

    def is_writing(self) -> bool:
        """Whether something is being written, or will be without waiting for anything."""
        self.write()
        return bool(self._in_flight) or self._is_looking

    @property
    def is_written(self) -> bool:
        """Whether everything in memory is on disk too, as far as this process writes."""
        left = (
            self._in_flight or self._unwritten or self._borrowing or self._clearing or self._taken
        )
        return not left and self._current is None

    @property
    def _queued(self) -> int:
        return sum(segment.file_nbytes for segment, _ in self._in_flight.values())

    def _next(self) -> _Writing | None:
        """What the next checkpoint lacks; None if it lacks nothing, or must wait."""
        if (due := self._unwritten.pop()) is None:
            return None
        node, name = due
        path = node.path()
        if is_borrowing(path):
            self._borrowing[node] = name
            return None
        namespace, tokens = digest(name), np.concatenate([part.tokens for part in path])
        lacking = self.catalogue.lacking(
            namespace,
            tokens,
            state=self.store.needs_checkpoints,
            step=self.step,
            coming=[
                (segment, writing.tokens[: segment.end])
                for key, (segment, writing) in self._in_flight.items()
                if key not in self._cleared
            ],
        )
        names = {one.name for one in lacking}
        if names & self._taken:
            return None  # it could not be restored without what cannot be written
        if names & self._cleared:
            self._clearing[node] = name
            return None
        left = deque(one for one in lacking if one.name not in self._in_flight)
        return _Writing(node, name, namespace, tokens, left) if left else None

    def _is_there(self, node: Node) -> bool:
        has_state = node.checkpoint is not None or not self.store.needs_checkpoints
        return node.parent is not None and has_state

    def _hand_over(self, writing: _Writing) -> None:
        """One segment more."""
        if not writing.left or not self._is_there(writing.node):
            self._current = None
            return
        if is_borrowing(writing.node.path()):
            self._borrowing[writing.node], self._current = writing.name, None
            return
        lacking, node = writing.left.popleft(), writing.node
        payloads, freight = _freight_of(node, lacking)
        segment = Segment(
            kind=lacking.kind,
            namespace=writing.namespace,
            key=lacking.key,
            parent=lacking.parent,
            start=lacking.start,
            end=lacking.end,
            tokens=writing.tokens[lacking.start : lacking.end],
            tensors=freight.tensors,
            model=self.model,
        )
        try:
            claim = self.catalogue.claim(segment.file_nbytes, self._paths(writing))
        except BudgetError:
            self._current = None
            return
        for payload in payloads:
            self.lent.lend(payload)
        tokens, was_pinned = writing.tokens[: lacking.end], node.pinned
        self._in_flight[lacking.name] = segment, writing

        def done(transfer: Transfer) -> None:
            _give_back(transfer)
            given_back = sum(self.lent.give_back(payload) for payload in payloads)
            payloads.clear()
            self.store.settle(given_back)
            del self._in_flight[lacking.name]
            claim.release()
            if lacking.name in self._cleared:
                self._cleared.discard(lacking.name)  # the disk thread deletes it now
                self._unwritten.update(self._clearing.items())
                self._clearing.clear()
            elif transfer.error is None:
                stands = self._wrote(segment, writing, tokens)
                if stands and (node.pinned or was_pinned):  # it may have changed since
                    self.pin(writing.name, tokens, is_pinned=node.pinned)
            elif isinstance(transfer.error, NameTakenError):
                if not self._taken:  # of a newer version there may be thousands
                    log.warning("Passed over %s", transfer.error)
                self._taken.add(lacking.name)
                if self._current is not None:  # it may go on from there
                    self._unwritten.add(self._current.node, self._current.name)
                    self._current = None
            else:
                self._unwritten.add(node, writing.name)
                self._failed(transfer.error, is_told=transfer.is_told)
            self.write()
            self.publish(wall_clock())

        transfer = Transfer([(segment, freight.data)], done)
        self.thread.write(transfer, self.catalogue.store.clock, is_pinned=was_pinned)

    def _paths(self, writing: _Writing) -> Iterator[tuple[str, Tokens]]:
        """What leads to everything that is being written: its files must not go meanwhile."""
        under_way = [each for _, each in self._in_flight.values()]
        for each in dict.fromkeys([writing, *under_way]):
            yield each.namespace, each.tokens

    def _wrote(self, segment: Segment, writing: _Writing, tokens: Tokens) -> bool:
        """A file is there. False where the catalogue does not take it, so that it is deleted."""
        self._written_bytes += segment.file_nbytes
        try:
            is_parting = writing.node.returns > 0 and segment.end == writing.node.end
            if segment in self.catalogue or self.catalogue.add(
                segment, tokens, is_parting=is_parting
            ):
                return True
            # What leads to it went meanwhile and is written again, or all of it is there.
            self._unwritten.add(writing.node, writing.name)
        except BudgetError:  # nor is there room for it at once; not due until it is used again
            self._current = None if self._current is writing else self._current
        self.delete(segment)
        return False

    def _failed(self, error: Exception, *, is_told: bool) -> None:
        self._failures += 1
        # What builds on the file that failed will not be found: all of it is due again.
        for writing in [self._current, *(each for _, each in self._in_flight.values())]:
            if writing is not None:
                self._unwritten.add(writing.node, writing.name)
        self._current = None
        self._rest_until = time.monotonic() + REST_SECONDS
        store = self.catalogue.store
        used = store.used_bytes() - store.running_bytes  # without what is not there yet
        is_full = isinstance(error, OSError) and error.errno in FULL
        if is_full:
            store.budget_bytes = min(store.budget_bytes, used)
        then = (
            f"From now on it holds at most {format_bytes(used)}."
            if is_full
            else f"Trying again in {REST_SECONDS:.0f} s; replies are not affected."
        )
        if not is_told:
            self.thread.directory.complain("files", f"nothing can be written: {error}. {then}")

    def delete(self, segment: Segment) -> None:
        """Nothing needs this file any more; only the writer deletes it."""
        if self.thread.directory.is_writer:
            self.thread.change(lambda directory: directory.delete(segment))

    # Reading

    def promote(
        self, found: Found, deeper: Found, capacity: int, job: Job
    ) -> Generator[Pause, None, Landing | None]:
        """Buffers with the rows of `[0, deeper.position)`: from memory as far as `found` has them.

        None when a file was not what it should be: it is forgotten then, and another look is due.
        A request that is cancelled meanwhile leaves its buffers to the disk thread until it is done.
        """
        wanted = self._wanted(deeper, covered := min(found.match.matched, deeper.position))
        state = state_of(deeper)
        segments = [one for one, _, _ in wanted] + ([state] if state is not None else [])
        for segment in segments:
            if not self.shapes.suit(segment):
                self._reject(segment, "it was not written for this model")
                return None
        landing = Landing(self.layout, deeper.position, capacity)
        landing.copy(replace(found, position=covered).blocks(), covered)
        parts = [(one, list(landing.room_for_rows(one, a, b))) for one, a, b in wanted]
        if state is not None:
            parts.append((state, list(landing.room_for_state(state))))
        abandoned = 0

        def done(transfer: Transfer) -> None:
            _give_back(transfer)
            self.store.settle(abandoned)
            job.asleep = False

        transfer = Transfer(parts, done)
        job.asleep = True
        self.thread.read(transfer)
        try:
            yield PAUSE
        except BaseException:
            if job.asleep:  # the disk thread still writes into them
                # Rows that all came from memory nobody writes into, so nobody holds their buffers.
                abandoned = landing.state_nbytes + (landing.rows_nbytes if wanted else 0)
                self.store.linger(abandoned)
            raise
        if transfer.failed is not None:
            self._reject(transfer.failed, transfer.error, is_told=transfer.is_told)
            return None
        self._read_bytes += sum(segment.file_nbytes for segment in segments)
        names, clock = self.catalogue.use(deeper), self.catalogue.store.clock
        if self.thread.directory.is_writer:
            self.thread.change(lambda directory: directory.touch(names, clock))
        return landing

    def _wanted(self, deeper: Found, covered: int) -> list[tuple[Segment, int, int]]:
        """The segments to read for `[covered, deeper.position)`, each with the range that is needed."""
        wanted: dict[str, tuple[Segment, int, int]] = {}
        for part in parts_of(deeper):
            a, b = max(part.start, covered), min(part.end, deeper.position)
            if a < b:  # a run that was split lies in two parts of one file
                _, first, _ = wanted.get(part.segment.name, (part.segment, a, b))
                wanted[part.segment.name] = (part.segment, first, b)
        return list(wanted.values())

    def _reject(self, segment: Segment, why: object, *, is_told: bool = False) -> None:
        self._rejected += 1
        if not is_told:
            log.warning("Passed over %s: %s", segment.name, why)
        self.catalogue.forget(segment)
        if not self.thread.directory.is_writer:  # it may be whole the next time
            self.thread.change(Directory.look_at_all)

    # Keeping

    def tick(self) -> None:
        """One request has come."""
        self.catalogue.store.tick()

    def changed(self, change: Change) -> None:
        """Another process changed the directory, or left it to this one.

        What is to be done about it was put together by the disk thread, and is done a piece at a time.
        """
        difference = change.difference
        if change.names is not None:  # of all that is there, what is not known yet
            catalogue = self.catalogue
            gone = [one for one in catalogue.segments() if one.name not in change.names]
            come = [each for each in difference.come if catalogue.lacks(each)]
            difference = replace(difference, gone=tuple(gone), come=tuple(come))
        self._is_behind |= bool(difference.gone) or self.thread.directory.is_writer
        is_idle = not self._coming
        self._coming += difference.pieces(PIECE)
        if is_idle:
            self._take_some()

    def _take_some(self) -> None:
        """The next piece of what came and went; between two of them requests have their turns."""
        if self._coming:
            for useless in self.catalogue.take(self._coming.popleft()):
                self.delete(useless)
        if self._coming:
            self.thread.later(self._take_some)
            return
        if self.catalogue.is_behind:
            self.catalogue.is_behind = False
            self.thread.change(Directory.look_at_all)
        self._leave_room()
        if (self._is_behind and self.thread.directory.is_writer) or self._taken:
            # What memory has is due again, perhaps to a directory made anew.
            self._is_behind = False
            self._taken.clear()
            self._unwritten.update(self.store.restoring())
        self.write()
        self.publish(wall_clock())

    def _leave_room(self) -> None:
        """What a newer version has in the directory leaves less room."""
        store, newer = self.catalogue.store, self.thread.directory.newer_bytes
        if newer != self._newer_bytes:
            store.budget_bytes += self._newer_bytes
            self._newer_bytes = min(newer, store.budget_bytes)
            store.budget_bytes -= self._newer_bytes
            self.catalogue.keep_budget()

    def pin(self, namespace: Namespace, tokens: Tokens, *, is_pinned: bool) -> None:
        """Keep the files of a checkpoint that is pinned in memory, or no longer."""
        names = self.catalogue.pin(digest(namespace), tokens, is_pinned=is_pinned)
        if names and self.thread.directory.is_writer:
            self.thread.change(lambda directory: directory.pin(names, is_pinned=is_pinned))

    def shared(self, namespace: Namespace, tokens: Tokens) -> tuple[int, int]:
        """As `Store.shared`."""
        return self.catalogue.store.shared(Namespace(digest(namespace)), tokens)

    def pins(self, namespace: Namespace, tokens: Tokens, start: int) -> int:
        """As `Store.pins`."""
        return self.catalogue.store.pins(Namespace(digest(namespace)), tokens, start)

    def drop(self, namespace: Namespace, tokens: Tokens, start: int) -> None:
        """As `Store.drop`, if this process writes; what is being written goes once it is there."""
        if not self.thread.directory.is_writer:
            return
        name = digest(namespace)
        self.catalogue.store.drop(Namespace(name), tokens, start)
        for key, (segment, writing) in self._in_flight.items():
            common = common_length(writing.tokens, tokens)
            goes_with = common == min(len(writing.tokens), len(tokens))
            if segment.namespace == name and goes_with and segment.end > start:
                self._clear_in_flight(key, segment)

    def clear(self) -> None:
        """Delete every file of every model, if this process may.

        What is being written is deleted right behind its writing: nothing of this process need be
        left by then to ask for it.
        """
        while self._coming:  # it is there, so it is to be deleted too
            self._take_some()
        self._unwritten.clear()
        self._borrowing.clear()
        self._clearing.clear()
        self._taken.clear()
        self._current = None
        for key, (segment, _) in self._in_flight.items():
            self._clear_in_flight(key, segment)
        self.catalogue.store.clear()

    def _clear_in_flight(self, key: tuple[str, str], segment: Segment) -> None:
        if key not in self._cleared:
            self._cleared.add(key)
            self.delete(segment)

    def stats(self) -> DiskStats:
        """What is there and what was done."""
        return DiskStats(
            budget_bytes=self.catalogue.store.budget_bytes,
            held_bytes=self.catalogue.store.used_bytes(),
            checkpoints=self.catalogue.checkpoints,
            files=self.catalogue.files,
            is_writer=self.thread.directory.is_writer,
            queued_bytes=self._queued,
            unwritten=len(self._unwritten) + len(self._borrowing) + len(self._clearing),
            written_bytes=self._written_bytes,
            read_bytes=self._read_bytes,
            rejected=self._rejected,
            failures=self._failures,
        )


def _freight_of(node: Node, lacking: Lacking) -> tuple[list[Held], Freight]:
    """What of the store goes into a file on the way to `node`, and views of its bytes."""
    if lacking.kind == "state":
        assert node.checkpoint is not None
        return [node.checkpoint], state_freight(cast("Checkpoint", node.checkpoint))
    a, b = lacking.start, lacking.end
    every = [rows for part in node.path() for rows in part.rows]
    payloads = [rows for rows in every if rows.start < b and rows.end > a]
    return [*payloads], rows_freight(cast("list[RowBlock]", payloads), a, b)


def _give_back(transfer: Transfer) -> None:
    """Let go of the views, also of those that an error holds by the frames it passed through."""
    transfer.parts.clear()
    error: BaseException | None = transfer.error
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _weakly(post: Callable[[Callable[[], None]], None]) -> Callable[[Callable[[], None]], None]:
    """The same without keeping the worker alive, which ends when the cache it works for is dropped.

    The worker's thread holds what it was asked last, and by that this tier.
    """
    reference = weakref.WeakMethod(post)

    def posted(function: Callable[[], None]) -> None:
        if (alive := reference()) is not None:
            alive(function)

    return posted


def digest(namespace: Namespace) -> str:
    """The namespace as files name it: neither the model's settings nor the salt can be read from it."""
    text = "\0".join(namespace)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
