"""The disk tier beside the memory tier: which checkpoints go down, and how a prompt comes up again.

Used on the worker thread, which does no file operation: files are the disk thread's. `write_behind`
says what it is handed to write; what it reads goes straight into the buffers of the caches that are being restored.
"""

from __future__ import annotations

import logging
import shutil
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from ...caches.layout import Layout
from ...caches.memory import MemoryFound, MemoryNode, MemoryStore
from ...errors import BudgetError, SettingError, refusal
from ...sizes import format_bytes
from ...store.budget import Claim
from ...store.lazy_rows import rows_before
from ...store.outline import Outline, wall_clock
from ...store.references import CountedReferences
from ...tokens import Namespace, Tokens
from ...worker.turns import PAUSE, Job, Pause
from ..catalogue import Catalogue
from ..chains import Chains, TreeUpdate
from ..directory import Directory
from ..index import Entry
from ..parts import FileFound, parts_of, state_of
from ..segment import Segment, digest
from ..thread import Change, DiskThread, Transfer
from .arrays import RestoreBuffers, Shapes
from .write_behind import WriteBehind

log = logging.getLogger("mlx_hybridcache")

T = TypeVar("T")

WORTH = 64
"""Tokens that files must save beyond memory before they are read."""

MOST_BYTES = 100 * 10**9
"""The default disk budget is never more."""

PIECE = 32
"""Files or positions that are taken over in one go when another process changed the directory."""


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


@dataclass(frozen=True, slots=True)
class OpenDirectory:
    """A directory of which is known what it holds and may hold."""

    directory: Directory
    entries: list[Entry]
    budget_bytes: int

    @classmethod
    def at(cls, root: Path, budget_bytes: int | None) -> OpenDirectory:
        """The directory `root`, which is made if need be.

        Without `budget_bytes` half of what is free there, at most `MOST_BYTES`. Raises `SettingError`
        when the directory cannot be used.
        """
        directory = Directory(root)
        try:
            entries = directory.open()
            if budget_bytes is None:
                budget_bytes = _default_budget(directory, entries)
        except OSError as error:
            raise SettingError(
                f"The cache directory {root} cannot be used: {refusal(error)}"
            ) from error
        return cls(directory, entries, budget_bytes)


@dataclass(eq=False)
class DiskTier:
    """Writes behind and reads ahead for one engine."""

    thread: DiskThread
    catalogue: Catalogue
    store: MemoryStore
    write_behind: WriteBehind
    shapes: list[tuple[Layout, Shapes]] = field(default_factory=list)
    """What the files of each model hold, by its layout: the one that is served, and its draft models."""
    _coming: deque[TreeUpdate] = field(default_factory=deque, init=False)
    _is_behind: bool = field(default=False, init=False)
    _newer_bytes: int = field(default=0, init=False)
    _read_bytes: int = field(default=0, init=False)
    _rejected: int = field(default=0, init=False)
    _waiting: list[Job] = field(default_factory=list, init=False)
    summary: DiskStats = field(init=False)
    """What `stats` said last: any thread may read it."""
    outlines: Mapping[Namespace, Outline] = field(init=False)
    """The directory's trees, by what files call a namespace: any thread may look at them."""

    def __post_init__(self) -> None:
        self.write_behind.on_written = self._written
        self.publish(None)

    def _written(self) -> None:
        self.publish(wall_clock())
        self._settle(0)

    def publish(self, now: float | None) -> None:
        """Leave figures and outlines where any thread may read them. `now` is the wall clock."""
        self.summary = self.stats()
        self.outlines = self.catalogue.store.outlines(now)

    @classmethod
    def open(
        cls,
        opened: OpenDirectory,
        store: MemoryStore,
        references: CountedReferences,
        layout: Layout,
        model: Any,
        step: int,
        post: Callable[[Callable[[], None]], None],
        **more: Any,
    ) -> Self:
        """The tier in a directory. `post` runs things on the worker; `more` are fields of a class that derives from this."""
        catalogue = Catalogue(opened.budget_bytes, needs_checkpoints=store.needs_checkpoints)
        thread = DiskThread(opened.directory, _weakly(post))
        name = _name_of(model)
        write_behind = WriteBehind(
            thread, catalogue, store, references, step, name, layout.quantized_start
        )
        tier = cls(thread, catalogue, store, write_behind, **more)
        tier.learn(layout, model, ())
        tier._load(opened.entries)
        return tier

    def learn(self, layout: Layout, model: Any, settings: Iterable[str]) -> None:
        """From now on files of this model are read and written too, of namespaces with these settings."""
        for each in settings:
            self.write_behind.others[each] = _name_of(model), layout.quantized_start
        self.shapes.append((layout, Shapes.of(layout, model)))

    def _load(self, entries: Sequence[Entry]) -> None:
        """What is there already."""
        catalogue, thread = self.catalogue, self.thread
        catalogue.on_unneeded(thread.delete)
        chains = Chains()
        update = chains.change(entries)
        thread.watch(chains, self.changed)
        self._leave_room()
        for useless in [*catalogue.take(update), *chains.orphans()]:
            thread.delete(useless)
        self.publish(None)
        log.info(
            "%s holds %d checkpoints in %s (%s).",
            thread.directory.root,
            catalogue.checkpoints,
            format_bytes(catalogue.store.budget.used_bytes),
            "writing" if thread.directory.is_writer else "another process writes; reading only",
        )

    # Finding

    def find(self, namespace: Namespace, tokens: Tokens, beyond: int) -> FileFound | None:
        """Where files resume `tokens`, if that is worth reading them when memory reaches `beyond`."""
        if len(tokens) <= beyond + WORTH:  # one token is always read
            return None
        found = self._look(namespace, tokens)
        return found if found.position >= beyond + WORTH else None

    def _look(self, namespace: Namespace, tokens: Tokens) -> FileFound:
        return self.catalogue.find(digest(namespace), tokens, self.store.needs(namespace))

    # Writing

    def offer(self, namespace: Namespace, node: MemoryNode) -> None:
        """A checkpoint, or the rows of a model that needs none, is in memory; write it in time."""
        self.write_behind.offer(namespace, node)

    def materialized(self) -> None:
        """Rows that lay in a running request's caches are the store's: what waited for them is due."""
        self.write_behind.materialized()

    def is_writing(self) -> bool:
        """Whether something is being written, or will be without waiting for anything."""
        return self.write_behind.is_writing()

    def is_written(self) -> bool:
        """Whether everything in memory is on disk too, as far as this process writes."""
        return self.write_behind.is_written

    # The memory that the disk thread holds

    def with_room(
        self, tried: Callable[[], Generator[Pause, None, T]], job: Job
    ) -> Generator[Pause, None, T]:
        """What is tried, and again as long as it fits only once the disk thread lets go of something.

        Nothing more is written until then: it would be waited for too, file after file.
        """
        with ExitStack() as waits:
            while True:
                try:
                    return (yield from tried())
                except BudgetError as error:
                    if not error.fits_soon:
                        raise
                waits.enter_context(self.write_behind.rests())
                yield from self._settled(job)

    def _settled(self, job: Job) -> Generator[Pause, None, None]:
        """Until it lets go of something that counts, while others have their turns."""
        job.asleep = True
        self._waiting.append(job)
        try:
            yield PAUSE
        finally:
            if job in self._waiting:
                self._waiting.remove(job)

    def _settle(self, nbytes: int) -> None:
        """The disk thread is done with something, of which so many bytes counted: whoever waits looks again."""
        self.store.budget.settle(nbytes)
        for job in self._waiting:
            job.asleep = False
        self._waiting.clear()

    # Reading

    def promote(
        self,
        layout: Layout,
        found: MemoryFound,
        deeper: FileFound,
        capacity: int,
        claim: Claim,
        job: Job,
    ) -> Generator[Pause, None, RestoreBuffers | None]:
        """Buffers of the model of this layout with the rows of `[0, deeper.position)`: from memory as far as `found` has them.

        None when a file was not what it should be: it is forgotten then, and another look is due.
        A request that is cancelled meanwhile leaves its buffers to the disk thread until it is done.
        """
        covered, state = min(found.match.matched, deeper.position), state_of(deeper)
        wanted = self._wanted(deeper, covered)
        segments = [one for one, _, _ in wanted] + ([state] if state is not None else [])
        if not self._suit(layout, segments):
            return None
        buffers = RestoreBuffers(layout, deeper.position, capacity)
        buffers.copy(rows_before(found.nodes(), covered), covered)
        parts = [(one, list(buffers.room_for_rows(one, a, b))) for one, a, b in wanted]
        parts += [(state, list(buffers.room_for_state(state)))] if state is not None else []
        transfer = yield from self._read(parts, claim, job, buffers.room_nbytes)
        if transfer.failed is not None:
            self._reject(transfer.failed, transfer.error, is_told=transfer.is_told)
            return None
        self._read_bytes += sum(segment.file_nbytes for segment in segments)
        self._note_use(deeper)
        return buffers

    def _read(
        self, parts: list[tuple[Segment, list[memoryview]]], claim: Claim, job: Job, may_land: int
    ) -> Generator[Pause, None, Transfer]:
        """These files into that memory, of which a claim pays for the `may_land` bytes that are written to."""
        abandoned = 0

        def done(transfer: Transfer) -> None:
            transfer.let_go()
            self._settle(abandoned)
            self._wake(job)

        transfer = Transfer(parts, done)
        job.asleep = True
        self.thread.read(transfer)
        try:
            yield PAUSE
        except BaseException:
            transfer.is_wanted = False
            abandoned = self._left(transfer, job, claim, may_land)
            raise
        transfer.finished.wait()  # so it is, where requests sleep until then
        transfer.let_go()
        return transfer

    def _wake(self, job: Job) -> None:
        """What a request sleeps for is read."""
        job.asleep = False

    def _left(self, transfer: Transfer, job: Job, claim: Claim, may_land: int) -> int:
        """A request goes away; the bytes that count until the disk thread writes into its buffers no more.

        Into buffers whose rows all came from memory nobody writes, so nobody holds them.
        """
        return claim.abandon(may_land) if job.asleep else 0

    def _suit(self, layout: Layout, segments: Iterable[Segment]) -> bool:
        """Whether all of these are that model's; the first that is not is rejected."""
        shapes = next(shapes for known, shapes in self.shapes if known is layout)
        foreign = next((one for one in segments if not shapes.suit(one)), None)
        if foreign is not None:
            self._reject(foreign, "it was not written for this model")
        return foreign is None

    def _note_use(self, found: FileFound) -> None:
        names, clock = self.catalogue.use(found), self.catalogue.store.clock
        if self.thread.directory.is_writer:
            self.thread.change(lambda directory: directory.touch(names, clock))

    def _wanted(self, deeper: FileFound, covered: int) -> list[tuple[Segment, int, int]]:
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
        is_writer = self.thread.directory.is_writer
        if isinstance(why, FileNotFoundError) and not is_writer:
            log.info("%s is gone: the process that writes let go of it.", segment.name)
        elif not is_told:
            log.warning("Passed over %s: %s", segment.name, why)
        self.catalogue.forget(segment)
        if not is_writer:  # it may be whole the next time
            self.thread.change(Directory.look_at_all)

    # Keeping

    def tick(self) -> None:
        """One request has come."""
        self.catalogue.store.tick()

    def changed(self, change: Change) -> None:
        """Another process changed the directory, or left it to this one.

        What is to be done about it was put together by the disk thread, and is done a piece at a time.
        """
        update = change.update
        if change.names is not None:  # of all that is there, what is not known yet
            catalogue = self.catalogue
            gone = [one for one in catalogue.segments() if one.name not in change.names]
            come = [each for each in update.come if catalogue.lacks(each)]
            update = replace(update, gone=tuple(gone), come=tuple(come))
        self._is_behind |= bool(update.gone) or self.thread.directory.is_writer
        is_idle = not self._coming
        self._coming += update.pieces(PIECE)
        if is_idle:
            self._take_some()

    def _take_some(self) -> None:
        """The next piece of what came and went; between two of them requests have their turns."""
        if self._coming:
            for useless in self.catalogue.take(self._coming.popleft()):
                self.thread.delete(useless)
        if self._coming:
            self.thread.later(self._take_some)
            return
        if self.catalogue.is_behind:
            self.catalogue.is_behind = False
            self.thread.change(Directory.look_at_all)
        self._leave_room()
        if (self._is_behind and self.thread.directory.is_writer) or self.write_behind.is_barred:
            self._is_behind = False
            self.write_behind.all_due()
        self.write_behind.write()
        self.publish(wall_clock())

    def _leave_room(self) -> None:
        """What a newer version has in the directory leaves less room."""
        store, newer = self.catalogue.store, self.thread.directory.newer_bytes
        if newer != self._newer_bytes:
            limit = store.budget.limit_bytes + self._newer_bytes
            self._newer_bytes = min(newer, limit)
            store.budget.limit(limit - self._newer_bytes)
            self.catalogue.keep_budget()

    def pin(self, namespace: Namespace, tokens: Tokens, *, is_pinned: bool) -> None:
        """Keep the files of a checkpoint that is pinned in memory, or no longer."""
        self.write_behind.pin(namespace, tokens, is_pinned=is_pinned)

    def hold(self, namespace: Namespace, tokens: Tokens, lifetimes: Mapping[int, float]) -> None:
        """As `Store.hold`. What is not written yet is held once it is. No file says so: a restart forgets it."""
        self.catalogue.store.hold(Namespace(digest(namespace)), tokens, lifetimes)

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
        self.catalogue.store.drop(Namespace(digest(namespace)), tokens, start)
        self.write_behind.drop(namespace, tokens, start)

    def clear(self) -> None:
        """Delete every file of every model, if this process may."""
        while self._coming:  # it is there, so it is to be deleted too
            self._take_some()
        self.write_behind.clear()
        self.catalogue.store.clear()

    def stats(self) -> DiskStats:
        """What is there and what was done."""
        return DiskStats(
            budget_bytes=self.catalogue.store.budget.limit_bytes,
            held_bytes=self.catalogue.store.budget.used_bytes,
            checkpoints=self.catalogue.checkpoints,
            files=self.catalogue.files,
            is_writer=self.thread.directory.is_writer,
            queued_bytes=self.write_behind.in_flight_bytes,
            unwritten=self.write_behind.unwritten,
            written_bytes=self.write_behind.written_bytes,
            read_bytes=self._read_bytes,
            rejected=self._rejected,
            failures=self.write_behind.failures,
        )


def _name_of(model: Any) -> str:
    return str(getattr(model, "model_type", ""))


def _default_budget(directory: Directory, entries: Iterable[Entry]) -> int:
    held = sum(entry.file_nbytes for entry in entries) + directory.newer_bytes
    return held + min(shutil.disk_usage(directory.root).free // 2, MOST_BYTES)


def _weakly(post: Callable[[Callable[[], None]], None]) -> Callable[[Callable[[], None]], None]:
    """The same without keeping the worker alive, which ends when the cache it works for is dropped.

    The worker's thread holds what it was asked last, and by that this tier.
    """
    reference = weakref.WeakMethod(post)

    def posted(function: Callable[[], None]) -> None:
        if (alive := reference()) is not None:
            alive(function)

    return posted
