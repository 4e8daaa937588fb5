"""What the directory holds, as trees: what a prompt finds there, what a checkpoint still lacks, what goes.

The trees, their policy and their accounting are the memory tier's own (`Store`); here rows and
checkpoints are parts of files. Splitting a run costs nothing, and a file goes when nothing needs any
part of it. Used on the worker thread only, and touches no file itself.
"""

from __future__ import annotations

import bisect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal, cast

import numpy as np

from ..budget import Claim, Holders
from ..errors import BudgetError
from ..found import Found
from ..store import Store
from ..tokens import Namespace, Tokens, as_tokens
from ..tree import Held, Node, common_length
from .index import Entry
from .segment import Segment, prefix_keys


@dataclass(frozen=True, slots=True)
class FileRows:
    """The rows of `[start, end)`, which lie in a segment."""

    segment: Segment
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """The part's share of the file. Shares add up to the file, however it is split."""
        return self._up_to(self.end) - self._up_to(self.start)

    def _up_to(self, position: int) -> int:
        segment = self.segment
        length = segment.end - segment.start
        return segment.file_nbytes * (position - segment.start) // length

    def split(self, position: int) -> tuple[FileRows, FileRows]:
        """Two parts of the same file."""
        return replace(self, end=position), replace(self, start=position)


@dataclass(frozen=True, slots=True)
class FileState:
    """A checkpoint, which is a segment of its own."""

    segment: Segment

    @property
    def nbytes(self) -> int:
        return self.segment.file_nbytes


@dataclass(frozen=True, slots=True)
class FileEnd:
    """Where rows of a model without states end: they restore by themselves."""

    segment: Segment

    nbytes: ClassVar[int] = 0


@dataclass(frozen=True, slots=True)
class Lacking:
    """A segment that is not there yet: rows of `[start, end)`, or the state at `end`."""

    kind: Literal["rows", "state"]
    start: int
    end: int
    key: str
    parent: str

    @property
    def name(self) -> tuple[str, str]:
        return self.key, self.kind


class _Files(Holders):
    """Which files the trees still need, in bytes of each that they use."""

    def __init__(self) -> None:
        self.delete: Callable[[Segment], None] = lambda segment: None
        self.used: dict[str, int] = {}
        self.segments: dict[str, Segment] = {}
        self.states = 0

    def add(self, segment: Segment, nbytes: int) -> int:
        """So many bytes more of a file are needed; by how much what lingers changes."""
        if segment.name in self.used:
            self.used[segment.name] += nbytes
            return -nbytes
        self.used[segment.name] = nbytes
        self.segments[segment.name] = segment
        self.states += segment.kind == "state"
        return segment.file_nbytes - nbytes

    def split_nbytes(self, rows: Held) -> int:
        return 0  # a file is shared out, not copied

    def dropped(self, payload: Held) -> int:
        if isinstance(payload, FileEnd):
            return 0
        part = cast("FileRows | FileState", payload)
        name = part.segment.name
        self.used[name] -= part.nbytes
        if self.used[name] > 0:
            return part.nbytes
        del self.used[name], self.segments[name]
        self.states -= part.segment.kind == "state"
        self.delete(part.segment)
        return part.nbytes - part.segment.file_nbytes


class Catalogue:
    """The segments of one directory, inside `budget_bytes`.

    `on_unneeded` names who deletes what nothing needs any more. `needs_checkpoints` and `stride` are
    those of the model that looks things up; the files of others weigh and go by the same policy.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        needs_checkpoints: bool,
        stride: int = 1,
    ):
        self._files = _Files()
        self._needs_checkpoints = needs_checkpoints
        self._stride = stride
        self.store = Store(budget_bytes, needs_checkpoints=True, holders=self._files)

    def on_unneeded(self, delete: Callable[[Segment], None]) -> None:
        """Tell `delete` of each file that nothing needs any more."""
        self._files.delete = delete

    # Reading

    def __contains__(self, segment: Segment) -> bool:
        return segment.name in self._files.used

    def find(self, namespace: str, tokens: Tokens) -> Found:
        """Where `tokens` can be resumed from files, at most one short of their end."""
        found = self.store.find(Namespace(namespace), tokens)
        reach = min(found.match.matched, len(tokens) - 1)
        if self._needs_checkpoints:
            # Not the end of rows of which no state was written, or is left.
            stands = (
                node
                for node in reversed(found.match.path)
                if isinstance(node.checkpoint, FileState) and node.end <= reach
            )
            node = next(stands, None)
            return replace(found, position=node.end if node else 0, node=node)
        return replace(found, position=reach - reach % self._stride, node=None)

    def lacking(
        self,
        namespace: str,
        tokens: Tokens,
        *,
        state: bool,
        step: int,
        coming: Sequence[tuple[Segment, Tokens]] = (),
    ) -> list[Lacking]:
        """What must be written so that `tokens` can be restored at their end, in order.

        Rows end at multiples of `step`, so that a file is never large. With `state`, the checkpoint
        at the end too. `coming` is being written already, in this order, each with all tokens that
        lead to it.
        """
        found = self.find(namespace, tokens)
        start, end = _reach(found.match.matched, namespace, tokens, coming), len(tokens)
        ends = [*range(start - start % step + step, end, step), end] if start < end else []
        keys = prefix_keys(namespace, tokens, [start, *ends])
        for each, key in zip(ends, keys[1:], strict=True):
            if self._take_back(key, tokens[:each]):
                return self.lacking(namespace, tokens, state=state, step=step, coming=coming)
        bounds = list(zip([start, *ends], keys, strict=True))
        rows = [
            Lacking("rows", a, b, key, parent if a else "")
            for (a, parent), (b, key) in pairwise(bounds)
        ]
        if not state or _has_state(found, end):
            return rows
        return [*rows, Lacking("state", end, end, keys[-1], keys[-1])]

    def _take_back(self, key: str, tokens: Tokens) -> bool:
        """Need all of a file again of which only the beginning was needed any more.

        What would be written in its place has its name.
        """
        segment = self._files.segments.get(f"{key[:2]}/{key}.rows.safetensors")
        try:
            return segment is not None and self.add(segment, tokens)
        except BudgetError:
            return False

    @property
    def files(self) -> int:
        """How many files are needed."""
        return len(self._files.used)

    @property
    def checkpoints(self) -> int:
        """How many of them are checkpoints."""
        return self._files.states

    def segments(self) -> list[Segment]:
        """Every segment that is needed."""
        return list(self._files.segments.values())

    # Changing

    def load(self, entries: Sequence[Entry]) -> list[Segment]:
        """Take over what the directory holds; returns what nothing leads to.

        A key covers all tokens before it, so a file is believed only behind those that hold them.
        What is over the budget goes, least useful first.
        """
        chains = _Chains([entry.segment for entry in entries])
        with_states = {e.segment.namespace for e in entries if e.segment.kind == "state"}
        budget, self.store.budget_bytes = self.store.budget_bytes, sys.maxsize
        in_order = sorted(
            entries,
            key=lambda entry: (
                entry.segment.kind == "state",
                entry.used if entry.segment.kind == "state" else entry.segment.start,
            ),
        )
        orphans: list[Segment] = []
        for entry in in_order:
            tokens = chains.tokens(entry.segment)
            restores = entry.segment.namespace not in with_states
            if tokens is None or not (
                entry.segment in self or self.add(entry.segment, tokens, restores=restores)
            ):
                orphans.append(entry.segment)
            else:
                self._remember(entry, tokens)
        self.store.budget_bytes = budget
        self._keep_budget()
        return orphans

    def _keep_budget(self) -> None:
        """Let go what is over the budget; pins too where they alone are, the oldest first."""
        pinned = sorted(
            (node for node in self.store.nodes() if node.pinned),
            key=lambda node: node.last_used,
            reverse=True,
        )
        while True:
            try:
                return self.make_room(0)
            except BudgetError:
                if not pinned:
                    raise
                unpinned = pinned.pop()
                unpinned.pinned = False
                unpinned.touch()

    def _remember(self, entry: Entry, tokens: Tokens) -> None:
        """Its recency and its pin, from the index."""
        node = self._node(entry.segment.namespace, tokens)
        if node is not None and node.checkpoint is not None:
            node.last_used = entry.used
            node.pinned = entry.pinned
            node.touch()
        self.store.clock = max(self.store.clock, entry.used)

    def add(
        self,
        segment: Segment,
        tokens: Tokens,
        *,
        restores: bool | None = None,
        is_parting: bool = False,
    ) -> bool:
        """A segment is in the directory: `tokens` are all that lead to its end.

        `restores` says that rows do so by themselves, as with the model that looks things up if it is
        not given; `is_parting` that prompts have parted ways here, as they have where the tree branches.
        False where what it holds is there already, or the rows before it are not. Raises
        `BudgetError` where there is no room for it.
        """
        segment = self._files.segments.get(segment.name, segment)
        namespace = Namespace(segment.namespace)
        found = self.store.find(namespace, tokens)
        is_read = found.match.matched == len(tokens)
        if segment.kind == "rows" and (is_read or found.match.matched < segment.start):
            return False
        if segment.kind == "state" and (not is_read or _has_state(found, len(tokens))):
            return False
        if segment not in self:
            self.make_room(segment.file_nbytes, found.match.nodes())

        def rows_of(start: int) -> FileRows:
            rows = FileRows(segment, start, segment.end)
            self.store.linger(self._files.add(segment, rows.nbytes))
            return rows

        stands: FileState | FileEnd | None = None
        if segment.kind == "state":
            stands = FileState(segment)
            if (node := self._node(segment.namespace, tokens)) is not None:
                node.checkpoint = None  # a `FileEnd`: this model has states after all
                node.touch()
                is_parting = is_parting or len(node.children or ()) > 1
        elif not self._needs_checkpoints if restores is None else restores:
            stands = FileEnd(segment)
        if not self.store.save(
            namespace,
            tokens,
            rows_of,
            stands,  # type: ignore[arg-type]  # the tree knows checkpoints by their weight only
            row_bytes=0,  # of a file all bytes count, whatever part is needed: there is room for them
            is_end=stands is not None,
            is_parting=is_parting,
        ):
            raise BudgetError(f"{segment.name} does not fit the disk budget beside what is kept.")
        if segment.kind == "state":
            self._files.add(segment, segment.file_nbytes)
        return True

    def make_room(self, nbytes: int, keep: Iterable[Node] = ()) -> None:
        """Let the least useful go until `nbytes` more fit. Raises `BudgetError` when they do not."""
        self.store.make_room(nbytes, keep)

    def claim(self, nbytes: int, paths: Iterable[tuple[str, Tokens]]) -> Claim:
        """Room for `nbytes` that are about to be written; what leads to `paths` stays.

        Raises `BudgetError` when there is none.
        """
        keep = [
            node
            for namespace, tokens in paths
            for node in self.store.find(Namespace(namespace), tokens).nodes()
        ]
        self.make_room(nbytes, keep)
        return self.store.claim(nbytes)

    def use(self, found: Found) -> list[str]:
        """Refresh what was restored; returns the files whose recency that is."""
        self.store.use(found)
        used = [found.node] if found.node is not None else found.match.path[-1:]
        return [payload.segment.name for payload in _payloads(used)]

    def forget(self, segment: Segment) -> None:
        """A file is damaged or gone: it goes, and what cannot be restored without it."""
        for tree_node in list(self.store.nodes()):
            if any(payload.segment.name == segment.name for payload in _payloads([tree_node])):
                self.store.forget(tree_node, rows=segment.kind == "rows")

    def pin(self, namespace: str, tokens: Tokens, *, is_pinned: bool) -> list[str]:
        """Keep what restores `tokens` at their end whatever comes, or no longer; returns its files."""
        node = self._node(namespace, tokens)
        if node is None or node.checkpoint is None:
            return []
        node.pinned = is_pinned
        node.touch()
        return [payload.segment.name for payload in _payloads([node])]

    def _node(self, namespace: str, tokens: Tokens) -> Node | None:
        path = self.store.find(Namespace(namespace), tokens).match.path
        return path[-1] if path and path[-1].end == len(tokens) else None


def parts_of(found: Found) -> Iterator[FileRows]:
    """The rows that a restore from files needs, in order."""
    for node in found.nodes():
        for rows in node.rows:
            if rows.start < found.position:
                yield cast("FileRows", rows)


def state_of(found: Found) -> Segment | None:
    """The checkpoint that a restore from files needs; None for models of rows alone."""
    stands = found.node.checkpoint if found.node is not None else None
    return stands.segment if isinstance(stands, FileState) else None


def _reach(
    matched: int, namespace: str, tokens: Tokens, coming: Iterable[tuple[Segment, Tokens]]
) -> int:
    """How far rows will lead along `tokens`, of which `matched` are there, once all that comes is there.

    Rows whose own beginning is not will not be taken, so nothing can be built on them.
    """
    for segment, leading in coming:
        is_led = segment.namespace == namespace and segment.start <= matched
        if segment.kind == "rows" and is_led:
            matched = max(matched, min(common_length(tokens, leading), segment.end))
    return matched


def _has_state(found: Found, end: int) -> bool:
    path = found.match.path
    return bool(path) and path[-1].end == end and isinstance(path[-1].checkpoint, FileState)


def _payloads(nodes: Iterable[Node]) -> Iterator[FileRows | FileState]:
    for node in nodes:
        yield from cast("tuple[FileRows, ...]", node.rows)
        if isinstance(node.checkpoint, FileState):
            yield node.checkpoint


class _Chains:
    """All tokens that lead to each segment, from the runs that the segments before it hold."""

    def __init__(self, segments: Sequence[Segment]):
        self._starts: dict[str, list[int]] = defaultdict(list)
        for segment in segments:
            self._starts[segment.namespace].append(segment.start)
        for starts in self._starts.values():
            starts.sort()
        self._known: dict[tuple[str, str], tuple[Segment, int]] = {}
        rows = [segment for segment in segments if segment.kind == "rows"]
        for segment in sorted(rows, key=lambda segment: segment.start):
            self._link(segment)

    def tokens(self, segment: Segment) -> Tokens | None:
        """Those of `[0, segment.end)`; None where some are missing or are not what they were."""
        return self._before(segment.namespace, segment.key)

    def _link(self, segment: Segment) -> None:
        """Know the keys of every position in this run at which another segment begins."""
        before = self._before(segment.namespace, segment.parent)
        if before is None or len(before) != segment.start:
            return
        tokens = as_tokens(np.concatenate([before, segment.tokens]))
        starts = self._starts[segment.namespace]
        first, last = (bisect.bisect_right(starts, x) for x in (segment.start, segment.end))
        ends = sorted({*starts[first:last], segment.end})
        keys = prefix_keys(segment.namespace, tokens, ends)
        if keys[-1] == segment.key:
            for end, key in zip(ends, keys, strict=True):
                self._known.setdefault((segment.namespace, key), (segment, end))

    def _before(self, namespace: str, key: str) -> Tokens | None:
        runs: list[Tokens] = []
        while key:
            if (namespace, key) not in self._known:
                return None
            segment, end = self._known[(namespace, key)]
            runs.append(segment.tokens[: end - segment.start])
            key = segment.parent
        return as_tokens(np.concatenate(runs[::-1])) if runs else as_tokens([])
