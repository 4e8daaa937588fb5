"""Writing behind: which checkpoints wait to be written, and what of them is on its way to the disk.

Used on the worker thread, which does no file operation: the disk thread is handed views of the store's own arrays.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ...caches.kinds.rows import RowBlock
from ...caches.memory import MemoryNode, MemoryStore
from ...errors import FULL, BudgetError
from ...sizes import format_bytes
from ...store.budget import Claim
from ...store.lazy_rows import has_lazy_rows
from ...store.references import CountedReferences
from ...store.tree import Held, common_length
from ...tokens import Namespace, Tokens
from ..catalogue import Catalogue, Lacking
from ..segment import NameTakenError, Segment, Tensor, digest
from ..thread import DiskThread, Transfer
from .arrays import ByteViews, rows_views, state_views

log = logging.getLogger("mlx_hybridcache")

QUEUE_SHARE = 16
"""What waits to be written is at most this part of the memory budget, or one segment."""

MOST_UNWRITTEN = 4096
"""Checkpoints on a waiting list that is then rid of those that memory has let go of."""

LOOKS = 16
"""Checkpoints that are looked at in one go to find what they lack."""

REST_SECONDS = 30.0
"""How long nothing is written after a write that failed."""


class Waiting:
    """Nodes of the memory tier with their namespaces. `is_there` says whether one is still of use.

    A node's place is found when it is added; one that was used meanwhile is added again by its request.
    """

    def __init__(self, is_there: Callable[[MemoryNode], bool], most: int):
        self._is_there = is_there
        self._most = self._limit = most
        self._names: dict[MemoryNode, Namespace] = {}
        self._heap: list[tuple[tuple[bool, int, int], int, MemoryNode]] = []
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._names)

    def add(self, node: MemoryNode, name: Namespace) -> None:
        """This one is due. Beyond the limit those go that memory has let go of."""
        self._names[node] = name
        usefulness = not node.is_end, -node.last_used, -node.end
        heapq.heappush(self._heap, (usefulness, next(self._order), node))
        if len(self._heap) > self._limit:
            self._names = {n: name for n, name in self._names.items() if self._is_there(n)}
            latest = {each[2]: each for each in self._heap if each[2] in self._names}
            self._heap = list(latest.values())
            heapq.heapify(self._heap)
            self._limit = max(self._most, 2 * len(self._heap))  # so that it is seldom

    def update(self, nodes: Iterable[tuple[MemoryNode, Namespace]]) -> None:
        """All of these are due."""
        for node, name in nodes:
            self.add(node, name)

    def pop(self) -> tuple[MemoryNode, Namespace] | None:
        """The most useful one, if memory still has it; None where it has not, or none is due."""
        while self._heap:
            _, _, node = heapq.heappop(self._heap)
            if (name := self._names.pop(node, None)) is not None:
                return (node, name) if self._is_there(node) else None
        return None

    def clear(self) -> None:
        """None is due."""
        self._names.clear()
        self._heap.clear()


@dataclass(eq=False)
class _Writing:
    """One checkpoint on its way down: `tokens` lead to it, `left` is what its files still lack."""

    node: MemoryNode
    name: Namespace
    tokens: Tokens
    left: deque[Lacking]

    def segment(self, lacking: Lacking, tensors: tuple[Tensor, ...], model: str) -> Segment:
        """One of its files."""
        return Segment(
            kind=lacking.kind,
            namespace=digest(self.name),
            key=lacking.key,
            parent=lacking.parent,
            start=lacking.start,
            end=lacking.end,
            tokens=self.tokens[lacking.start : lacking.end],
            tensors=tensors,
            model=model,
        )


@dataclass(eq=False)
class _Flight:
    """One file that the disk thread writes, with what of the store goes into it."""

    segment: Segment
    writing: _Writing
    payloads: list[Held]
    claim: Claim
    was_pinned: bool

    @property
    def tokens(self) -> Tokens:
        """All that lead to its end."""
        return self.writing.tokens[: self.segment.end]


FileName = tuple[str, str]
"""A segment's key and kind."""


@dataclass(eq=False)
class WriteBehind:
    """What waits, the most useful first, and what is in flight. `step` bounds a file of rows, in tokens;
    none reaches across `cut`. `others` are draft models' names and cuts, by the settings of their namespaces.

    `on_written` hears whenever a file was written, or failed to be.
    """

    thread: DiskThread
    catalogue: Catalogue
    store: MemoryStore
    references: CountedReferences
    step: int
    model: str = ""
    cut: int = 0
    others: dict[str, tuple[str, int]] = field(default_factory=dict)
    on_written: Callable[[], None] = field(default=lambda: None, init=False)
    written_bytes: int = field(default=0, init=False)
    failures: int = field(default=0, init=False)
    _unwritten: Waiting = field(init=False)
    _lazy: dict[MemoryNode, Namespace] = field(default_factory=dict, init=False)
    """Checkpoints whose rows lie in a running request's caches."""
    _clearing: dict[MemoryNode, Namespace] = field(default_factory=dict, init=False)
    """Those that wait until files of their names are deleted."""
    _is_looking: bool = field(default=False, init=False)
    _current: _Writing | None = field(default=None, init=False)
    _in_flight: dict[FileName, _Flight] = field(default_factory=dict, init=False)
    _cleared: set[FileName] = field(default_factory=set, init=False)
    _taken: set[FileName] = field(default_factory=set, init=False)
    _rest_until: float = field(default=0.0, init=False)
    _rests: int = field(default=0, init=False)
    """Requests that wait for what it holds."""

    def __post_init__(self) -> None:
        self._unwritten = Waiting(self._is_there, MOST_UNWRITTEN)

    @property
    def unwritten(self) -> int:
        """How many checkpoints wait."""
        return len(self._unwritten) + len(self._lazy) + len(self._clearing)

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of the files that are being written."""
        return sum(flight.segment.file_nbytes for flight in self._in_flight.values())

    @property
    def may_write(self) -> bool:
        """Whether this process writes, the last write did not just fail, and nobody waits for what it holds."""
        is_able = self.thread.directory.is_writer and time.monotonic() >= self._rest_until
        return is_able and not self._rests

    def is_writing(self) -> bool:
        """Whether something is being written, or will be without waiting for anything."""
        self.try_to_write()
        return bool(self._in_flight) or self._is_looking or self._rests > 0

    @property
    def is_written(self) -> bool:
        """Whether everything in memory is on disk too, as far as this process writes."""
        left = self._in_flight or self.unwritten or self._taken
        return not left and self._current is None

    @property
    def is_barred(self) -> bool:
        """Whether something could not be written because its name was taken."""
        return bool(self._taken)

    # What is due

    def offer(self, namespace: Namespace, node: MemoryNode) -> None:
        """A checkpoint, or the rows of a model that needs none, is in memory; write it in time."""
        self._unwritten.add(node, namespace)
        self.try_to_write()

    def materialized(self) -> None:
        """Rows that lay in a running request's caches are the store's: what waited for them is due."""
        self._unwritten.update(self._lazy.items())
        self._lazy.clear()
        self.try_to_write()

    def all_due(self) -> None:
        """Whatever memory has is due again, perhaps to a directory made anew."""
        self._taken.clear()
        self._unwritten.update(self.store.restoring())

    def drop(self, namespace: Namespace, tokens: Tokens, start: int) -> None:
        """What is being written behind `start` on the way to `tokens` is deleted once it is there."""
        name = digest(namespace)
        for key, flight in self._in_flight.items():
            segment, written = flight.segment, flight.writing.tokens
            goes_with = common_length(written, tokens) == min(len(written), len(tokens))
            if segment.namespace == name and goes_with and segment.end > start:
                self._clear(key, segment)

    def clear(self) -> None:
        """None is due, and what is being written is deleted right behind its writing.

        Nothing of this process need be left by then to ask for it.
        """
        self._unwritten.clear()
        self._lazy.clear()
        self._clearing.clear()
        self._taken.clear()
        self._current = None
        for key, flight in self._in_flight.items():
            self._clear(key, flight.segment)

    def _clear(self, key: FileName, segment: Segment) -> None:
        if key not in self._cleared:
            self._cleared.add(key)
            self.thread.delete(segment)

    def pin(self, namespace: Namespace, tokens: Tokens, *, is_pinned: bool) -> None:
        """Keep the files of a checkpoint that is pinned in memory, or no longer."""
        names = self.catalogue.pin(digest(namespace), tokens, is_pinned=is_pinned)
        if names and self.thread.directory.is_writer:
            self.thread.change(lambda directory: directory.pin(names, is_pinned=is_pinned))

    # Handing over

    @contextmanager
    def rests(self) -> Iterator[None]:
        """Nothing more is handed over inside."""
        self._rests += 1
        try:
            yield
        finally:
            self._rests -= 1
            self.try_to_write()

    def try_to_write(self) -> None:
        """`write`, whose errors must not cost a reply."""
        try:
            self.write()
        except Exception:
            log.exception("Writing to %s fails; it goes on without.", self.thread.directory.root)
            self._rest_until = math.inf

    def write(self) -> None:
        """Hand over what the queue has room for, the most useful first."""
        most = self.store.budget.limit_bytes // QUEUE_SHARE
        looks = 0
        while self.may_write and (not self._in_flight or self.in_flight_bytes < most):
            if self._current is None:
                if not self._unwritten:
                    return
                if looks == LOOKS:
                    self._look_later()
                    return
                looks += 1
                self._current = self.next_due()
            if self._current is not None:
                self.hand_over(self._current)

    def _look_later(self) -> None:
        """Much of what is due is there already: others have their turns before more is looked at."""

        def look() -> None:
            self._is_looking = False
            self.try_to_write()

        if not self._is_looking:
            self._is_looking = True
            self.thread.later(look)

    def next_due(self) -> _Writing | None:
        """What the next checkpoint lacks; None if it lacks nothing, or must wait."""
        if (due := self._unwritten.pop()) is None:
            return None
        node, name = due
        path = node.path()
        if has_lazy_rows(path):
            self._lazy[node] = name
            return None
        tokens = np.concatenate([part.tokens for part in path])
        lacking = self.catalogue.lacking(
            digest(name),
            tokens,
            state=self.store.needs(name),
            step=self.step,
            cut=self._model_of(name)[1],
            coming=[
                (flight.segment, flight.tokens)
                for key, flight in self._in_flight.items()
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
        return _Writing(node, name, tokens, left) if left else None

    def _model_of(self, name: Namespace) -> tuple[str, int]:
        return self.others.get(name.settings, (self.model, self.cut))

    def _is_there(self, node: MemoryNode) -> bool:
        has_state = node.checkpoint is not None or not node.needs_checkpoint
        return node.parent is not None and has_state

    def hand_over(self, writing: _Writing) -> None:
        """One segment more."""
        if not writing.left or not self._is_there(writing.node):
            self._current = None
            return
        if has_lazy_rows(writing.node.path()):
            self._lazy[writing.node], self._current = writing.name, None
            return
        lacking, node = writing.left.popleft(), writing.node
        payloads, views = _views_of(node, lacking)
        segment = writing.segment(lacking, views.tensors, self._model_of(writing.name)[0])
        try:
            claim = self.catalogue.claim(segment.file_nbytes, self._paths(writing))
        except BudgetError:
            self._current = None
            return
        for payload in payloads:
            self.references.hold(payload)
        flight = _Flight(segment, writing, payloads, claim, node.pinned)
        self._in_flight[lacking.name] = flight
        transfer = Transfer([(segment, views.data)], partial(self._done, lacking.name, flight))
        clock = self.catalogue.store.clock
        self.thread.write(transfer, clock, is_pinned=flight.was_pinned)

    def _paths(self, writing: _Writing) -> Iterator[tuple[str, Tokens]]:
        """What leads to everything that is being written: its files must not go meanwhile."""
        under_way = [flight.writing for flight in self._in_flight.values()]
        for each in dict.fromkeys([writing, *under_way]):
            yield digest(each.name), each.tokens

    # What came of it

    def _done(self, key: FileName, flight: _Flight, transfer: Transfer) -> None:
        """The disk thread has written a file, or failed to."""
        transfer.let_go()
        released = sum(self.references.release(payload) for payload in flight.payloads)
        flight.payloads.clear()
        self.store.budget.settle(released)
        del self._in_flight[key]
        flight.claim.release()
        if key in self._cleared:
            self._cleared.discard(key)  # the disk thread deletes it now
            self._unwritten.update(self._clearing.items())
            self._clearing.clear()
        elif transfer.error is None:
            node, name = flight.writing.node, flight.writing.name
            if self._wrote(flight):
                self._keep(flight, node, name)
        elif isinstance(transfer.error, NameTakenError):
            self._met_another(key, transfer.error)
        else:
            self._unwritten.add(flight.writing.node, flight.writing.name)
            self._failed(transfer.error, is_told=transfer.is_told)
        self.try_to_write()
        self.on_written()

    def _keep(self, flight: _Flight, node: MemoryNode, name: Namespace) -> None:
        """A file is kept like what it was written of, which may have changed meanwhile."""
        if node.pinned or flight.was_pinned:
            self.pin(name, flight.tokens, is_pinned=node.pinned)
        if node.soft_pin is not None and flight.segment.end == node.end:
            lifetimes = {node.end: node.soft_pin.seconds}
            self.catalogue.store.hold(Namespace(digest(name)), flight.tokens, lifetimes)

    def _wrote(self, flight: _Flight) -> bool:
        """A file is there. False where the catalogue does not take it, so that it is deleted."""
        segment, writing = flight.segment, flight.writing
        self.written_bytes += segment.file_nbytes
        try:
            is_branch_point = writing.node.returns > 0 and segment.end == writing.node.end
            restores = not self.store.needs(writing.name)
            if segment in self.catalogue or self.catalogue.add(
                segment, flight.tokens, restores=restores, is_branch_point=is_branch_point
            ):
                return True
            # What leads to it went meanwhile and is written again, or all of it is there.
            self._unwritten.add(writing.node, writing.name)
        except BudgetError:  # nor is there room for it at once; not due until it is used again
            self._current = None if self._current is writing else self._current
        self.thread.delete(segment)
        return False

    def _met_another(self, key: FileName, error: NameTakenError) -> None:
        """What is not ours has the name of a file."""
        if not self._taken:  # of a newer version there may be thousands
            log.warning("Passed over %s", error)
        self._taken.add(key)
        if self._current is not None:  # it may go on from there
            self._unwritten.add(self._current.node, self._current.name)
            self._current = None

    def _failed(self, error: Exception, *, is_told: bool) -> None:
        self.failures += 1
        # What builds on the file that failed will not be found: all of it is due again.
        for writing in [self._current, *(each.writing for each in self._in_flight.values())]:
            if writing is not None:
                self._unwritten.add(writing.node, writing.name)
        self._current = None
        self._rest_until = time.monotonic() + REST_SECONDS
        budget = self.catalogue.store.budget
        used = budget.used_bytes - budget.running_bytes  # without what is not there yet
        is_full = isinstance(error, OSError) and error.errno in FULL
        if is_full:
            budget.limit(min(budget.limit_bytes, used))
        then = (
            f"From now on it holds at most {format_bytes(used)}."
            if is_full
            else f"Trying again in {REST_SECONDS:.0f} s; replies are not affected."
        )
        if not is_told:
            self.thread.directory.complain("files", f"nothing can be written: {error}. {then}")


def _views_of(node: MemoryNode, lacking: Lacking) -> tuple[list[Held], ByteViews]:
    """What of the store goes into a file on the way to `node`, and views of its bytes."""
    if lacking.kind == "state":
        assert node.checkpoint is not None
        return [node.checkpoint], state_views(node.checkpoint)
    a, b = lacking.start, lacking.end
    every = [rows for part in node.path() for rows in part.rows]
    payloads = [rows for rows in every if rows.start < b and rows.end > a]
    blocks = [rows for rows in payloads if isinstance(rows, RowBlock)]
    assert len(blocks) == len(payloads), "lazy rows are not the store's to write"
    return [*payloads], rows_views(blocks, a, b)
